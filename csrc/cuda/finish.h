// The third and last launch of a small step: resolve 16 rows, rescore what stays open among them, gather them.
//
// For few rows launches cost more than what a block with one undecided row of sixteen wastes; nearest.h chooses.
#pragma once
#include "gather.h"
#include "rescore.h"
#include "resolve.h"

namespace vqkernels {
namespace cuda {

constexpr int kFinishBytes = kRescoreBytes + kGatherBytes;

template <class Block> VQ_BOTH void finish_block(Block& block, const Call& call) {
  const int64_t head = block.index_y(), group = block.index();
  const auto list = block.template shared<int>(kListAt);
  const auto limits = block.template shared<float>(kLimitsAt);
  const Extent extent = extent_of(block, call, head);
  const int slot = block.thread() / kGroup, row = int(group) * kFinishRows + slot;
  const bool inside = row < call.plan.rows;
  const Resolved found = resolve_row(block, call, extent, head, inside ? row : call.plan.rows - 1);
  const bool open = inside && found.index == kUndecided;
  int decided = 0;
  if (block.thread() % kGroup == 0) {
    list.set(slot, open ? row : -1);
    limits.set(slot, found.limit);
    if (inside && !open) index_of(call.problem, call.out, head, row) = found.index;
    decided = inside && found.index >= 0;
  }
  decided = sum_of_lanes(block, decided, kWarp);
  if (block.thread() % kWarp == 0 && decided > 0) add_globally(block, call.operands.decided, int64_t(decided));
  block.sync();
  bool any = false;
  for (int i = 0; i < kFinishRows; ++i) any |= list.get(i) >= 0;
  if (any) rescore_rows(block, call, head);
  if (call.out.quantized.data == nullptr) return;
  block.sync();
  gather_group(block, call, head, group, kRescoreBytes);
}

}  // namespace cuda
}  // namespace vqkernels
