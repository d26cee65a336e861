// What follows the search: look-up, rounding to z's type in z's layout, direct residual, squared error.
//
// 16 rows per block of 128 threads. Where channels are neighbours eight lanes share a row, else neighbouring lanes take
// neighbouring rows: either way they read neighbours. Each block writes one partial sum; the block that finishes last
// adds all of them in one order, so the squared error does not depend on who finished when. Never materialised:
// e[index], z - e. Traffic: z once, the chosen codes (mostly from cache), the output once.
// A poisoned row makes the squared error NaN; a masked one (index -1) is not read and becomes zeros.
#pragma once
#include "problem.h"

namespace vqkernels {
namespace cuda {

constexpr int kSumsAt = 0;  // one double per warp, and the ticket
constexpr int kGatherBytes = kFinishThreads / kWarp * 8 + 8;

// The sum over the block, in one order, in every thread; two barriers.
template <class Block> VQ_BOTH double sum_of_block(Block& block, double x, int bytes) {
  const auto sums = block.template shared<double>(bytes);
  x = sum_of_lanes(block, x, kWarp);
  block.sync();
  if (block.thread() % kWarp == 0) sums.set(block.thread() / kWarp, x);
  block.sync();
  double total = 0.0;
  for (int w = 0; w < kFinishThreads / kWarp; ++w) total += sums.get(w);
  return total;
}

template <class Real, class Block>
VQ_BOTH double gather_rows(Block& block, const Call& call, int64_t head, int64_t group) {
  const Problem& p = call.problem;
  const Output& out = call.out;
  constexpr int kLanes = kFinishThreads / kFinishRows;
  const bool neighbours = call.plan.row_lanes != 1;
  const int sub = neighbours ? block.thread() % kLanes : block.thread() / kFinishRows;
  const int row = int(group) * kFinishRows + (neighbours ? block.thread() / kLanes : block.thread() % kFinishRows);
  if (row >= call.plan.rows) return 0.0;
  const int64_t index = index_of(p, out, head, row);
  const int64_t from = row_offset(p, p.z, head, row), to = row_offset(p, out.quantized, head, row);
  const int64_t code = head * p.codebook.head_stride + index * p.codebook.code_stride;
  void* quantized = const_cast<void*>(out.quantized.data);
  double error = 0.0;
  for (int64_t d = sub; d < p.z.channels; d += kLanes) {
    Real e = 0;
    if (index >= 0) {
      if (index < p.codes) e = element<Real>(p.codebook.data, p.codebook.dtype, code + d * p.codebook.channel_stride);
      else e = Real(NAN);  // an index that was given, not found
      const Real x = element<Real>(p.z.data, p.z.dtype, from + d * p.z.channel_stride), residual = x - e;
      error += double(residual) * double(residual) + double(x - x);  // x - x: NaN where x is not finite
    }
    store_double(quantized, p.z.dtype, to + d * out.quantized.channel_stride, double(e));
  }
  return error;
}

// The rows of one group, and the sum of all groups from whoever comes last. `bytes`: where its shared memory begins.
template <class Block>
VQ_BOTH void gather_group(Block& block, const Call& call, int64_t head, int64_t group, int bytes) {
  const bool wide = call.problem.z.dtype == DType::f64 || call.problem.codebook.dtype == DType::f64;
  double error = wide ? gather_rows<double>(block, call, head, group) : gather_rows<float>(block, call, head, group);
  error = sum_of_block(block, error, bytes);
  const int total = int(call.problem.z.heads) * call.plan.row_groups;
  const auto ticket = block.template shared<int>(bytes + kFinishThreads / kWarp * 8);
  if (block.thread() == 0) {
    call.operands.partial_error[head * call.plan.row_groups + group] = error;
    fence_globally(block);
    ticket.set(0, add_globally(block, call.operands.ticket, 1));
  }
  block.sync();
  if (ticket.get(0) != total - 1) return;
  fence_globally(block);
  double sum = 0.0;
  for (int i = block.thread(); i < total; i += kFinishThreads)
    sum += read_globally(block, call.operands.partial_error + i);
  sum = sum_of_block(block, sum, bytes);
  if (block.thread() == 0) *call.out.squared_error = sum;
}

template <class Block> VQ_BOTH void gather_block(Block& block, const Call& call) {
  gather_group(block, call, block.index_y(), block.index(), kSumsAt);
}

// Look-up alone, of indices that were given. Its workspace: a ticket, which must be zero, then the partial sums.
constexpr int64_t kTicketBytes = 256;

inline int64_t lookup_bytes(const Problem& problem) {
  return kTicketBytes + problem.z.heads * plan_of(problem, 1).row_groups * 8;
}

inline Call lookup_call(const Problem& problem, const Output& out, char* workspace) {
  Call call = {problem, plan_of(problem, 1), {}, out};
  call.operands.ticket = reinterpret_cast<int*>(workspace);
  call.operands.partial_error = reinterpret_cast<double*>(workspace + kTicketBytes);
  return call;
}

}  // namespace cuda
}  // namespace vqkernels
