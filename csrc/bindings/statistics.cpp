// vqkernels::statistics on the CPU: counts and sums of the rows of each code.
#include "../cpu/statistics.h"

#include <atomic>

#include "segments.h"

namespace vqkernels {

// z (batch, heads, positions, channels), indices (batch, heads, positions) int64 in [-1, codebook_size), mask likewise
// -> counts (heads, codebook_size) int64, sums (heads, codebook_size, channels) float32, or float64 where z is.
std::tuple<Tensor, Tensor> statistics_cpu(const Tensor& z, const Tensor& indices, int64_t codebook_size,
                                          std::optional<Tensor> mask) {
  STD_TORCH_CHECK(z.dim() == 4 && indices.is_contiguous() && indices.scalar_type() == ScalarType::Long &&
                      indices.numel() == z.size(0) * z.size(1) * z.size(2),
                  "indices must be contiguous int64 (batch, heads, positions)");
  const int64_t rows = z.size(0) * z.size(2);
  Statistics out = empty_statistics(z, codebook_size);
  const int64_t* index = static_cast<const int64_t*>(indices.const_data_ptr());
  const bool* masked = mask ? static_cast<const bool*>(mask->const_data_ptr()) : nullptr;
  std::vector<int32_t> code(rows);
  std::atomic<bool> in_range{true};
  for (int64_t head = 0; head < z.size(1); ++head) {
    const Rows view = rows_of(z, head);
    const RowSlots slots = slots_of(z, head);
    parallel_for(rows, 1024, [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row) {
        const int64_t k = index[slots(row)];
        const bool counted = k >= 0 && (masked == nullptr || masked[slots(row)]);
        if (counted && k >= codebook_size) in_range = false;
        code[row] = counted && k < codebook_size && finite_row(view, row) ? int32_t(k) : -1;
      }
    });
    STD_TORCH_CHECK(in_range, "indices hold a code that is not below codebook_size = ", codebook_size);
    write_statistics(view, code, codebook_size, head, out);
  }
  return {out.counts, out.sums};
}

STABLE_TORCH_LIBRARY_IMPL(vqkernels, CPU, m) { m.impl("statistics", TORCH_BOX(&statistics_cpu)); }

}  // namespace vqkernels
