// The launches of segments.h in order, for the device (statistics.cu) and for the executor alike.
#pragma once
#include "segments.h"
#include "workspace.h"

namespace vqkernels {
namespace cuda {

// What is summed over the rows of each code k of each head: z, or, with a codebook, 2 grad / elements * (e_k - z).
struct SegmentSums {
  Rows z;
  PerRow indices;  // int64; a row whose index is outside [0, codes) counts nowhere
  PerRow mask;     // bytes, or null: rows of byte 0 are not read
  int64_t codes;
  Codes codebook;    // or null
  const void* grad;  // 0-d, or null: factor 1
  DType grad_type;
  const int64_t* elements;  // 0-d
  int64_t* counts;          // (heads, codes), or null
  void* sums;               // (heads, codes, channels)
  DType sums_type;
};

template <class Z, int kWidth> struct WriteKeys {
  static constexpr int kThreads = kKeyThreads, kBlocks = 4;
  KeyArguments a;
  template <class Block> VQ_BOTH void operator()(Block& block) const { write_keys<Z, kWidth>(block, a); }
};

struct WriteBorders {
  static constexpr int kThreads = kKeyThreads, kBlocks = 1;
  BorderArguments a;
  template <class Block> VQ_BOTH void operator()(Block& block) const { write_borders(block, a); }
};

template <class Z, int kWidth> struct SumChunks {
  static constexpr int kThreads = kChunkThreads, kBlocks = 4;
  SumArguments a;
  template <class Block> VQ_BOTH void operator()(Block& block) const { sum_chunks<Z, kWidth>(block, a); }
};

struct WriteTotals {
  static constexpr int kThreads = kTotalThreads, kBlocks = 2;
  SumArguments a;
  template <class Block> VQ_BOTH void operator()(Block& block) const { write_totals(block, a); }
};

// Launcher: launch(grid_x, grid_y, shared_bytes, program) and sort(keys, order, total, bits, scratch, scratch_bytes),
// which sorts pairs stably by key and leaves them in keys[0], order[0]; both return 0 or an error that ends the
// sequence.
template <class Z, int kWidth, class Launcher>
int launch_segment_sums(Launcher& launcher, const SegmentSums& what, char* memory, const SumWorkspace& plan,
                        int64_t sort_bytes) {
  const int64_t total = what.z.total(), groups = what.z.heads * what.codes, channels = what.z.channels;
  const auto words = [&](int64_t at) { return reinterpret_cast<uint32_t*>(memory + at); };
  uint32_t* keys[2] = {words(plan.keys[0]), words(plan.keys[1])};
  uint32_t* order[2] = {words(plan.order[0]), words(plan.order[1])};
  int error = 0;
  if (total > 0) {
    const int lanes = key_lanes(what.z, kWidth);
    error =
        launcher.launch(blocks_of(total, kKeyThreads / lanes), 1, 0,
                        WriteKeys<Z, kWidth>{{what.z, what.indices, what.mask, what.codes, lanes, keys[0], order[0]}});
    if (error == 0) error = launcher.sort(keys, order, total, key_bits(groups), memory + plan.sort, sort_bytes);
    if (error != 0) return error;
  }
  error = launcher.launch(blocks_of(groups + 1, kKeyThreads), 1, 0,
                          WriteBorders{{keys[0], total, groups, words(plan.start)}});
  const int lanes = sum_lanes(channels, kWidth);
  const SumArguments sum = {
      what.z,        what.codebook, what.grad,     what.grad_type,
      what.elements, keys[0],       order[0],      words(plan.start),
      what.codes,    groups,        lanes,         reinterpret_cast<double*>(memory + plan.partials),
      what.counts,   what.sums,     what.sums_type};
  if (error == 0 && total > 0 && channels > 0)
    error = launcher.launch(blocks_of(total, int64_t(kChunkThreads / lanes) * kChunk),
                            blocks_of(channels, int64_t(lanes) * kWidth), sum_shared_bytes(lanes),
                            SumChunks<Z, kWidth>{sum});
  if (error == 0) error = launcher.launch(blocks_of(groups, kTotalWarps), 1, kTotalSharedBytes, WriteTotals{sum});
  return error;
}

// The same for z's own type, in packets of 16 bytes where its layout has them.
template <class Launcher>
int launch_segment_sums(Launcher& launcher, const SegmentSums& what, void* memory, const SumWorkspace& plan,
                        int64_t sort_bytes) {
  if (what.z.heads * what.codes == 0) return 0;
  return with_type(what.z.dtype, [&](auto* type) {
    using Z = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    char* bytes = static_cast<char*>(memory);
    return takes_packets(what.z) ? launch_segment_sums<Z, kPacket<Z>>(launcher, what, bytes, plan, sort_bytes)
                                 : launch_segment_sums<Z, 1>(launcher, what, bytes, plan, sort_bytes);
  });
}

}  // namespace cuda
}  // namespace vqkernels
