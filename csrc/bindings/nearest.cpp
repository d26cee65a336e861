// vqkernels::nearest on the CPU: one packed codebook per head, rows shared out over threads.
#include "../cpu/codebook_cache.h"
#include "../cpu/nearest.h"

#include <atomic>

#include "../cpu/kernels.h"
#include "views.h"

namespace vqkernels {

// -> indices int64 of z's shape without channels, and the number of unmasked rows that the filter decided, () int64.
std::tuple<Tensor, Tensor> nearest_cpu(const Tensor& z_in, const Tensor& codebook_in, std::optional<Tensor> mask,
                                       int64_t channel_dim, std::string metric, std::string precision) {
  const bool batched = is_batched(codebook_in), certified = precision != "fast";
  const Tensor z = mergeable(z_in, channel_dim, batched), codebook = torch::stable::contiguous(codebook_in);
  if (mask) mask = torch::stable::contiguous(*mask);
  const Layout layout = layout_of(z, channel_dim, batched);
  check_search(layout, codebook, mask);
  const Sweep& sweep = active().sweep;
  const int64_t rows = layout.rows();
  Tensor indices = torch::stable::empty(row_sizes(z, channel_dim), ScalarType::Long);
  Tensor decided = torch::stable::empty({}, ScalarType::Long);
  std::atomic<int64_t> total{0};

  for (int64_t head = 0; head < (rows > 0 ? layout.heads : 0); ++head) {
    const DefaultArithmetic arithmetic;
    const Rows view = rows_of(z, layout, head);
    const auto searched = search_codebook(codes_of(codebook, head), view.dtype, metric_of(metric), certified, sweep);
    const PackedCodebook& packed = searched->packed();
    const bool* kept = mask ? static_cast<const bool*>(mask->const_data_ptr()) + head * rows : nullptr;
    const auto integers = searched->integers(integer_row_norm(view, packed, kept, certified), in_parallel);
    int64_t* index = static_cast<int64_t*>(indices.mutable_data_ptr()) + head * rows;
    const int64_t step = task_rows(rows, kChunk), tasks = (rows + step - 1) / step;
    parallel_for(tasks, 1, [&](int64_t first, int64_t last) {
      NearestSearch search(view, packed, *integers, certified);
      bool finite[kChunk];
      for (int64_t begin = first * step; begin < std::min(last * step, rows); begin += step)
        total += search(begin, std::min(begin + step, rows), kept ? kept + begin : nullptr, index + begin, finite);
    });
  }
  *static_cast<int64_t*>(decided.mutable_data_ptr()) = total;
  return {indices, decided};
}

STABLE_TORCH_LIBRARY_IMPL(vqkernels, CPU, m) { m.impl("nearest", TORCH_BOX(&nearest_cpu)); }

}  // namespace vqkernels
