// After the candidate pass: merge the splits, decide what the certificate can decide, list the rest.
//
// Eight lanes share a row: each scores one code of the winning group again, in fp32, in an order of its own; the
// certificate allows any (margin.h). A row is decided when no other group reaches the threshold, or holds any code that
// may be chosen, and exactly one code of the winning group does: that code is the contract's choice. precision="fast"
// takes the operands for exact: its threshold covers the arithmetic alone, so only rows whose scores tie within that
// are undecided. Rows settled without scores: a masked one (norm < 0) gets -1; a poisoned one (norm NaN), and one for
// which every code is non-finite (best = inf), get 0.
// Traffic per row: 12 bytes per split, one packed row, eight packed codes from cache.
#pragma once
#include "../margin.h"
#include "pack.h"

namespace vqkernels {
namespace cuda {

constexpr int kUndecided = -2;

// Over all codes of a head, from the parts that packed them; the same in every lane.
struct Extent {
  float radius, spread;
  bool left_out;
};

template <class Block> VQ_BOTH Extent extent_of(Block& block, const Call& call, int64_t head) {
  float radius = 0.0f, spread = 0.0f;
  int left_out = 0;
  for (int part = block.thread() % kWarp; part < call.plan.code_parts; part += kWarp) {
    const int64_t at = head * call.plan.code_parts + part;
    radius = fmaxf(radius, call.operands.radius[at]);
    spread = fmaxf(spread, call.operands.spread[at]);
    left_out |= call.operands.left_out[at];
  }
  return {most_of_lanes(block, radius, kWarp), most_of_lanes(block, spread, kWarp),
          most_of_lanes(block, left_out, kWarp) != 0};
}

// The limit of a row (margin.h), or +inf where nothing is proved: kept is every code unless score > limit.
VQ_BOTH float limit_of(const Call& call, const Extent& extent, float best, float norm, float error) {
  if (extent.left_out && !(norm + error <= kNearRows && best < kNearScores)) return INFINITY;
  if (!call.problem.certified && error < INFINITY)
    return margin_threshold(best, norm, 0.0f, extent.radius, 0.0f, call.plan.padded, call.problem.metric);
  return margin_threshold(best, norm, error, extent.radius, extent.spread, call.plan.padded, call.problem.metric);
}

struct Resolved {
  int index;  // kUndecided: float64 must decide, among the codes up to `limit`
  float limit;
};

// Of row `row` < plan.rows; the same in its eight lanes.
template <class Block>
VQ_BOTH Resolved resolve_row(Block& block, const Call& call, const Extent& extent, int64_t head, int row) {
  const Operands& o = call.operands;
  const Plan& plan = call.plan;
  const int member = block.thread() % kGroup;
  const int64_t at = head * plan.padded_rows + row, heads = call.problem.z.heads;
  Best all = none();
  for (int split = 0; split < plan.splits; ++split) {
    const int64_t from = split * heads * plan.padded_rows + at;
    all = merged(all, Best{o.best[from], o.second[from], o.group[from]});
  }
  const float norm = o.norm[at], limit = limit_of(call, extent, all.best, norm, o.error[at]);
  const int64_t code = head * plan.padded_codes + member_code(all.group, member);
  const Chunk* q = reinterpret_cast<const Chunk*>(o.rows + at * plan.padded);
  const Chunk* p = reinterpret_cast<const Chunk*>(o.codes + code * plan.padded);
  float product = 0.0f;
  for (int c = 0; c < plan.padded / kChunkNumbers; ++c) {
    const Chunk left = q[c], right = p[c];
    VQ_UNROLL
    for (int i = 0; i < 4; ++i) {
      product = fmaf(widen(Float16{uint16_t(left.word[i])}), widen(Float16{uint16_t(right.word[i])}), product);
      product =
          fmaf(widen(Float16{uint16_t(left.word[i] >> 16)}), widen(Float16{uint16_t(right.word[i] >> 16)}), product);
    }
  }
  const float half = o.half_norms[code], score = half - o.beta[at] * product;
  const bool possible = half < INFINITY && !(score > limit);
  const int survivors = sum_of_lanes(block, int(possible), kGroup);
  const int last = most_of_lanes(block, possible ? member : -1, kGroup);
  const bool proved = (all.second > limit || all.second == INFINITY) && survivors == 1;
  int index = proved ? int(member_code(all.group, last)) : kUndecided;
  if (norm != norm || all.best == INFINITY) index = 0;
  if (norm < 0.0f) index = -1;
  return {index, limit};
}

// 16 rows at a time: indices, limits and lists of what is open, for rescore.h.
template <class Block> VQ_BOTH void resolve_block(Block& block, const Call& call, int64_t parts) {
  const Operands& o = call.operands;
  const int64_t head = block.index_y();
  const Extent extent = extent_of(block, call, head);
  int decided = 0;
  for (int64_t group = block.index(); group < call.plan.row_groups; group += parts) {
    const int row = int(group) * kFinishRows + block.thread() / kGroup;
    const bool inside = row < call.plan.rows, leads = block.thread() % kGroup == 0;
    const Resolved found = resolve_row(block, call, extent, head, inside ? row : call.plan.rows - 1);
    if (!inside || !leads) continue;
    if (found.index == kUndecided) {
      o.list[head * call.plan.rows + add_globally(block, o.open + head, 1)] = row;
      o.limit[head * call.plan.padded_rows + row] = found.limit;
    } else {
      index_of(call.problem, call.out, head, row) = found.index;
      decided += found.index >= 0;
    }
  }
  decided = sum_of_lanes(block, decided, kWarp);
  if (block.thread() % kWarp == 0 && decided > 0) add_globally(block, o.decided, int64_t(decided));
}

}  // namespace cuda
}  // namespace vqkernels
