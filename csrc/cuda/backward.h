// The gradient of z on the GPU: the launcher of row_gradient.h. No torch header; nothing waits, allocates or keeps
// state. (The codebook's gradient is a segment sum: statistics.h.)
#pragma once
#include <cuda_runtime_api.h>

#include "row_gradient.h"

extern "C" {

// One launch on `stream`; every pointer is device memory, `lanes` is chosen here. cudaErrorInvalidValue at 2^31 rows.
cudaError_t vqkernels_cuda_row_gradient(const vqkernels::cuda::RowGradient* what, cudaStream_t stream);
}
