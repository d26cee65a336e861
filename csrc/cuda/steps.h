// The launches of one call in their order, for whatever launches them: the GPU (nearest.cu) or the executor of the
// tests.
//
//   pack      codes and rows to fp16 operands, counters to zero
//   search    the candidate pass
//   finish    for few rows, everything else in one launch: the whole step is three
// or, for many,
//   resolve   what the certificate decides
//   rescore   float64 for the rest
//   gather    look-up and squared error, if asked for
#pragma once
#include "problem.h"

namespace vqkernels {
namespace cuda {

inline SearchArguments search_arguments(const Call& call) {
  const Operands& o = call.operands;
  const Plan& plan = call.plan;
  return {o.rows,
          o.codes,
          o.half_norms,
          o.beta,
          o.best,
          o.second,
          o.group,
          plan.padded_rows,
          plan.padded_codes,
          plan.padded,
          int(call.problem.z.heads),
          plan.splits,
          plan.tiles,
          plan.tiles_per_split};
}

// Blocks of the kernels that walk over what there is: eight per multiprocessor, or fewer.
inline int64_t walking_blocks(const Plan& plan, int processors) {
  return plan.row_groups < 8 * int64_t(processors) ? plan.row_groups : 8 * int64_t(processors);
}

template <class Launcher> void run_steps(Launcher& launch, const Call& call, int processors) {
  const Plan& plan = call.plan;
  if (plan.rows == 0 || call.problem.z.heads == 0) {  // quantized has no data then: only the sums are left to write
    launch.zero(call.operands.decided);
    if (call.out.squared_error != nullptr) launch.zero(call.out.squared_error);
    return;
  }
  const int64_t heads = call.problem.z.heads, walking = walking_blocks(plan, processors);
  launch.pack(call, plan.code_parts + plan.row_parts, heads);
  launch.search(search_arguments(call), int64_t(plan.padded_rows / kSearchRows) * plan.splits, heads);
  if (plan.fused) {
    launch.finish(call, plan.row_groups, heads);
    return;
  }
  launch.resolve(call, walking, heads);
  launch.rescore(call, walking, heads);
  if (call.out.quantized.data != nullptr) launch.gather(call, plan.row_groups, heads);
}

}  // namespace cuda
}  // namespace vqkernels
