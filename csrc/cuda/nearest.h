// Nearest codes and vector quantization on the GPU: the launcher of pack.h, search.h, resolve.h, rescore.h and
// gather.h. No torch header. Nothing here waits for the device, allocates, or keeps state: the caller lends a workspace
// of the size that the query names.
#pragma once
#include <cuda_runtime_api.h>

#include "problem.h"

extern "C" {

// How many bytes of workspace the call takes on a GPU of that many multiprocessors. cudaErrorInvalidValue where a head
// has more than 2^30 rows or codes, or rows more than 8192 channels.
cudaError_t vqkernels_cuda_nearest_workspace(const vqkernels::cuda::Problem* problem, int processors, size_t* bytes);

// Launches everything on `stream`; `out->quantized.data` null: the indices alone. `decided`, () int64 device memory, or
// null: how many unmasked rows the certificate decided. `launches`, host memory, or null: how many kernels were
// launched. The workspace is aligned to 256 bytes, as torch allocates.
cudaError_t vqkernels_cuda_nearest(const vqkernels::cuda::Problem* problem, const vqkernels::cuda::Output* out,
                                   int64_t* decided, int processors, void* workspace, size_t bytes, int* launches,
                                   cudaStream_t stream);
}
