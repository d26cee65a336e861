// vqkernels::quantize and its backward on the CPU: search, look-up, squared error and statistics of a chunk of rows
// while it is in cache.
#include "../cpu/quantize.h"

#include "../cpu/nearest.h"
#include "segments.h"

namespace vqkernels {

// -> quantized (z's shape, dtype and layout), indices (batch, heads, positions) int64, squared_error () float64,
// counts (heads, size) int64 and sums (heads, size, channels), both empty unless `statistics`.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> quantize_cpu(const Tensor& z, const Tensor& codebook,
                                                                std::optional<Tensor> mask, std::string metric,
                                                                std::string precision, bool statistics) {
  check_search(z, codebook, mask);
  const Sweep& sweep = active_sweep();
  const bool certified = precision != "fast";
  const int64_t rows = z.size(0) * z.size(2), heads = z.size(1), size = codebook.size(1);
  Tensor quantized = torch::stable::empty_like(z);
  Tensor indices = torch::stable::empty({z.size(0), heads, z.size(2)}, ScalarType::Long);
  Tensor squared_error = torch::stable::empty({}, ScalarType::Double);
  Statistics out = statistics ? empty_statistics(z, size)
                              : Statistics{torch::stable::empty({0}, ScalarType::Long),
                                           torch::stable::empty({0}, z.scalar_type() == ScalarType::Double
                                                                         ? ScalarType::Double
                                                                         : ScalarType::Float)};
  int64_t* index_out = static_cast<int64_t*>(indices.mutable_data_ptr());
  const bool* masked = mask ? static_cast<const bool*>(mask->const_data_ptr()) : nullptr;
  std::vector<double> partial((rows + kBlock - 1) / kBlock);
  std::vector<int32_t> code(statistics ? rows : 0);
  double error = 0.0;

  for (int64_t head = 0; head < heads; ++head) {
    const Rows view = rows_of(z, head);
    const Codes codes = codes_of(codebook, head);
    const RowsOut target = rows_out_of(quantized, head);
    const RowSlots slots = slots_of(z, head);
    if (rows > 0) {
      const DefaultArithmetic arithmetic;
      const PackedCodebook packed(codes, view.dtype, metric_of(metric), certified, sweep);
      const int64_t step = task_rows(rows, kChunk), tasks = (rows + step - 1) / step;
      parallel_for(tasks, 1, [&](int64_t first, int64_t last) {
        NearestSearch search(view, packed, certified);
        int64_t index[kChunk];
        bool mask_rows[kChunk], finite[kChunk];
        for (int64_t task = first; task < last; ++task) {
          const int64_t begin = task * step, end = std::min(begin + step, rows);
          if (masked != nullptr) gather_slots(masked, slots, begin, end, mask_rows);
          search(begin, end, masked != nullptr ? mask_rows : nullptr, index, finite);
          scatter_slots(index, slots, begin, end, index_out);
          for (int64_t block = begin; block < end; block += kBlock)
            partial[block / kBlock] = gather_rows(view, codes, target, block, std::min(block + kBlock, end),
                                                  index + (block - begin), finite + (block - begin));
          for (int64_t row = begin; statistics && row < end; ++row)
            code[row] = finite[row - begin] ? int32_t(index[row - begin]) : -1;
        }
      });
    }
    for (double part : partial) error += part;
    if (statistics) write_statistics(view, code, size, head, out);
  }
  *static_cast<double*>(squared_error.mutable_data_ptr()) = error;
  return {quantized, indices, squared_error, out.counts, out.sums};
}

// Gradients of quantized (straight-through), codebook_loss and commitment_loss, both losses being the mean of (z - e)^2
// over the elements of the rows with index >= 0. grad_codebook is empty unless `codebook_gradient`.
std::tuple<Tensor, Tensor> quantize_backward_cpu(const Tensor& grad_quantized, const Tensor& grad_codebook_loss,
                                                 const Tensor& grad_commitment_loss, const Tensor& z,
                                                 const Tensor& codebook, const Tensor& indices,
                                                 bool needs_codebook_gradient) {
  check_search(z, codebook, std::nullopt);
  const auto scalar = [](const Tensor& x) {
    return dtype_of(x) == DType::f64 ? *static_cast<const double*>(x.const_data_ptr())
                                     : double(*static_cast<const float*>(x.const_data_ptr()));
  };
  const int64_t rows = z.size(0) * z.size(2), heads = z.size(1), size = codebook.size(1);
  const int64_t* index_in = static_cast<const int64_t*>(indices.const_data_ptr());
  const int64_t unmasked = rows * heads - std::count(index_in, index_in + rows * heads, int64_t(-1));
  const double mean = 2.0 / (double(std::max<int64_t>(unmasked, 1)) * double(z.size(3)));
  const double commitment = scalar(grad_commitment_loss) * mean, loss = scalar(grad_codebook_loss) * mean;

  Tensor grad_z = torch::stable::empty_like(z);
  Tensor grad_codebook = needs_codebook_gradient
                             ? torch::stable::empty_like(codebook)
                             : torch::stable::empty({0}, codebook.scalar_type());
  std::vector<int32_t> code(rows);
  for (int64_t head = 0; head < heads; ++head) {
    const Rows view = rows_of(z, head), incoming = rows_of(grad_quantized, head);
    const Codes codes = codes_of(codebook, head);
    const RowsOut target = rows_out_of(grad_z, head);
    const RowSlots slots = slots_of(z, head);
    parallel_for((rows + kChunk - 1) / kChunk, 1, [&](int64_t first, int64_t last) {
      int64_t index[kChunk];
      bool finite[kChunk];
      for (int64_t begin = first * kChunk; begin < std::min(last * kChunk, rows); begin += kChunk) {
        const int64_t end = std::min(begin + kChunk, rows);
        gather_slots(index_in, slots, begin, end, index);
        gradient_rows(view, codes, incoming, commitment, target, begin, end, index, finite);
        for (int64_t row = begin; row < end; ++row)
          code[row] = index[row - begin] >= 0 && finite[row - begin] ? int32_t(index[row - begin]) : -1;
      }
    });
    if (!needs_codebook_gradient) continue;
    const Segments segments = group_by_code(code.data(), rows, size);
    char* out = static_cast<char*>(grad_codebook.mutable_data_ptr()) +
                head * size * z.size(3) * element_size(codes.dtype);
    for_code_ranges(segments, [&](int64_t first, int64_t last) {
      codebook_gradient(view, codes, loss, segments, first, last, out);
    });
  }
  return {grad_z, grad_codebook};
}

STABLE_TORCH_LIBRARY_IMPL(vqkernels, CPU, m) {
  m.impl("quantize", TORCH_BOX(&quantize_cpu));
  m.impl("quantize_backward", TORCH_BOX(&quantize_backward_cpu));
}

}  // namespace vqkernels
