// Launches the steps of nearest.h. Compiled without contraction, as all kernels are: rescore.h evaluates the contract.
#include "nearest.h"

#include "finish.h"
#include "matrix.cuh"
#include "steps.h"

namespace vqkernels {
namespace cuda {

cudaError_t launch_search(const SearchArguments& arguments, int64_t blocks, int64_t heads, cudaStream_t stream);

namespace {

__global__ void __launch_bounds__(kPackThreads, 2) pack_kernel(const __grid_constant__ Call call) {
  DeviceBlock block;
  pack_block(block, call);
}

__global__ void __launch_bounds__(kFinishThreads, 4) finish_kernel(const __grid_constant__ Call call) {
  DeviceBlock block;
  finish_block(block, call);
}

__global__ void __launch_bounds__(kFinishThreads, 4) resolve_kernel(const __grid_constant__ Call call) {
  DeviceBlock block;
  resolve_block(block, call, gridDim.x);
}

__global__ void __launch_bounds__(kFinishThreads, 4) rescore_kernel(const __grid_constant__ Call call) {
  DeviceBlock block;
  rescore_block(block, call, gridDim.x);
}

__global__ void __launch_bounds__(kFinishThreads, 4) gather_kernel(const __grid_constant__ Call call) {
  DeviceBlock block;
  gather_block(block, call);
}

// Launches one kernel after another and remembers the first error.
struct Launcher {
  cudaStream_t stream;
  cudaError_t error = cudaSuccess;
  int launches = 0;

  void pack(const Call& call, int64_t x, int64_t y) {
    const int bytes = pack_shared_bytes(call.plan.padded);
    one(pack_kernel, call, x, y, kPackThreads, bytes);
  }
  void finish(const Call& call, int64_t x, int64_t y) { one(finish_kernel, call, x, y, kFinishThreads, kFinishBytes); }
  void resolve(const Call& call, int64_t x, int64_t y) { one(resolve_kernel, call, x, y, kFinishThreads, 0); }
  void rescore(const Call& call, int64_t x, int64_t y) {
    one(rescore_kernel, call, x, y, kFinishThreads, kRescoreBytes);
  }
  void gather(const Call& call, int64_t x, int64_t y) { one(gather_kernel, call, x, y, kFinishThreads, kGatherBytes); }
  template <class T> void zero(T* at) {
    if (error == cudaSuccess) error = cudaMemsetAsync(at, 0, sizeof(T), stream);
  }
  void search(const SearchArguments& arguments, int64_t x, int64_t y) {
    if (error != cudaSuccess) return;
    error = launch_search(arguments, x, y, stream);
    ++launches;
  }

 private:
  void one(void (*kernel)(Call), const Call& call, int64_t x, int64_t y, int threads, int bytes) {
    if (error != cudaSuccess) return;
    kernel<<<dim3(unsigned(x), unsigned(y)), threads, bytes, stream>>>(call);
    error = cudaGetLastError();
    ++launches;
  }
};

}  // namespace
}  // namespace cuda
}  // namespace vqkernels

using namespace vqkernels;
using namespace vqkernels::cuda;

extern "C" cudaError_t vqkernels_cuda_nearest_workspace(const Problem* problem, int processors, size_t* bytes) {
  *bytes = 0;
  if (!countable(*problem) || processors < 1) return cudaErrorInvalidValue;
  Operands operands;
  *bytes = lay_out(*problem, plan_of(*problem, processors), nullptr, operands);
  return cudaSuccess;
}

extern "C" cudaError_t vqkernels_cuda_nearest(const Problem* problem, const Output* out, int64_t* decided,
                                              int processors, void* workspace, size_t bytes, int* launches,
                                              cudaStream_t stream) {
  if (launches != nullptr) *launches = 0;
  if (!countable(*problem) || processors < 1) return cudaErrorInvalidValue;
  Call call = {*problem, plan_of(*problem, processors), {}, *out};
  if (lay_out(*problem, call.plan, static_cast<char*>(workspace), call.operands) > bytes) return cudaErrorInvalidValue;
  if (decided != nullptr) call.operands.decided = decided;
  Launcher launch{stream};
  run_steps(launch, call, processors);
  if (launches != nullptr) *launches = launch.launches;
  return launch.error;
}
