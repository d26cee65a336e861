// Look-up of given indices on the GPU: what gather.h makes of them, bit for bit what quantization makes of found ones.
#pragma once
#include <cuda_runtime_api.h>

#include "gather.h"

extern "C" {

// How many bytes of workspace the call takes.
cudaError_t vqkernels_cuda_lookup_workspace(const vqkernels::cuda::Problem* problem, size_t* bytes);

// Reads out->indices (-1: masked, not below the number of codes: NaN), fills out->quantized and out->squared_error; one
// launch and one memset on `stream`. `problem->mask`, metric and precision mean nothing here.
cudaError_t vqkernels_cuda_lookup(const vqkernels::cuda::Problem* problem, const vqkernels::cuda::Output* out,
                                  void* workspace, size_t bytes, cudaStream_t stream);
}
