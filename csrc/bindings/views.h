// From tensors to the kernels' raw views: the checks that a raw operator call needs, dtypes, names, row ranges.
//
// Canonical shapes: z (batch, heads, positions, channels) with any strides; codebook (heads, size, channels) contiguous;
// mask and indices (batch, heads, positions) contiguous.
#pragma once
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

inline int64_t element_size(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

inline Rows rows_of(const Tensor& z, int64_t head) {
  STD_TORCH_CHECK(z.dim() == 4, "z must be (batch, heads, positions, channels)");
  const DType dtype = dtype_of(z);
  const char* base = static_cast<const char*>(z.const_data_ptr()) + head * z.stride(1) * element_size(dtype);
  return {base, dtype, z.size(0), z.size(2), z.size(3), z.stride(0), z.stride(2), z.stride(3)};
}

inline RowsOut rows_out_of(const Tensor& out, int64_t head) {
  char* base = static_cast<char*>(out.mutable_data_ptr()) + head * out.stride(1) * element_size(dtype_of(out));
  return {base, out.stride(0), out.stride(2), out.stride(3)};
}

inline Codes codes_of(const Tensor& codebook, int64_t head) {
  STD_TORCH_CHECK(codebook.dim() == 3 && codebook.is_contiguous(), "codebook must be contiguous (heads, size, channels)");
  const DType dtype = dtype_of(codebook);
  const int64_t size = codebook.size(1), channels = codebook.size(2);
  const char* base = static_cast<const char*>(codebook.const_data_ptr()) + head * size * channels * element_size(dtype);
  return {base, dtype, size, channels};
}

inline RowSlots slots_of(const Tensor& z, int64_t head) {
  return {z.size(2), z.size(1) * z.size(2), head * z.size(2)};
}

inline void check_search(const Tensor& z, const Tensor& codebook, const std::optional<Tensor>& mask) {
  STD_TORCH_CHECK(z.dim() == 4 && codebook.dim() == 3, "z must have 4 dimensions and codebook 3");
  STD_TORCH_CHECK(z.size(1) == codebook.size(0) && z.size(3) == codebook.size(2),
                  "z and codebook differ in heads or channels");
  STD_TORCH_CHECK(codebook.size(1) > 0 && codebook.size(2) > 0, "the codebook is empty");
  STD_TORCH_CHECK(!mask || (mask->is_contiguous() && mask->scalar_type() == ScalarType::Bool && mask->dim() == 3 &&
                            mask->numel() == z.size(0) * z.size(1) * z.size(2)),
                  "mask must be contiguous bool (batch, heads, positions)");
}

// Copies rows [begin, end) of one head between a (batch, heads, positions) array and a dense one.
template <class T> void gather_slots(const T* from, const RowSlots& slots, int64_t begin, int64_t end, T* to) {
  for (int64_t row = begin; row < end; ++row) to[row - begin] = from[slots(row)];
}
template <class T> void scatter_slots(const T* from, const RowSlots& slots, int64_t begin, int64_t end, T* to) {
  for (int64_t row = begin; row < end; ++row) to[slots(row)] = from[row - begin];
}

constexpr int64_t kBlock = 32;  // rows whose squared errors are one partial sum, whatever the chunk and the threads

// Rows per task: large where there is work for every thread, a single block where there is little.
inline int64_t task_rows(int64_t rows, int64_t chunk) {
  const int64_t threads = torch::stable::get_num_threads();
  return rows >= 2 * threads * chunk ? chunk : std::min(chunk, std::max<int64_t>(1, rows / (threads * kBlock)) * kBlock);
}

// Runs f(first, last) over [0, count) on torch's threads, each in the arithmetic that the kernels' proofs assume.
template <class F> void parallel_for(int64_t count, int64_t grain, const F& f) {
  torch::stable::parallel_for(0, count, grain, [&](int64_t first, int64_t last) {
    const DefaultArithmetic arithmetic;
    f(first, last);
  });
}

}  // namespace vqkernels
