// vqkernels::sample on the CPU: panels of rows shared out over threads.
#include "../cpu/sample.h"

#include "../cpu/counter.h"
#include "views.h"

namespace vqkernels {

// -> indices int64 of z's shape without channels. seed is a 0-d int64; the r-th row of a head, in row-major order, has
// the number row_offset + r.
Tensor sample_cpu(const Tensor& z_in, const Tensor& codebook_in, const Tensor& seed, std::optional<Tensor> mask,
                  int64_t channel_dim, std::string metric, const Tensor& temperature_in, int64_t row_offset) {
  const bool batched = is_batched(codebook_in);
  const Tensor z = mergeable(z_in, channel_dim, batched), codebook = torch::stable::contiguous(codebook_in);
  if (mask) mask = torch::stable::contiguous(*mask);
  const Layout layout = layout_of(z, channel_dim, batched);
  check_search(layout, codebook, mask);
  STD_TORCH_CHECK(seed.scalar_type() == ScalarType::Long && seed.numel() == 1, "seed must be one int64");
  const double temperature = temperature_of(temperature_in);
  const int64_t rows = layout.rows(), panels = (rows + kSampleRows - 1) / kSampleRows;
  Tensor indices = torch::stable::empty(row_sizes(z, channel_dim), ScalarType::Long);
  for (int64_t head = 0; head < (rows > 0 ? layout.heads : 0); ++head) {
    const Rows view = rows_of(z, layout, head);
    const SampleCodes codes(codes_of(codebook, head), metric_of(metric));
    const uint64_t start = stream_start(*static_cast<const int64_t*>(seed.const_data_ptr()), head);
    const bool* kept = mask ? static_cast<const bool*>(mask->const_data_ptr()) + head * rows : nullptr;
    int64_t* index = static_cast<int64_t*>(indices.mutable_data_ptr()) + head * rows;
    parallel_for(panels, 1, [&](int64_t first, int64_t last) {
      for (int64_t begin = first * kSampleRows; begin < std::min(last * kSampleRows, rows); begin += kSampleRows)
        sample_rows(view, codes, temperature, start, row_offset + begin, begin, std::min(begin + kSampleRows, rows),
                    kept ? kept + begin : nullptr, index + begin);
    });
  }
  return indices;
}

STABLE_TORCH_LIBRARY_IMPL(vqkernels, CPU, m) { m.impl("sample", TORCH_BOX(&sample_cpu)); }

}  // namespace vqkernels
