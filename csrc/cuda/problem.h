// One call of the search: what it is about, how it is cut up, and where its scratch lies.
#pragma once
#include <math.h>
#include <stddef.h>

#include <type_traits>

#include "../cpu/rows.h"
#include "fragment.h"
#include "rows.h"
#include "search.h"

namespace vqkernels {
namespace cuda {

constexpr int kPackThreads = 256, kFinishThreads = 128, kFinishRows = 16;
constexpr int kPackLanes = 8;       // lanes that share a row whose channels are neighbours
constexpr int kMostCodeParts = 64;  // blocks that pack the codes of a head
constexpr int kMostSplits = 64;
constexpr int kMostChannels = 8192;               // the centre lies in shared memory
constexpr int64_t kFewRows = 8192;                // up to here one kernel finishes what the search began, if there are
constexpr int64_t kFewScores = int64_t(1) << 24;  // no more scores either: an undecided row costs its block all codes

// The codebook has `codes` codes; the mask may be null. `certified` false: precision="fast".
struct Problem {
  Rows z;
  Codes codebook;
  PerRow mask;
  int64_t codes;
  Metric metric;
  int certified;
};

struct Plan {
  int padded, rows, padded_rows, padded_codes;
  int tiles, splits, tiles_per_split;
  int code_parts, row_parts;  // blocks of the packing kernel per head
  int row_lanes;              // 8 where channels are neighbours, else 1: neighbouring rows go to neighbouring lanes
  int centred;                // 16-bit products are exact as they stand, so those are not centred
  int row_groups;             // of kFinishRows
  int fused;                  // whether one kernel finishes
};

struct Operands {
  uint16_t *rows, *codes;              // fp16: (heads, padded rows, padded), (heads, padded codes, padded)
  float* half_norms;                   // (heads, padded codes)
  float *beta, *norm, *error, *limit;  // (heads, padded rows)
  float *radius, *spread;              // (heads, code parts): maxima of each part
  int* left_out;                       // (heads, code parts): whether a code of the part was left out
  float *best, *second;                // (splits, heads, padded rows)
  int* group;
  int *open, *list;  // (heads,) how many rows are undecided; (heads, rows) which
  int* ticket;       // how many blocks have finished
  int64_t* decided;
  double* partial_error;  // (heads, row groups)
};

// Where the results go. `indices` is int64, written; `quantized` has z's sizes and type; its data may be null: indices
// alone.
struct Output {
  PerRow indices;
  Rows quantized;
  double* squared_error;
};

struct Call {
  Problem problem;
  Plan plan;
  Operands operands;
  Output out;
};

inline int64_t rounded_up(int64_t x, int64_t to) { return blocks_of(x, to) * to; }

// Whether sizes are within what the kernels count in: rows and codes of a head below 2^31.
inline bool countable(const Problem& p) {
  const int64_t most = int64_t(1) << 30;
  return p.z.batch >= 0 && p.z.positions >= 0 && p.z.heads >= 0 && p.z.heads < 65536 && p.codes > 0 &&
         p.codes <= most && p.z.channels > 0 && p.z.channels <= kMostChannels &&
         (p.z.positions == 0 || p.z.batch <= most / p.z.positions) && p.z.total() / kFinishRows < most;
}

inline Plan plan_of(const Problem& p, int processors) {
  Plan plan = {};
  plan.padded = padded_channels(p.z.channels);
  plan.rows = int(p.z.batch * p.z.positions);
  plan.padded_rows = int(rounded_up(plan.rows, kSearchRows));
  plan.padded_codes = int(rounded_up(p.codes, kSearchCodes));
  plan.tiles = plan.padded_codes / kSearchCodes;
  // Enough blocks for twice the multiprocessors; each split has at least one tile, none is empty.
  const int64_t row_tiles = plan.padded_rows / kSearchRows * (p.z.heads > 0 ? p.z.heads : 1);
  int64_t splits = row_tiles > 0 ? blocks_of(2 * int64_t(processors), row_tiles) : 1;
  if (splits > kMostSplits) splits = kMostSplits;
  if (splits > plan.tiles) splits = plan.tiles;
  plan.tiles_per_split = int(blocks_of(plan.tiles, splits));
  plan.splits = int(blocks_of(plan.tiles, plan.tiles_per_split));
  const int64_t codes_at_once = kPackThreads / kPackLanes;
  plan.code_parts = int(blocks_of(plan.padded_codes, codes_at_once));
  if (plan.code_parts > kMostCodeParts) plan.code_parts = kMostCodeParts;
  plan.row_lanes = p.z.channel_stride == 1 || p.z.channels == 1 ? kPackLanes : 1;
  const int64_t row_blocks = blocks_of(plan.padded_rows, kPackThreads / plan.row_lanes);
  plan.row_parts = int(row_blocks < 8 * int64_t(processors) ? row_blocks : 8 * int64_t(processors));
  plan.centred = p.metric == Metric::euclidean && (size_of(p.z.dtype) > 2 || size_of(p.codebook.dtype) > 2);
  plan.row_groups = int(blocks_of(plan.rows, kFinishRows));
  const int64_t rows = int64_t(plan.rows) * p.z.heads;
  plan.fused = rows <= kFewRows && rows * p.codes <= kFewScores;
  return plan;
}

// Lays the operands out from `base` on, each at a multiple of 256 bytes; returns the bytes that they take.
inline size_t lay_out(const Problem& p, const Plan& plan, char* base, Operands& o) {
  size_t at = 0;
  const auto take = [&](auto*& pointer, int64_t count) {
    using T = std::remove_reference_t<decltype(*pointer)>;
    pointer = base == nullptr ? nullptr : reinterpret_cast<T*>(base + at);
    at += size_t(rounded_up(count * int64_t(sizeof(T)), 256));
  };
  const int64_t heads = p.z.heads, rows = heads * plan.padded_rows, codes = heads * plan.padded_codes;
  take(o.rows, rows * plan.padded);
  take(o.codes, codes * plan.padded);
  take(o.half_norms, codes);
  take(o.beta, rows), take(o.norm, rows), take(o.error, rows), take(o.limit, rows);
  take(o.radius, heads * plan.code_parts), take(o.spread, heads * plan.code_parts);
  take(o.left_out, heads * plan.code_parts);
  take(o.best, plan.splits * rows), take(o.second, plan.splits * rows), take(o.group, plan.splits * rows);
  take(o.open, heads), take(o.list, heads * plan.rows), take(o.ticket, 1), take(o.decided, 1);
  take(o.partial_error, heads * plan.row_groups);
  return at;
}

// The stored value, exactly, as double or float (which holds every type but double).
template <class Real> VQ_BOTH Real element(const void* data, DType type, int64_t at) {
  switch (type) {
    case DType::bf16: return Real(widen(static_cast<const BFloat16*>(data)[at]));
    case DType::f16: return Real(widen(static_cast<const Float16*>(data)[at]));
    case DType::f64: return Real(static_cast<const double*>(data)[at]);
    default: return Real(static_cast<const float*>(data)[at]);
  }
}

// Row `row` of head `head` in anything that is laid out by batch, head and position.
template <class Strided> VQ_BOTH int64_t row_offset(const Problem& p, const Strided& x, int64_t head, int row) {
  const int positions = int(p.z.positions);
  return offset_of(x, Place{row / positions, head, row % positions});
}

VQ_BOTH int64_t& index_of(const Problem& p, const Output& out, int64_t head, int row) {
  return static_cast<int64_t*>(const_cast<void*>(out.indices.data))[row_offset(p, out.indices, head, row)];
}

VQ_BOTH bool is_live(const Call& c, int64_t head, int row) {
  if (row >= c.plan.rows) return false;
  const PerRow& mask = c.problem.mask;
  return mask.data == nullptr || static_cast<const uint8_t*>(mask.data)[row_offset(c.problem, mask, head, row)] != 0;
}

// floor(log2 x) of a positive normal number.
VQ_BOTH int binary_exponent(double x) {
  int64_t bits;
  memcpy(&bits, &x, 8);
  return int((bits >> 52) & 2047) - 1023;
}
VQ_BOTH int binary_exponent(float x) {
  int32_t bits;
  memcpy(&bits, &x, 4);
  return ((bits >> 23) & 255) - 127;
}

// 2^exponent, which must be a normal number.
template <class Real> VQ_BOTH Real power_of_two(int exponent);
template <> VQ_BOTH double power_of_two<double>(int exponent) {
  const int64_t bits = int64_t(exponent + 1023) << 52;
  double x;
  memcpy(&x, &bits, 8);
  return x;
}
template <> VQ_BOTH float power_of_two<float>(int exponent) {
  const int32_t bits = (exponent + 127) << 23;
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

// Over the `lanes` neighbouring lanes (a power of two) that share a row; all 32 of the warp take part.
template <class T, class Block> VQ_BOTH T sum_of_lanes(Block& block, T x, int lanes) {
  for (int apart = lanes / 2; apart > 0; apart /= 2) x += block.shuffle_xor(x, apart);
  return x;
}
template <class T, class Block> VQ_BOTH T most_of_lanes(Block& block, T x, int lanes) {
  for (int apart = lanes / 2; apart > 0; apart /= 2) {
    const T other = block.shuffle_xor(x, apart);
    x = x < other ? other : x;
  }
  return x;
}

}  // namespace cuda
}  // namespace vqkernels
