// vqkernels::entropy and its backward on the CPU: views, zeros for what does not count, NaN for what is not finite.
#include <math.h>
#include <string.h>

#include "../cpu/kernels.h"
#include "views.h"

namespace vqkernels {
namespace {

// One number per element of a float32 or float64 tensor.
double get(const Tensor& x, int64_t i) {
  return dtype_of(x) == DType::f64 ? static_cast<const double*>(x.const_data_ptr())[i]
                                   : double(static_cast<const float*>(x.const_data_ptr())[i]);
}

void set(const Tensor& x, int64_t i, double value) {
  if (dtype_of(x) == DType::f64) static_cast<double*>(x.mutable_data_ptr())[i] = value;
  else static_cast<float*>(x.mutable_data_ptr())[i] = float(value);
}

void clear(const Tensor& x) {
  if (x.numel() > 0) memset(x.mutable_data_ptr(), 0, x.numel() * element_size(dtype_of(x)));
}

bool is_euclidean(const std::string& metric) {
  STD_TORCH_CHECK(metric == "euclidean" || metric == "dot", "metric must be 'euclidean' or 'dot', got '", metric, "'");
  return metric == "euclidean";
}

EntropyInputs inputs_of(const Tensor& z, const Layout& layout, const Tensor& codebook,
                        const std::optional<Tensor>& mask, int64_t head, const std::string& metric,
                        double temperature) {
  const bool* kept = mask ? static_cast<const bool*>(mask->const_data_ptr()) + head * layout.rows() : nullptr;
  return EntropyInputs(rows_of(z, layout, head), codes_of(codebook, head), kept, is_euclidean(metric), temperature,
                       in_parallel);
}

ScalarType result_type(const Tensor& z, const Tensor& codebook) {
  const bool wide = z.scalar_type() == ScalarType::Double || codebook.scalar_type() == ScalarType::Double;
  return wide ? ScalarType::Double : ScalarType::Float;
}

}  // namespace

// -> sample_entropy, codebook_entropy (heads) float64; row_entropy, log_partition (heads, rows) and mean_assignment
// (heads, size) float32, or float64 where an input is. log_partition is in units of log 2, without the row's own
// constant.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> entropy_cpu(const Tensor& z_in, const Tensor& codebook_in,
                                                               std::optional<Tensor> mask, int64_t channel_dim,
                                                               std::string metric, const Tensor& temperature_in) {
  const bool batched = is_batched(codebook_in);
  const Tensor z = mergeable(z_in, channel_dim, batched), codebook = torch::stable::contiguous(codebook_in);
  if (mask) mask = torch::stable::contiguous(*mask);
  const Layout layout = layout_of(z, channel_dim, batched);
  check_search(layout, codebook, mask);
  const double temperature = temperature_of(temperature_in);
  const int64_t rows = layout.rows(), size = codebook.size(codebook.dim() - 2);
  const ScalarType type = result_type(z, codebook);
  Tensor sample = torch::stable::empty({layout.heads}, ScalarType::Double);
  Tensor whole = torch::stable::empty({layout.heads}, ScalarType::Double);
  Tensor row_entropy = torch::stable::empty({layout.heads, rows}, type);
  Tensor log_partition = torch::stable::empty({layout.heads, rows}, type);
  Tensor mean = torch::stable::empty({layout.heads, size}, type);
  for (const Tensor& x : {row_entropy, log_partition, mean}) clear(x);
  for (int64_t head = 0; head < layout.heads; ++head) {
    const DefaultArithmetic arithmetic;
    const EntropyInputs inputs = inputs_of(z, layout, codebook, mask, head, metric, temperature);
    const Entropies found = inputs.in_float ? entropies(inputs, active().entropy, in_parallel)
                                            : entropies(inputs, kEntropyDouble, in_parallel);
    double sum = 0.0, of_mean = 0.0;
    for (size_t i = 0; i < inputs.row.size(); ++i) {
      sum += found.entropy[i];
      set(row_entropy, head * rows + inputs.row[i], found.entropy[i]);
      set(log_partition, head * rows + inputs.row[i], found.partition[i]);
    }
    for (size_t j = 0; j < inputs.code.size(); ++j) {
      const double m = found.mean[j];
      of_mean -= m > 0.0 ? m * log(m) : 0.0;
      set(mean, head * size + inputs.code[j], m);
    }
    const double poison = inputs.bad.empty() ? 0.0 : NAN;
    set(sample, head, sum / double(std::max<size_t>(inputs.row.size(), 1)) + poison);
    set(whole, head, of_mean + poison);
  }
  return {sample, whole, row_entropy, log_partition, mean};
}

// Gradients of z and of the codebook from those of both entropies, (heads) each. grad_codebook is empty unless wanted.
std::tuple<Tensor, Tensor> entropy_backward_cpu(const Tensor& grad_sample_in, const Tensor& grad_codebook_entropy_in,
                                                const Tensor& z_in, const Tensor& codebook_in,
                                                std::optional<Tensor> mask, const Tensor& row_entropy_in,
                                                const Tensor& log_partition_in, const Tensor& mean_in,
                                                int64_t channel_dim, std::string metric, const Tensor& temperature_in,
                                                bool codebook_gradient) {
  const bool batched = is_batched(codebook_in);
  const Tensor z = mergeable(z_in, channel_dim, batched), codebook = torch::stable::contiguous(codebook_in);
  if (mask) mask = torch::stable::contiguous(*mask);
  const Layout layout = layout_of(z, channel_dim, batched);
  check_search(layout, codebook, mask);
  const Tensor grad_sample = torch::stable::contiguous(grad_sample_in);
  const Tensor grad_whole = torch::stable::contiguous(grad_codebook_entropy_in);
  const Tensor row_entropy = torch::stable::contiguous(row_entropy_in);
  const Tensor log_partition = torch::stable::contiguous(log_partition_in);
  const Tensor mean = torch::stable::contiguous(mean_in);
  const int64_t rows = layout.rows(), size = codebook.size(codebook.dim() - 2);
  const ScalarType type = result_type(z, codebook);
  const double temperature = temperature_of(temperature_in);
  for (const Tensor& x : {grad_sample, grad_whole})
    STD_TORCH_CHECK(
        x.numel() == layout.heads && (x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::Double),
        "the incoming gradients must be float32 or float64 with one element per head");
  STD_TORCH_CHECK(row_entropy.numel() == layout.heads * rows && log_partition.numel() == layout.heads * rows &&
                      mean.numel() == layout.heads * size && row_entropy.scalar_type() == type &&
                      log_partition.scalar_type() == type && mean.scalar_type() == type,
                  "row_entropy, log_partition and mean_assignment must be those of the forward pass");

  Tensor grad_z = torch::stable::empty_like(z);
  const Tensor written = mergeable(grad_z, channel_dim, batched);
  const Layout out_layout = layout_of(written, channel_dim, batched);
  Tensor grad_codebook =
      codebook_gradient ? torch::stable::empty_like(codebook) : torch::stable::empty({0}, codebook.scalar_type());
  for (const Tensor& x : {written, grad_codebook}) clear(x);
  for (int64_t head = 0; head < layout.heads; ++head) {
    const DefaultArithmetic arithmetic;
    const EntropyInputs inputs = inputs_of(z, layout, codebook, mask, head, metric, temperature);
    const RowsOut target = rows_out_of(written, out_layout, head);
    fill_rows(target, inputs.rows.dtype, layout.channels, inputs.bad, NAN);
    Entropies known;
    for (int64_t i : inputs.row) known.entropy.push_back(get(row_entropy, head * rows + i));
    for (int64_t j : inputs.code) known.mean.push_back(get(mean, head * size + j));
    // A float cannot hold the partition of logits that float is not trusted with: it is found again.
    if (inputs.in_float || type == ScalarType::Double)
      for (int64_t i : inputs.row) known.partition.push_back(get(log_partition, head * rows + i));
    char* out = codebook_gradient ? static_cast<char*>(grad_codebook.mutable_data_ptr()) +
                                        head * size * layout.channels * element_size(dtype_of(codebook))
                                  : nullptr;
    const double of_sample = get(grad_sample, head), of_whole = get(grad_whole, head);
    if (inputs.in_float)
      entropy_gradients(inputs, active().entropy, known, of_sample, of_whole, target, out, in_parallel);
    else entropy_gradients(inputs, kEntropyDouble, known, of_sample, of_whole, target, out, in_parallel);
  }
  if (written.mutable_data_ptr() != grad_z.mutable_data_ptr()) torch::stable::copy_(grad_z, written);
  return {grad_z, grad_codebook};
}

STABLE_TORCH_LIBRARY_IMPL(vqkernels, CPU, m) {
  m.impl("entropy", TORCH_BOX(&entropy_cpu));
  m.impl("entropy_backward", TORCH_BOX(&entropy_backward_cpu));
}

}  // namespace vqkernels
