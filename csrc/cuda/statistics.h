// Counts and sums of rows by code, and the codebook's gradient, on the GPU: the launcher of segments.h. No torch
// header.
//
// Deterministic to the bit: stable radix sort, fixed chunks, partials added in order, no atomics. Nothing here waits
// for the device, allocates, or keeps state: the caller lends a workspace of the size that the query names.
#pragma once
#include <cuda_runtime_api.h>

#include "segment_sums.h"

extern "C" {

// How many bytes of workspace a call with this many rows (heads * batch * positions), heads * codes and channels takes.
// cudaErrorInvalidValue where rows or codes do not fit 31 bits.
cudaError_t vqkernels_cuda_segment_sums_workspace(int64_t total, int64_t groups, int64_t channels, size_t* bytes);

// Launches everything on `stream`; every pointer is device memory, the workspace aligned to 256 bytes, as torch
// allocates.
cudaError_t vqkernels_cuda_segment_sums(const vqkernels::cuda::SegmentSums* what, void* workspace, size_t bytes,
                                        cudaStream_t stream);
}
