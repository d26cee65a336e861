// Launches block programs on a stream: a program is a struct with kThreads, kBlocks (how many blocks a multiprocessor
// must hold at least) and operator()(Block&).
#pragma once
#include <cuda_runtime_api.h>

#include "device_block.cuh"

namespace vqkernels {
namespace cuda {

template <class Program>
__global__ void __launch_bounds__(Program::kThreads, Program::kBlocks) program_kernel(const Program program) {
  DeviceBlock block;
  program(block);
}

struct StreamLauncher {
  cudaStream_t stream;

  template <class Program> int launch(int64_t grid_x, int64_t grid_y, int shared_bytes, const Program& program) const {
    if (grid_x > 0x7fffffff || grid_y > 0xffff) return cudaErrorInvalidConfiguration;
    program_kernel<Program>
        <<<dim3(unsigned(grid_x), unsigned(grid_y)), Program::kThreads, shared_bytes, stream>>>(program);
    return cudaGetLastError();
  }
};

}  // namespace cuda
}  // namespace vqkernels
