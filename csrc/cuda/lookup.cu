#include "lookup.h"

#include "launcher.cuh"
#include "matrix.cuh"

namespace vqkernels {
namespace cuda {
namespace {

struct LookUp {
  static constexpr int kThreads = kFinishThreads, kBlocks = 4;
  Call call;
  template <class Block> VQ_BOTH void operator()(Block& block) const { gather_block(block, call); }
};

}  // namespace
}  // namespace cuda
}  // namespace vqkernels

using namespace vqkernels::cuda;

extern "C" cudaError_t vqkernels_cuda_lookup_workspace(const Problem* problem, size_t* bytes) {
  *bytes = 0;
  if (!countable(*problem)) return cudaErrorInvalidValue;
  *bytes = size_t(lookup_bytes(*problem));
  return cudaSuccess;
}

extern "C" cudaError_t vqkernels_cuda_lookup(const Problem* problem, const Output* out, void* workspace, size_t bytes,
                                             cudaStream_t stream) {
  if (!countable(*problem) || bytes < size_t(lookup_bytes(*problem))) return cudaErrorInvalidValue;
  const Call call = lookup_call(*problem, *out, static_cast<char*>(workspace));
  if (call.plan.rows == 0 || problem->z.heads == 0)
    return cudaMemsetAsync(out->squared_error, 0, sizeof(double), stream);
  const cudaError_t error = cudaMemsetAsync(workspace, 0, kTicketBytes, stream);
  if (error != cudaSuccess) return error;
  return cudaError_t(StreamLauncher{stream}.launch(call.plan.row_groups, problem->z.heads, kGatherBytes, LookUp{call}));
}
