// vqkernels::residual_quantize and its backward on the CPU: codebooks of all levels packed first, then chunks of rows
// shared out over threads, each chunk through every level; then the statistics, level after level, from one residual of
// z's size.
#include "../cpu/residual.h"

#include "../cpu/codebook_cache.h"
#include "../cpu/kernels.h"
#include "segments.h"

namespace vqkernels {
namespace {

constexpr int64_t kPilots = 128;  // rows that go ahead of the others, for the scales of the levels

// (Q, K, D) or (heads, Q, K, D): where each level's codes lie. One codebook expanded over the levels stays one.
struct Stack {
  Tensor tensor;
  int64_t heads, levels, size, channels;

  explicit Stack(const Tensor& codebooks) : tensor(codebooks) {
    const int64_t dims = codebooks.dim();
    STD_TORCH_CHECK(dims == 3 || dims == 4, "codebooks must have 3 or 4 dimensions");
    heads = dims == 4 ? codebooks.size(0) : 1, levels = codebooks.size(dims - 3);
    size = codebooks.size(dims - 2), channels = codebooks.size(dims - 1);
    STD_TORCH_CHECK(levels > 0 && size > 0 && channels > 0, "the codebooks are empty");
    if (codebooks.stride(dims - 1) != 1 || codebooks.stride(dims - 2) != channels)
      tensor = torch::stable::contiguous(codebooks);
  }

  bool batched() const { return tensor.dim() == 4; }
  Codes codes(int64_t head, int64_t level) const {
    const DType dtype = dtype_of(tensor);
    const int64_t dims = tensor.dim();
    const int64_t offset = level * tensor.stride(dims - 3) + (batched() ? head * tensor.stride(0) : 0);
    return {static_cast<const char*>(tensor.const_data_ptr()) + offset * element_size(dtype), dtype, size, channels};
  }
};

void check_stack(const Stack& stack, const Layout& layout) {
  STD_TORCH_CHECK(layout.channels == stack.channels, "z and codebooks differ in channels");
  STD_TORCH_CHECK(!stack.batched() || layout.heads == stack.heads, "z and codebooks differ in heads");
}

// One head's codebooks, packed. How a level is packed depends on the size of its residuals, which a few rows that go
// through the levels ahead of the others tell; what they tell changes the speed alone.
class PackedStack {
 public:
  PackedStack(const Rows& z, const int64_t* passed, const Stack& stack, int64_t head, Metric metric, bool certified) {
    const Sweep& sweep = active().sweep;
    const DType type = residual_type(z.dtype);
    searched_.resize(stack.levels);
    parallel_for(stack.levels, 1, [&](int64_t first, int64_t last) {
      for (int64_t q = first; q < last; ++q)
        searched_[q] = search_codebook(stack.codes(head, q), type, metric, certified, sweep);
    });
    const int64_t rows = z.count(), channels = z.channels;
    const int64_t pilots = std::min(rows, std::min(kPilots, std::max<int64_t>(32, rows / 16)));
    std::vector<double> residual(pilots * channels);  // raw storage, float or double
    std::vector<int64_t> index(pilots);
    std::vector<int32_t> code(pilots);
    const auto kept = std::make_unique<bool[]>(pilots), finite = std::make_unique<bool[]>(pilots);
    const Rows view{residual.data(), type, 1, pilots, channels, 0, channels, 1};
    char* out = reinterpret_cast<char*>(residual.data());
    const auto row_of = [&](int64_t i) { return i * rows / pilots; };
    for (int64_t i = 0; i < pilots; ++i)
      read_residuals(z, row_of(i), row_of(i) + 1, passed ? passed + row_of(i) : nullptr,
                     out + i * channels * element_size(type));
    for (int64_t q = 0; q < stack.levels; ++q) {
      const PackedCodebook& packed = searched_[q]->packed();
      for (int64_t i = 0; i < pilots; ++i) kept[i] = passed == nullptr || passed[row_of(i)] > q;
      integers_.push_back(searched_[q]->integers(integer_row_norm(view, packed, kept.get(), certified), in_parallel));
      levels_.push_back({stack.codes(head, q), &packed, integers_.back().get()});
      if (q + 1 == stack.levels) break;
      NearestSearch search(view, packed, *integers_.back(), certified);
      search(0, pilots, kept.get(), index.data(), finite.get());
      for (int64_t i = 0; i < pilots; ++i) code[i] = int32_t(index[i]);
      subtract_codes(levels_[q].codes, type, pilots, code.data(), residual.data());
    }
  }

  const std::vector<ResidualLevel>& levels() const { return levels_; }

 private:
  std::vector<std::shared_ptr<const SearchCodebook>> searched_;
  std::vector<std::shared_ptr<const IntegerCodebook>> integers_;
  std::vector<ResidualLevel> levels_;
};

// Calls f(level, rows as residuals of that level, code of each row) for one level after the other; code (levels, rows),
// negative where a row counts nowhere from this level on.
template <class F>
void for_residuals(const Rows& z, const Stack& stack, int64_t head, const std::vector<int32_t>& code, const F& f) {
  const int64_t rows = z.count(), channels = z.channels;
  const DType type = residual_type(z.dtype);
  const auto residual = std::make_unique<char[]>(rows * channels * element_size(type));
  const auto at = [&](int64_t row) { return residual.get() + row * channels * element_size(type); };
  parallel_for((rows + kChunk - 1) / kChunk, 1, [&](int64_t first, int64_t last) {
    for (int64_t begin = first * kChunk; begin < std::min(last * kChunk, rows); begin += kChunk) {
      const int64_t end = std::min(begin + kChunk, rows);
      int64_t passed[kChunk];
      for (int64_t row = begin; row < end; ++row) passed[row - begin] = code[row] >= 0;  // the others are never summed
      read_residuals(z, begin, end, passed, at(begin));
    }
  });
  const Rows view{residual.get(), type, 1, rows, channels, 0, channels, 1};
  for (int64_t q = 0; q < stack.levels; ++q) {
    const std::vector<int32_t> level(code.begin() + q * rows, code.begin() + (q + 1) * rows);
    f(q, view, level);
    if (q + 1 == stack.levels) return;
    parallel_for((rows + kChunk - 1) / kChunk, 1, [&](int64_t first, int64_t last) {
      const int64_t begin = first * kChunk, end = std::min(last * kChunk, rows);
      subtract_codes(stack.codes(head, q), type, end - begin, &level[begin], at(begin));
    });
  }
}

}  // namespace

// -> quantized (z's shape, dtype and layout), indices int64 (z's sizes without channels, Q), squared_errors (heads, Q)
// float64, counts (heads, Q, K) int64 and sums (heads, Q, K, D), both empty unless `statistics`. levels: int64, one per
// row.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> residual_quantize_cpu(const Tensor& z_in, const Tensor& codebooks,
                                                                         std::optional<Tensor> levels,
                                                                         int64_t channel_dim, std::string metric,
                                                                         std::string precision, bool statistics) {
  const Stack stack(codebooks);
  const bool batched = stack.batched(), certified = precision != "fast";
  const Tensor z = mergeable(z_in, channel_dim, batched);
  if (levels) levels = torch::stable::contiguous(*levels);
  const Layout layout = layout_of(z, channel_dim, batched);
  check_stack(stack, layout);
  const int64_t rows = layout.rows(), number = stack.levels, heads = layout.heads;
  STD_TORCH_CHECK(!levels || (levels->scalar_type() == ScalarType::Long && levels->numel() == heads * rows),
                  "levels must be int64 with one element per row");
  Tensor quantized = torch::stable::empty_like(z);
  const Tensor written = mergeable(quantized, channel_dim, batched);  // a twin of it where z's axes interleave
  const Layout out_layout = layout_of(written, channel_dim, batched);
  std::vector<int64_t> sizes = row_sizes(z, channel_dim);
  sizes.push_back(number);
  Tensor indices = torch::stable::empty(sizes, ScalarType::Long);
  Tensor squared_errors = torch::stable::empty({heads, number}, ScalarType::Double);
  Tensor counts = torch::stable::empty({0}, ScalarType::Long), sums = torch::stable::empty({0}, sums_type(z));
  if (statistics) {
    counts = torch::stable::empty({heads, number, stack.size}, ScalarType::Long);
    sums = torch::stable::empty({heads, number, stack.size, stack.channels}, sums_type(z));
  }
  Statistics out{counts, sums};
  const int64_t blocks = (rows + kBlock - 1) / kBlock;
  std::vector<double> partial(number * blocks);
  std::vector<int32_t> code(statistics ? number * rows : 0);

  for (int64_t head = 0; head < heads; ++head) {
    const Rows view = rows_of(z, layout, head);
    if (rows > 0) {
      const DefaultArithmetic arithmetic;
      const RowsOut target = rows_out_of(written, out_layout, head);
      const int64_t* passed = levels ? static_cast<const int64_t*>(levels->const_data_ptr()) + head * rows : nullptr;
      int64_t* index = static_cast<int64_t*>(indices.mutable_data_ptr()) + head * rows * number;
      const PackedStack packed(view, passed, stack, head, metric_of(metric), certified);
      const int64_t step = task_rows(rows, kChunk), tasks = (rows + step - 1) / step;
      parallel_for(tasks, 1, [&](int64_t first, int64_t last) {
        ResidualSearch search(view, packed.levels(), certified);
        for (int64_t begin = first * step; begin < std::min(last * step, rows); begin += step)
          search(view, begin, std::min(begin + step, rows), passed ? passed + begin : nullptr, target,
                 index + begin * number, partial.data() + begin / kBlock, blocks,
                 statistics ? code.data() + begin : nullptr, rows);
      });
    }
    double* errors = static_cast<double*>(squared_errors.mutable_data_ptr()) + head * number;
    for (int64_t q = 0; q < number; ++q) {
      errors[q] = 0.0;
      for (int64_t block = 0; block < blocks; ++block) errors[q] += partial[q * blocks + block];
    }
    if (statistics)
      for_residuals(view, stack, head, code, [&](int64_t q, const Rows& residuals, const std::vector<int32_t>& level) {
        write_statistics(residuals, level, stack.size, head * number + q, out);
      });
  }
  if (written.mutable_data_ptr() != quantized.mutable_data_ptr()) torch::stable::copy_(quantized, written);
  return {quantized, indices, squared_errors, out.counts, out.sums};
}

// Gradients of quantized (straight-through or rotated) and of the losses of every level, each the mean of (r_q - e_q)^2
// over the elements of the rows with an index >= 0 there. grad_codebooks is empty unless `needs_codebook_gradient`.
std::tuple<Tensor, Tensor> residual_quantize_backward_cpu(const Tensor& grad_quantized,
                                                          const Tensor& grad_codebook_losses,
                                                          const Tensor& grad_commitment_losses, const Tensor& z_in,
                                                          const Tensor& codebooks, const Tensor& indices_in,
                                                          int64_t channel_dim, std::string gradient,
                                                          bool needs_codebook_gradient) {
  const Gradient through = gradient_of(gradient);
  const Stack stack(codebooks);
  const bool batched = stack.batched();
  const Tensor z = mergeable(z_in, channel_dim, batched), incoming = mergeable(grad_quantized, channel_dim, batched);
  const Tensor indices = torch::stable::contiguous(indices_in);
  const Layout layout = layout_of(z, channel_dim, batched), in_layout = layout_of(incoming, channel_dim, batched);
  check_stack(stack, layout);
  STD_TORCH_CHECK(incoming.scalar_type() == z.scalar_type() && incoming.numel() == z.numel() &&
                      in_layout.channels == layout.channels && in_layout.heads == layout.heads,
                  "grad_quantized must have z's dtype and shape");
  const int64_t rows = layout.rows(), number = stack.levels, heads = layout.heads;
  const int64_t* all = static_cast<const int64_t*>(indices.const_data_ptr());
  STD_TORCH_CHECK(indices.scalar_type() == ScalarType::Long && indices.numel() == heads * rows * number &&
                      std::all_of(all, all + indices.numel(), [&](int64_t k) { return k >= -1 && k < stack.size; }),
                  "indices must be int64 codes, one per row and level");
  const Tensor loss_in = torch::stable::contiguous(grad_codebook_losses);
  const Tensor commitment_in = torch::stable::contiguous(grad_commitment_losses);
  const auto element = [](const Tensor& x, int64_t i) {
    return dtype_of(x) == DType::f64 ? static_cast<const double*>(x.const_data_ptr())[i]
                                     : double(static_cast<const float*>(x.const_data_ptr())[i]);
  };

  Tensor grad_z = torch::stable::empty_like(z);
  const Tensor written = mergeable(grad_z, channel_dim, batched);
  const Layout out_layout = layout_of(written, channel_dim, batched);
  const auto type = codebooks.scalar_type();
  std::vector<int64_t> sizes{number, stack.size, stack.channels};
  if (batched) sizes.insert(sizes.begin(), heads);
  if (!needs_codebook_gradient) sizes = {0};
  Tensor grad_codebooks = torch::stable::empty(sizes, type);
  std::vector<int32_t> code(needs_codebook_gradient ? number * rows : 0);
  for (int64_t head = 0; head < heads; ++head) {
    const Rows view = rows_of(z, layout, head), from = rows_of(incoming, in_layout, head);
    const RowsOut target = rows_out_of(written, out_layout, head);
    const int64_t* index = all + head * rows * number;
    std::vector<Codes> levels;
    std::vector<double> commitment, loss;
    for (int64_t q = 0; q < number; ++q) {
      int64_t unmasked = 0;
      for (int64_t row = 0; row < rows; ++row) unmasked += index[row * number + q] >= 0;
      const double mean = 2.0 / (double(std::max<int64_t>(unmasked, 1)) * double(layout.channels));
      commitment.push_back(element(commitment_in, head * number + q) * mean);
      loss.push_back(element(loss_in, head * number + q) * mean);
      levels.push_back(stack.codes(head, q));
    }
    parallel_for((rows + kBlock - 1) / kBlock, 1, [&](int64_t first, int64_t last) {
      for (int64_t begin = first * kBlock; begin < std::min(last * kBlock, rows); begin += kBlock)
        residual_gradient_rows(view, levels, from, through, commitment.data(), target, begin,
                               std::min(begin + kBlock, rows), index + begin * number,
                               needs_codebook_gradient ? code.data() + begin : nullptr, rows);
    });
    if (!needs_codebook_gradient) continue;
    const int64_t bytes = stack.size * stack.channels * element_size(dtype_of(codebooks));
    char* out = static_cast<char*>(grad_codebooks.mutable_data_ptr()) + head * number * bytes;
    for_residuals(view, stack, head, code, [&](int64_t q, const Rows& residuals, const std::vector<int32_t>& level) {
      const Segments segments = group_by_code(level.data(), rows, stack.size);
      run_segment_sum({residuals, &levels[q], loss[q], levels[q].dtype, out + q * bytes}, level, segments, stack.size);
    });
  }
  if (written.mutable_data_ptr() != grad_z.mutable_data_ptr()) torch::stable::copy_(grad_z, written);
  return {grad_z, grad_codebooks};
}

STABLE_TORCH_LIBRARY_IMPL(vqkernels, CPU, m) {
  m.impl("residual_quantize", TORCH_BOX(&residual_quantize_cpu));
  m.impl("residual_quantize_backward", TORCH_BOX(&residual_quantize_backward_cpu));
}

}  // namespace vqkernels
