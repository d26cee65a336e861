// Counts and sums of rows by code, and the codebook's gradient, on the GPU: the launcher of segments.h. No torch header.
//
// Deterministic to the bit: stable radix sort, fixed chunks, partials added in order, no atomics. Nothing here waits for
// the device, allocates, or keeps state: the caller lends a workspace of the size that the query names.
#pragma once
#include <cuda_runtime_api.h>

#include "rows.h"

namespace vqkernels {
namespace cuda {

// What is summed over the rows of each code k of each head: z, or, with a codebook, 2 grad / elements * (e_k - z). Every
// pointer is device memory.
struct SegmentSums {
  Rows z;
  PerRow indices;  // int64; a row whose index is outside [0, codes) counts nowhere
  PerRow mask;     // bytes, or null: rows of byte 0 are not read
  int64_t codes;
  Codes codebook;  // or null
  const void* grad;  // 0-d, or null: factor 1
  DType grad_type;
  const int64_t* elements;  // 0-d
  int64_t* counts;          // (heads, codes), or null
  void* sums;               // (heads, codes, channels)
  DType sums_type;
};

}  // namespace cuda
}  // namespace vqkernels

extern "C" {

// How many bytes of workspace a call with this many rows (heads * batch * positions), heads * codes and channels takes.
// cudaErrorInvalidValue where rows or codes do not fit 31 bits.
cudaError_t vqkernels_cuda_segment_sums_workspace(int64_t total, int64_t groups, int64_t channels, size_t* bytes);

// Launches everything on `stream`. The workspace is aligned to 256 bytes, as torch allocates.
cudaError_t vqkernels_cuda_segment_sums(const vqkernels::cuda::SegmentSums* what, void* workspace, size_t bytes,
                                        cudaStream_t stream);
}
