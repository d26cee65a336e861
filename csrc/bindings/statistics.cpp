// vqkernels::statistics on the CPU: counts and sums of the rows of each code.
#include "../cpu/statistics.h"

#include <atomic>

#include "segments.h"

namespace vqkernels {

// indices int64 in [-1, codebook_size) and mask of z's shape without channels -> counts (heads, codebook_size) int64
// and sums (heads, codebook_size, channels) float32, or float64 where z is; one head unless `batched`.
std::tuple<Tensor, Tensor> statistics_cpu(const Tensor& z_in, const Tensor& indices_in, int64_t codebook_size,
                                          std::optional<Tensor> mask, int64_t channel_dim, bool batched) {
  const Tensor z = mergeable(z_in, channel_dim, batched), indices = torch::stable::contiguous(indices_in);
  if (mask) mask = torch::stable::contiguous(*mask);
  const Layout layout = layout_of(z, channel_dim, batched);
  const int64_t rows = layout.rows();
  STD_TORCH_CHECK(indices.scalar_type() == ScalarType::Long && indices.numel() == layout.heads * rows,
                  "indices must be int64 with one element per row");
  Statistics out = empty_statistics(z, layout, codebook_size);
  std::vector<int32_t> code(rows);
  std::atomic<bool> in_range{true};
  for (int64_t head = 0; head < layout.heads; ++head) {
    const Rows view = rows_of(z, layout, head);
    const int64_t* index = static_cast<const int64_t*>(indices.const_data_ptr()) + head * rows;
    const bool* kept = mask ? static_cast<const bool*>(mask->const_data_ptr()) + head * rows : nullptr;
    parallel_for(rows, 1024, [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row) {
        const bool counted = index[row] >= 0 && (kept == nullptr || kept[row]);
        if (counted && index[row] >= codebook_size) in_range = false;
        code[row] = counted && index[row] < codebook_size && finite_row(view, row) ? int32_t(index[row]) : -1;
      }
    });
    STD_TORCH_CHECK(in_range, "indices hold a code that is not below codebook_size = ", codebook_size);
    write_statistics(view, code, codebook_size, head, out);
  }
  return {out.counts, out.sums};
}

STABLE_TORCH_LIBRARY_IMPL(vqkernels, CPU, m) { m.impl("statistics", TORCH_BOX(&statistics_cpu)); }

}  // namespace vqkernels
