// From tensors to the kernels' raw views: layouts, dtypes, names, and threads.
//
// An operator receives z as its caller has it: (..., channels, ...) with the channel axis named, and axis 0 the head
// where the codebook is (heads, size, channels). Row r of a head is the r-th in row-major order of the remaining axes;
// masks and indices are contiguous in that order. Rows are read through at most two strides, so z is copied only where
// its leading axes cannot be merged into two groups.
#pragma once
#include <functional>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "../cpu/environment.h"
#include "../cpu/quantize.h"
#include "../cpu/rows.h"

namespace vqkernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    case ScalarType::Double: return DType::f64;
    default: STD_TORCH_CHECK(false, "expected float32, bfloat16, float16 or float64");
  }
}

inline Metric metric_of(const std::string& name) {
  if (name == "euclidean") return Metric::euclidean;
  if (name == "dot") return Metric::dot;
  STD_TORCH_CHECK(name == "cosine", "metric must be 'euclidean', 'dot' or 'cosine', got '", name, "'");
  return Metric::cosine;
}

inline Gradient gradient_of(const std::string& name) {
  if (name == "straight_through") return Gradient::straight_through;
  STD_TORCH_CHECK(name == "rotation", "gradient must be 'straight_through' or 'rotation', got '", name, "'");
  return Gradient::rotation;
}

// A temperature is an operand, so that one compiled graph serves all values.
inline double temperature_of(const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Double && tensor.numel() == 1 && tensor.is_cpu(),
                  "temperature must be a 0-d float64 tensor on the CPU");
  const double temperature = *static_cast<const double*>(tensor.const_data_ptr());
  STD_TORCH_CHECK(temperature > 0.0, "temperature must be positive");
  return temperature;
}

inline int64_t element_size(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

// A tensor of rows in canonical form: (head, batch, position, channel) by four strides.
struct Layout {
  int64_t heads = 1, batch = 1, positions = 1, channels = 1;
  int64_t head_stride = 0, batch_stride = 0, position_stride = 0, channel_stride = 0;
  bool merged = true;  // false: the leading axes need more than two strides, and the tensor must be copied

  int64_t rows() const { return batch * positions; }
};

// The same rule as `Layout` of vqkernels/backends/layout.py: axes of size 1 are ignored, and at most one neighbouring
// pair of the others may be apart by something else than the inner one's extent.
inline Layout layout_of(const Tensor& x, int64_t channel_dim, bool batched) {
  const int64_t dims = x.dim();
  STD_TORCH_CHECK(channel_dim >= int64_t(batched) && channel_dim < dims, "channel_dim is not an axis of z");
  Layout layout;
  layout.channels = x.size(channel_dim);
  layout.channel_stride = x.stride(channel_dim);
  if (batched) layout.heads = x.size(0), layout.head_stride = x.stride(0);
  int64_t groups = 0, inner_extent = 0;
  for (int64_t axis = dims - 1; axis >= int64_t(batched); --axis) {
    if (axis == channel_dim || x.size(axis) == 1) continue;
    if (groups == 0 || x.stride(axis) != inner_extent) {
      ++groups;
      if (groups == 1) layout.position_stride = x.stride(axis);
      if (groups == 2) layout.batch_stride = x.stride(axis);
    }
    (groups == 1 ? layout.positions : layout.batch) *= x.size(axis);
    inner_extent = x.stride(axis) * x.size(axis);
  }
  layout.merged = groups <= 2;
  return layout;
}

inline bool is_batched(const Tensor& codebook) { return codebook.dim() == 3; }

// x itself, or a contiguous copy where its layout needs one.
inline Tensor mergeable(const Tensor& x, int64_t channel_dim, bool batched) {
  return layout_of(x, channel_dim, batched).merged ? x : torch::stable::contiguous(x);
}

inline Rows rows_of(const Tensor& x, const Layout& layout, int64_t head) {
  const DType dtype = dtype_of(x);
  const char* base = static_cast<const char*>(x.const_data_ptr()) + head * layout.head_stride * element_size(dtype);
  return {base,
          dtype,
          layout.batch,
          layout.positions,
          layout.channels,
          layout.batch_stride,
          layout.position_stride,
          layout.channel_stride};
}

inline RowsOut rows_out_of(const Tensor& out, const Layout& layout, int64_t head) {
  char* base = static_cast<char*>(out.mutable_data_ptr()) + head * layout.head_stride * element_size(dtype_of(out));
  return {base, layout.positions, layout.batch_stride, layout.position_stride, layout.channel_stride};
}

inline Codes codes_of(const Tensor& codebook, int64_t head) {
  const DType dtype = dtype_of(codebook);
  const int64_t size = codebook.size(codebook.dim() - 2), channels = codebook.size(codebook.dim() - 1);
  const char* base = static_cast<const char*>(codebook.const_data_ptr()) + head * size * channels * element_size(dtype);
  return {base, dtype, size, channels};
}

// z's sizes without the channel axis.
inline std::vector<int64_t> row_sizes(const Tensor& z, int64_t channel_dim) {
  std::vector<int64_t> sizes;
  for (int64_t axis = 0; axis < z.dim(); ++axis)
    if (axis != channel_dim) sizes.push_back(z.size(axis));
  return sizes;
}

inline void check_search(const Layout& layout, const Tensor& codebook, const std::optional<Tensor>& mask) {
  STD_TORCH_CHECK(codebook.dim() == 2 || codebook.dim() == 3, "codebook must have 2 or 3 dimensions");
  STD_TORCH_CHECK(layout.channels == codebook.size(codebook.dim() - 1), "z and codebook differ in channels");
  STD_TORCH_CHECK(!is_batched(codebook) || layout.heads == codebook.size(0), "z and codebook differ in heads");
  STD_TORCH_CHECK(codebook.size(codebook.dim() - 2) > 0 && layout.channels > 0, "the codebook is empty");
  STD_TORCH_CHECK(!mask || (mask->scalar_type() == ScalarType::Bool && mask->numel() == layout.heads * layout.rows()),
                  "mask must be bool with one element per row");
}

// Rows per task: large where there is work for every thread, a single block where there is little.
inline int64_t task_rows(int64_t rows, int64_t chunk) {
  const int64_t threads = torch::stable::get_num_threads();
  return rows >= 2 * threads * chunk ? chunk
                                     : std::min(chunk, std::max<int64_t>(1, rows / (threads * kBlock)) * kBlock);
}

// Runs f(first, last) over [0, count) on torch's threads, each in the arithmetic that the kernels' proofs assume.
template <class F> void parallel_for(int64_t count, int64_t grain, const F& f) {
  torch::stable::parallel_for(0, count, grain, [&](int64_t first, int64_t last) {
    const DefaultArithmetic arithmetic;
    f(first, last);
  });
}

// The same as a `Parallel` of the kernels.
inline void in_parallel(int64_t count, const std::function<void(int64_t, int64_t)>& f) { parallel_for(count, 1, f); }

}  // namespace vqkernels
