// Launches segment_sums.h on a stream, with CUB's radix sort of as many bits as the keys have.
#include "statistics.h"

#include <cub/device/device_radix_sort.cuh>

#include "launcher.cuh"

namespace vqkernels {
namespace cuda {
namespace {

struct SumLauncher : StreamLauncher {
  // With `scratch` null, only tells how many bytes it takes.
  cudaError_t sort(cub::DoubleBuffer<uint32_t>& keys, cub::DoubleBuffer<uint32_t>& order, int64_t total, int bits,
                   void* scratch, size_t& bytes) const {
    return cub::DeviceRadixSort::SortPairs(scratch, bytes, keys, order, int(total), 0, bits, stream);
  }

  int sort(uint32_t* (&keys)[2], uint32_t* (&order)[2], int64_t total, int bits, void* scratch, int64_t bytes) const {
    cub::DoubleBuffer<uint32_t> both_keys(keys[0], keys[1]), both_orders(order[0], order[1]);
    size_t size = size_t(bytes);
    const cudaError_t error = sort(both_keys, both_orders, total, bits, scratch, size);
    keys[0] = both_keys.Current(), keys[1] = both_keys.Alternate();
    order[0] = both_orders.Current(), order[1] = both_orders.Alternate();
    return error;
  }
};

cudaError_t plan(int64_t total, int64_t groups, int64_t channels, SumWorkspace* out, size_t* sort_bytes) {
  if (total < 0 || groups < 0 || channels < 0 || !fits_sums(total, groups)) return cudaErrorInvalidValue;
  *sort_bytes = 0;
  if (total > 0) {
    cub::DoubleBuffer<uint32_t> none(nullptr, nullptr);
    const cudaError_t error = SumLauncher{}.sort(none, none, total, key_bits(groups), nullptr, *sort_bytes);
    if (error != cudaSuccess) return error;
  }
  *out = plan_sums(total, groups, channels, int64_t(*sort_bytes));
  return cudaSuccess;
}

}  // namespace
}  // namespace cuda
}  // namespace vqkernels

using namespace vqkernels::cuda;

extern "C" cudaError_t vqkernels_cuda_segment_sums_workspace(int64_t total, int64_t groups, int64_t channels,
                                                             size_t* bytes) {
  SumWorkspace workspace;
  size_t sort_bytes;
  const cudaError_t error = plan(total, groups, channels, &workspace, &sort_bytes);
  *bytes = error == cudaSuccess ? size_t(workspace.bytes) : 0;
  return error;
}

extern "C" cudaError_t vqkernels_cuda_segment_sums(const SegmentSums* what, void* memory, size_t bytes,
                                                   cudaStream_t stream) {
  SumWorkspace workspace;
  size_t sort_bytes;
  const cudaError_t error =
      plan(what->z.total(), what->z.heads * what->codes, what->z.channels, &workspace, &sort_bytes);
  if (error != cudaSuccess) return error;
  if (bytes < size_t(workspace.bytes)) return cudaErrorInvalidValue;
  SumLauncher launcher{{stream}};
  return cudaError_t(launch_segment_sums(launcher, *what, memory, workspace, int64_t(sort_bytes)));
}
