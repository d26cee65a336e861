#include "backward.h"

#include "launcher.cuh"

extern "C" cudaError_t vqkernels_cuda_row_gradient(const vqkernels::cuda::RowGradient* what, cudaStream_t stream) {
  if (what->z.total() >= (int64_t(1) << 31)) return cudaErrorInvalidValue;
  vqkernels::cuda::StreamLauncher launcher{stream};
  return cudaError_t(vqkernels::cuda::launch_row_gradients(launcher, *what));
}
