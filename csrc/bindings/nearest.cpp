// vqkernels::nearest on the CPU: one packed codebook per head, rows shared out over threads.
#include "../cpu/nearest.h"

#include <atomic>

#include "views.h"

namespace vqkernels {

// Returns indices (batch, heads, positions) int64 and the number of unmasked rows that the filter decided, () int64.
std::tuple<Tensor, Tensor> nearest_cpu(const Tensor& z, const Tensor& codebook, std::optional<Tensor> mask,
                                       std::string metric, std::string precision) {
  check_search(z, codebook, mask);
  const Sweep& sweep = active_sweep();
  const bool certified = precision != "fast";
  const int64_t rows = z.size(0) * z.size(2);
  Tensor indices = torch::stable::empty({z.size(0), z.size(1), z.size(2)}, ScalarType::Long);
  Tensor decided = torch::stable::empty({}, ScalarType::Long);
  int64_t* out = static_cast<int64_t*>(indices.mutable_data_ptr());
  const bool* masked = mask ? static_cast<const bool*>(mask->const_data_ptr()) : nullptr;
  std::atomic<int64_t> total{0};

  for (int64_t head = 0; head < (rows > 0 ? z.size(1) : 0); ++head) {
    const Rows view = rows_of(z, head);
    const DefaultArithmetic arithmetic;
    const PackedCodebook packed(codes_of(codebook, head), view.dtype, metric_of(metric), certified, sweep);
    const RowSlots slots = slots_of(z, head);
    const int64_t step = task_rows(rows, kChunk), tasks = (rows + step - 1) / step;
    parallel_for(tasks, 1, [&](int64_t first, int64_t last) {
      NearestSearch search(view, packed, certified);
      int64_t index[kChunk];
      bool mask_rows[kChunk], finite[kChunk];
      for (int64_t task = first; task < last; ++task) {
        const int64_t begin = task * step, end = std::min(begin + step, rows);
        if (masked != nullptr) gather_slots(masked, slots, begin, end, mask_rows);
        total += search(begin, end, masked != nullptr ? mask_rows : nullptr, index, finite);
        scatter_slots(index, slots, begin, end, out);
      }
    });
  }
  *static_cast<int64_t*>(decided.mutable_data_ptr()) = total;
  return {indices, decided};
}

STABLE_TORCH_LIBRARY_IMPL(vqkernels, CPU, m) { m.impl("nearest", TORCH_BOX(&nearest_cpu)); }

}  // namespace vqkernels
