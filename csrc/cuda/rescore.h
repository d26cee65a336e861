// The contract itself, in float64, for the rows that the certificate left open.
//
// 16 rows at a time, four warps that share the codes out: the candidate scores are computed again, on the tensor core
// and straight from global memory, and compared with each row's limit. The few codes that pass are scored under the
// contract by the lane that found them, sequentially over the channels, subtraction, multiplication and addition
// rounded separately. Ties: a lane's codes ascend and the comparison is by (value, code), so the lowest index stays
// whoever found it. A value that is NaN or infinite counts as +inf: if all are, the lowest finite code is chosen.
// Which rows share a block depends on timing, no result does. Nothing of size K is written.
#pragma once
#include "problem.h"

namespace vqkernels {
namespace cuda {

constexpr int kNoCode = 0x7fffffff;
constexpr int kFinishWarps = kFinishThreads / kWarp;
// rows, limits; then per warp and row: value, code
constexpr int kListAt = 0, kLimitsAt = 64, kValuesAt = 128, kCodesAt = kValuesAt + kFinishWarps * kFinishRows * 8;
constexpr int kRescoreBytes = kCodesAt + kFinishWarps * kFinishRows * 4;

// Each rounded on its own, whatever the compiler was told.
#if defined(__CUDA_ARCH__)
VQ_BOTH double subtracted(double a, double b) { return __dsub_rn(a, b); }
VQ_BOTH double multiplied(double a, double b) { return __dmul_rn(a, b); }
VQ_BOTH double added(double a, double b) { return __dadd_rn(a, b); }
VQ_BOTH double divided(double a, double b) { return __ddiv_rn(a, b); }
VQ_BOTH double rooted(double a) { return __dsqrt_rn(a); }
#else  // compiled with contraction off
VQ_BOTH double subtracted(double a, double b) { return a - b; }
VQ_BOTH double multiplied(double a, double b) { return a * b; }
VQ_BOTH double added(double a, double b) { return a + b; }
VQ_BOTH double divided(double a, double b) { return a / b; }
VQ_BOTH double rooted(double a) { return sqrt(a); }
#endif

// What the contract minimises: the squared distance, or minus the inner product, for cosine by the code's length.
VQ_BOTH double contract_value(const Problem& p, int64_t head, int row, int code) {
  const int64_t z_at = row_offset(p, p.z, head, row),
                e_at = head * p.codebook.head_stride + code * p.codebook.code_stride;
  double total = 0.0, square = 0.0;
  for (int64_t d = 0; d < p.z.channels; ++d) {
    const double x = element<double>(p.z.data, p.z.dtype, z_at + d * p.z.channel_stride);
    const double e = element<double>(p.codebook.data, p.codebook.dtype, e_at + d * p.codebook.channel_stride);
    if (p.metric == Metric::euclidean) {
      const double difference = subtracted(x, e);
      total = added(total, multiplied(difference, difference));
    } else {
      total = added(total, multiplied(x, e));
      if (p.metric == Metric::cosine) square = added(square, multiplied(e, e));
    }
  }
  if (p.metric == Metric::euclidean) return total;
  if (p.metric == Metric::dot) return -total;
  const double root = rooted(square);
  return root == 0.0 ? 0.0 : -divided(total, root);
}

struct Candidate {
  double value;
  int code;
};

// Keeps the better of two by (value, code).
VQ_BOTH void keep(Candidate& best, double value, int code) {
  if (!(value < INFINITY)) value = INFINITY;
  if (value < best.value || (value == best.value && code < best.code)) best = {value, code};
}

// The 16 slots of the list in shared memory (row, or -1; and its limit), which a barrier has ordered; writes indices.
template <class Block> VQ_BOTH void rescore_rows(Block& block, const Call& call, int64_t head) {
  const Operands& o = call.operands;
  const Plan& plan = call.plan;
  const auto list = block.template shared<int>(kListAt);
  const auto limits = block.template shared<float>(kLimitsAt);
  const int lane = block.thread() % kWarp, warp = block.thread() / kWarp, quad = lane / 4, place = lane % 4;
  int row[2];
  float limit[2], scale[2];
  const uint32_t* left_at[2];
  for (int h = 0; h < 2; ++h) {
    row[h] = list.get(quad + 8 * h);
    limit[h] = limits.get(quad + 8 * h);
    const int64_t at = head * plan.padded_rows + (row[h] < 0 ? 0 : row[h]);
    scale[h] = o.beta[at];
    left_at[h] = reinterpret_cast<const uint32_t*>(o.rows + at * plan.padded) + place;
  }
  Candidate best[2] = {{INFINITY, kNoCode}, {INFINITY, kNoCode}};
  for (int tile = warp; tile < plan.padded_codes / kProductCodes; tile += kFinishWarps) {
    const int64_t first = head * plan.padded_codes + int64_t(tile) * kProductCodes;
    const uint32_t* right_at = reinterpret_cast<const uint32_t*>(o.codes + (first + quad) * plan.padded) + place;
    float sum[4] = {};
    for (int k = 0; k < plan.padded / 2; k += kProductDepth / 2) {  // in words of two channels
      const uint32_t left[4] = {left_at[0][k], left_at[1][k], left_at[0][k + 4], left_at[1][k + 4]};
      multiply(block, sum, left, right_at[k], right_at[k + 4]);
    }
    VQ_ROLLED
    for (int i = 0; i < 4; ++i) {
      const int h = i >> 1, code = tile * kProductCodes + 2 * place + (i & 1);
      const float half = o.half_norms[head * plan.padded_codes + code];
      const float product = i == 0 ? sum[0] : i == 1 ? sum[1] : i == 2 ? sum[2] : sum[3];
      const float score = half - (h == 0 ? scale[0] : scale[1]) * product;
      const int of = h == 0 ? row[0] : row[1];
      if (of < 0 || !(half < INFINITY) || score > (h == 0 ? limit[0] : limit[1])) continue;
      const double value = contract_value(call.problem, head, of, code);
      if (h == 0) keep(best[0], value, code);
      else keep(best[1], value, code);
    }
    block.sync_warp();
  }
  const auto values = block.template shared<double>(kValuesAt);
  const auto codes = block.template shared<int>(kCodesAt);
  for (int h = 0; h < 2; ++h) {
    for (int lanes = 1; lanes < 4; lanes *= 2) {
      const double value = block.shuffle_xor(best[h].value, lanes);
      keep(best[h], value, block.shuffle_xor(best[h].code, lanes));
    }
    if (place == 0) {
      values.set(warp * kFinishRows + quad + 8 * h, best[h].value);
      codes.set(warp * kFinishRows + quad + 8 * h, best[h].code);
    }
  }
  block.sync();
  if (block.thread() < kFinishRows && list.get(block.thread()) >= 0) {
    Candidate all = {INFINITY, kNoCode};
    for (int w = 0; w < kFinishWarps; ++w)
      keep(all, values.get(w * kFinishRows + block.thread()), codes.get(w * kFinishRows + block.thread()));
    index_of(call.problem, call.out, head, list.get(block.thread())) = all.code == kNoCode ? 0 : all.code;
  }
}

// Walks the device-side list of open rows, 16 at a time.
template <class Block> VQ_BOTH void rescore_block(Block& block, const Call& call, int64_t parts) {
  const int64_t head = block.index_y();
  const int open = call.operands.open[head];
  const auto list = block.template shared<int>(kListAt);
  const auto limits = block.template shared<float>(kLimitsAt);
  for (int64_t first = block.index() * kFinishRows; first < open; first += parts * kFinishRows) {
    block.sync();
    if (block.thread() < kFinishRows) {
      const int64_t slot = first + block.thread();
      const int row = slot < open ? call.operands.list[head * call.plan.rows + slot] : -1;
      list.set(block.thread(), row);
      limits.set(block.thread(), row < 0 ? 0.0f : call.operands.limit[head * call.plan.padded_rows + row]);
    }
    block.sync();
    rescore_rows(block, call, head);
  }
}

}  // namespace cuda
}  // namespace vqkernels
