// Launches segments.h: keys, a stable radix sort of as many bits as the keys have, borders, chunk sums, totals.
#include "statistics.h"

#include <cub/device/device_radix_sort.cuh>

#include "device_block.cuh"
#include "segments.h"
#include "workspace.h"

namespace vqkernels {
namespace cuda {
namespace {

template <class Z, int kWidth> __global__ void __launch_bounds__(kKeyThreads) key_kernel(const KeyArguments a) {
  DeviceBlock block;
  write_keys<Z, kWidth>(block, a);
}

__global__ void __launch_bounds__(kKeyThreads) border_kernel(const BorderArguments a) {
  DeviceBlock block;
  write_borders(block, a);
}

template <class Z, int kWidth> __global__ void __launch_bounds__(kChunkThreads, 4) chunk_kernel(const SumArguments a) {
  DeviceBlock block;
  sum_chunks<Z, kWidth>(block, a);
}

__global__ void __launch_bounds__(kTotalThreads) total_kernel(const SumArguments a) {
  DeviceBlock block;
  write_totals(block, a);
}

template <class Z, int kWidth>
void launch_keys(const KeyArguments& given, cudaStream_t stream) {
  KeyArguments a = given;
  a.lanes = key_lanes(a.z, kWidth);
  key_kernel<Z, kWidth><<<unsigned(blocks_of(a.z.total(), kKeyThreads / a.lanes)), kKeyThreads, 0, stream>>>(a);
}

template <class Z, int kWidth>
void launch_chunks(const SumArguments& given, cudaStream_t stream) {
  SumArguments a = given;
  a.lanes = sum_lanes(a.z.channels, kWidth);
  const int64_t rows = int64_t(kChunkThreads / a.lanes) * kChunk;
  const dim3 grid(unsigned(blocks_of(a.z.total(), rows)), unsigned(blocks_of(a.z.channels, int64_t(a.lanes) * kWidth)));
  chunk_kernel<Z, kWidth><<<grid, kChunkThreads, sum_shared_bytes(a.lanes), stream>>>(a);
}

cudaError_t sort_rows(void* scratch, size_t& bytes, cub::DoubleBuffer<uint32_t>& keys,
                      cub::DoubleBuffer<uint32_t>& order, int64_t total, int64_t groups, cudaStream_t stream) {
  return cub::DeviceRadixSort::SortPairs(scratch, bytes, keys, order, int(total), 0, key_bits(groups), stream);
}

cudaError_t plan(int64_t total, int64_t groups, int64_t channels, SumWorkspace* out, size_t* sort_bytes) {
  if (total < 0 || groups < 0 || channels < 0 || !fits_sums(total, groups)) return cudaErrorInvalidValue;
  cub::DoubleBuffer<uint32_t> keys(nullptr, nullptr), order(nullptr, nullptr);
  *sort_bytes = 0;
  if (total > 0)
    if (const cudaError_t error = sort_rows(nullptr, *sort_bytes, keys, order, total, groups, nullptr)) return error;
  *out = plan_sums(total, groups, channels, int64_t(*sort_bytes));
  return cudaSuccess;
}

template <class Z> cudaError_t run(const SegmentSums& what, char* memory, const SumWorkspace& plan, size_t sort_bytes,
                                   cudaStream_t stream) {
  const int64_t total = what.z.total(), groups = what.z.heads * what.codes;
  const bool packets = takes_packets(what.z);
  const auto words = [&](int64_t at) { return reinterpret_cast<uint32_t*>(memory + at); };
  cub::DoubleBuffer<uint32_t> keys(words(plan.keys[0]), words(plan.keys[1]));
  cub::DoubleBuffer<uint32_t> order(words(plan.order[0]), words(plan.order[1]));
  if (total > 0) {
    const KeyArguments key = {what.z, what.indices, what.mask, what.codes, 1, keys.Current(), order.Current()};
    if (packets) launch_keys<Z, kPacket<Z>>(key, stream);
    else launch_keys<Z, 1>(key, stream);
    if (const cudaError_t error = cudaGetLastError()) return error;
    if (const cudaError_t error = sort_rows(memory + plan.sort, sort_bytes, keys, order, total, groups, stream))
      return error;
  }
  border_kernel<<<unsigned(blocks_of(groups + 1, kKeyThreads)), kKeyThreads, 0, stream>>>(
      BorderArguments{keys.Current(), total, groups, words(plan.start)});
  const SumArguments sum = {what.z,          what.codebook,   what.grad,          what.grad_type, what.elements,
                            keys.Current(),  order.Current(), words(plan.start),  what.codes,     groups,
                            1,               reinterpret_cast<double*>(memory + plan.partials),
                            what.counts,     what.sums,       what.sums_type};
  if (total > 0 && what.z.channels > 0) {
    if (packets) launch_chunks<Z, kPacket<Z>>(sum, stream);
    else launch_chunks<Z, 1>(sum, stream);
  }
  total_kernel<<<unsigned(blocks_of(groups, kTotalWarps)), kTotalThreads, kTotalSharedBytes, stream>>>(sum);
  return cudaGetLastError();
}

}  // namespace
}  // namespace cuda
}  // namespace vqkernels

using namespace vqkernels;
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
  const int64_t groups = what->z.heads * what->codes;
  SumWorkspace workspace;
  size_t sort_bytes;
  if (const cudaError_t error = plan(what->z.total(), groups, what->z.channels, &workspace, &sort_bytes)) return error;
  if (bytes < size_t(workspace.bytes)) return cudaErrorInvalidValue;
  if (groups == 0) return cudaSuccess;
  return with_type(what->z.dtype, [&](auto* type) {
    using Z = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    return run<Z>(*what, static_cast<char*>(memory), workspace, sort_bytes, stream);
  });
}
