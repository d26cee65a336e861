// vqkernels::quantize and its backward on the CPU: search, look-up, squared error and statistics of a chunk of rows
// while it is in cache; vqkernels::lookup, the same without the search.
#include "../cpu/quantize.h"

#include "../cpu/codebook_cache.h"
#include "../cpu/kernels.h"
#include "../cpu/nearest.h"
#include "segments.h"

namespace vqkernels {

// Indices that are given rather than found: int64, contiguous, one per row, in [-1, size).
void check_indices(const Tensor& indices, const Layout& layout, const Tensor& codebook) {
  const int64_t size = codebook.size(codebook.dim() - 2), all = layout.heads * layout.rows();
  STD_TORCH_CHECK(indices.scalar_type() == ScalarType::Long && indices.numel() == all,
                  "indices must be int64 with one element per row");
  const int64_t* data = static_cast<const int64_t*>(indices.const_data_ptr());
  STD_TORCH_CHECK(std::all_of(data, data + all, [size](int64_t k) { return k >= -1 && k < size; }),
                  "indices hold a code out of range");
}

// -> quantized (z's shape, dtype and layout), indices int64 of z's shape without channels, squared_error () float64,
// counts (heads, size) int64 and sums (heads, size, channels), both empty unless `statistics`.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> quantize_cpu(const Tensor& z_in, const Tensor& codebook_in,
                                                                std::optional<Tensor> mask, int64_t channel_dim,
                                                                std::string metric, std::string precision,
                                                                bool statistics) {
  const bool batched = is_batched(codebook_in), certified = precision != "fast";
  const Tensor z = mergeable(z_in, channel_dim, batched), codebook = torch::stable::contiguous(codebook_in);
  if (mask) mask = torch::stable::contiguous(*mask);
  const Layout layout = layout_of(z, channel_dim, batched);
  check_search(layout, codebook, mask);
  const Sweep& sweep = active().sweep;
  const int64_t rows = layout.rows(), size = codebook.size(codebook.dim() - 2);
  Tensor quantized = torch::stable::empty_like(z);
  const Tensor written = mergeable(quantized, channel_dim, batched);  // a twin of it where z's axes interleave
  const Layout out_layout = layout_of(written, channel_dim, batched);
  Tensor indices = torch::stable::empty(row_sizes(z, channel_dim), ScalarType::Long);
  Tensor squared_error = torch::stable::empty({}, ScalarType::Double);
  Statistics out = statistics ? empty_statistics(z, layout, size) : no_statistics(z);
  std::vector<double> partial((rows + kBlock - 1) / kBlock);
  std::vector<int32_t> code(statistics ? rows : 0);
  double error = 0.0;

  for (int64_t head = 0; head < layout.heads; ++head) {
    const Rows view = rows_of(z, layout, head);
    if (rows > 0) {
      const DefaultArithmetic arithmetic;
      const Codes codes = codes_of(codebook, head);
      const RowsOut target = rows_out_of(written, out_layout, head);
      const bool* kept = mask ? static_cast<const bool*>(mask->const_data_ptr()) + head * rows : nullptr;
      int64_t* index = static_cast<int64_t*>(indices.mutable_data_ptr()) + head * rows;
      const auto searched = search_codebook(codes, view.dtype, metric_of(metric), certified, sweep);
      const PackedCodebook& packed = searched->packed();
      const auto integers = searched->integers(integer_row_norm(view, packed, kept, certified), in_parallel);
      const int64_t step = task_rows(rows, kChunk), tasks = (rows + step - 1) / step;
      parallel_for(tasks, 1, [&](int64_t first, int64_t last) {
        NearestSearch search(view, packed, *integers, certified);
        bool finite[kChunk];
        for (int64_t begin = first * step; begin < std::min(last * step, rows); begin += step) {
          const int64_t end = std::min(begin + step, rows);
          search(begin, end, kept ? kept + begin : nullptr, index + begin, finite);
          for (int64_t block = begin; block < end; block += kBlock)
            partial[block / kBlock] = gather_rows(view, codes, target, block, std::min(block + kBlock, end),
                                                  index + block, finite + (block - begin));
          for (int64_t row = begin; statistics && row < end; ++row)
            code[row] = finite[row - begin] ? int32_t(index[row]) : -1;
        }
      });
    }
    for (double part : partial) error += part;
    if (statistics) write_statistics(view, code, size, head, out);
  }
  if (written.mutable_data_ptr() != quantized.mutable_data_ptr()) torch::stable::copy_(quantized, written);
  *static_cast<double*>(squared_error.mutable_data_ptr()) = error;
  return {quantized, indices, squared_error, out.counts, out.sums};
}

// What quantize makes of rows whose indices are given, in [-1, size): quantized, squared_error, counts, sums. A row
// counts nowhere where its index is -1 or its mask false, and is not read then.
std::tuple<Tensor, Tensor, Tensor, Tensor> lookup_cpu(const Tensor& z_in, const Tensor& codebook_in,
                                                      const Tensor& indices_in, std::optional<Tensor> mask,
                                                      int64_t channel_dim, bool statistics) {
  const bool batched = is_batched(codebook_in);
  const Tensor z = mergeable(z_in, channel_dim, batched), codebook = torch::stable::contiguous(codebook_in);
  const Tensor indices = torch::stable::contiguous(indices_in);
  if (mask) mask = torch::stable::contiguous(*mask);
  const Layout layout = layout_of(z, channel_dim, batched);
  check_search(layout, codebook, mask);
  check_indices(indices, layout, codebook);
  const int64_t rows = layout.rows(), size = codebook.size(codebook.dim() - 2);
  Tensor quantized = torch::stable::empty_like(z);
  const Tensor written = mergeable(quantized, channel_dim, batched);
  const Layout out_layout = layout_of(written, channel_dim, batched);
  Tensor squared_error = torch::stable::empty({}, ScalarType::Double);
  Statistics out = statistics ? empty_statistics(z, layout, size) : no_statistics(z);
  std::vector<double> partial((rows + kBlock - 1) / kBlock);
  std::vector<int32_t> code(statistics ? rows : 0);
  double error = 0.0;

  for (int64_t head = 0; head < layout.heads; ++head) {
    const Rows view = rows_of(z, layout, head);
    const Codes codes = codes_of(codebook, head);
    const RowsOut target = rows_out_of(written, out_layout, head);
    const bool* kept = mask ? static_cast<const bool*>(mask->const_data_ptr()) + head * rows : nullptr;
    const int64_t* given = static_cast<const int64_t*>(indices.const_data_ptr()) + head * rows;
    parallel_for((rows + kBlock - 1) / kBlock, 8, [&](int64_t first, int64_t last) {
      bool finite[kBlock];
      int64_t index[kBlock];
      for (int64_t block = first; block < last; ++block) {
        const int64_t begin = block * kBlock, end = std::min(begin + kBlock, rows);
        for (int64_t row = begin; row < end; ++row)
          index[row - begin] = kept == nullptr || kept[row] ? given[row] : kMasked;
        mark_finite(view, begin, end, index, finite);
        partial[block] = gather_rows(view, codes, target, begin, end, index, finite);
        for (int64_t row = begin; statistics && row < end; ++row)
          code[row] = finite[row - begin] ? int32_t(index[row - begin]) : -1;
      }
    });
    for (double part : partial) error += part;
    if (statistics) write_statistics(view, code, size, head, out);
  }
  if (written.mutable_data_ptr() != quantized.mutable_data_ptr()) torch::stable::copy_(quantized, written);
  *static_cast<double*>(squared_error.mutable_data_ptr()) = error;
  return {quantized, squared_error, out.counts, out.sums};
}

// Gradients of quantized (straight-through or rotated), codebook_loss and commitment_loss, both losses being the mean
// of (z - e)^2 over the elements of the rows with index >= 0. grad_codebook is empty unless `needs_codebook_gradient`.
std::tuple<Tensor, Tensor> quantize_backward_cpu(const Tensor& grad_quantized, const Tensor& grad_codebook_loss,
                                                 const Tensor& grad_commitment_loss, const Tensor& z_in,
                                                 const Tensor& codebook_in, const Tensor& indices_in,
                                                 int64_t channel_dim, std::string gradient,
                                                 bool needs_codebook_gradient) {
  const Gradient through = gradient_of(gradient);
  const bool batched = is_batched(codebook_in);
  const Tensor z = mergeable(z_in, channel_dim, batched), codebook = torch::stable::contiguous(codebook_in);
  const Tensor incoming = mergeable(grad_quantized, channel_dim, batched);
  const Tensor indices = torch::stable::contiguous(indices_in);
  const Layout layout = layout_of(z, channel_dim, batched), in_layout = layout_of(incoming, channel_dim, batched);
  check_search(layout, codebook, std::nullopt);
  STD_TORCH_CHECK(incoming.scalar_type() == z.scalar_type() && incoming.numel() == z.numel() &&
                      in_layout.channels == layout.channels && in_layout.heads == layout.heads,
                  "grad_quantized must have z's dtype and shape");
  check_indices(indices, layout, codebook);
  const auto scalar = [](const Tensor& x) {
    return dtype_of(x) == DType::f64 ? *static_cast<const double*>(x.const_data_ptr())
                                     : double(*static_cast<const float*>(x.const_data_ptr()));
  };
  const int64_t rows = layout.rows(), size = codebook.size(codebook.dim() - 2);
  const int64_t* indices_data = static_cast<const int64_t*>(indices.const_data_ptr());
  const int64_t all = rows * layout.heads;
  const int64_t unmasked = all - std::count(indices_data, indices_data + all, int64_t(-1));
  const double mean = 2.0 / (double(std::max<int64_t>(unmasked, 1)) * double(layout.channels));
  const double commitment = scalar(grad_commitment_loss) * mean, loss = scalar(grad_codebook_loss) * mean;

  Tensor grad_z = torch::stable::empty_like(z);
  const Tensor written = mergeable(grad_z, channel_dim, batched);
  const Layout out_layout = layout_of(written, channel_dim, batched);
  Tensor grad_codebook =
      needs_codebook_gradient ? torch::stable::empty_like(codebook) : torch::stable::empty({0}, codebook.scalar_type());
  std::vector<int32_t> code(rows);
  for (int64_t head = 0; head < layout.heads; ++head) {
    const Rows view = rows_of(z, layout, head), from = rows_of(incoming, in_layout, head);
    const Codes codes = codes_of(codebook, head);
    const RowsOut target = rows_out_of(written, out_layout, head);
    const int64_t* index = indices_data + head * rows;
    parallel_for((rows + kChunk - 1) / kChunk, 1, [&](int64_t first, int64_t last) {
      bool finite[kChunk];
      for (int64_t begin = first * kChunk; begin < std::min(last * kChunk, rows); begin += kChunk) {
        const int64_t end = std::min(begin + kChunk, rows);
        gradient_rows(view, codes, from, through, commitment, target, begin, end, index + begin, finite);
        for (int64_t row = begin; row < end; ++row)
          code[row] = index[row] >= 0 && finite[row - begin] ? int32_t(index[row]) : -1;
      }
    });
    if (!needs_codebook_gradient) continue;
    const Segments segments = group_by_code(code.data(), rows, size);
    char* out = static_cast<char*>(grad_codebook.mutable_data_ptr()) +
                head * size * layout.channels * element_size(codes.dtype);
    run_segment_sum({view, &codes, loss, codes.dtype, out}, code, segments, size);
  }
  if (written.mutable_data_ptr() != grad_z.mutable_data_ptr()) torch::stable::copy_(grad_z, written);
  return {grad_z, grad_codebook};
}

STABLE_TORCH_LIBRARY_IMPL(vqkernels, CPU, m) {
  m.impl("quantize", TORCH_BOX(&quantize_cpu));
  m.impl("lookup", TORCH_BOX(&lookup_cpu));
  m.impl("quantize_backward", TORCH_BOX(&quantize_backward_cpu));
}

}  // namespace vqkernels
