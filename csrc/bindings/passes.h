// What the element-wise passes of a model share: element types, new tensors and threads.
#pragma once
#include <algorithm>
#include <type_traits>
#include <vector>

#include "../cpu/kernels.h"
#include "views.h"

namespace vqkernels {

constexpr int64_t kPassElements = 1 << 13;  // below, a second thread costs more than it gains

// Runs a kernel over [0, count) on torch's threads; one item of it is so many elements.
template <class X> void run_pass(Pass<X> kernel, const X& x, int64_t count, int64_t elements) {
  const int64_t grain = std::max<int64_t>(1, kPassElements / std::max<int64_t>(1, elements));
  parallel_for(count, grain, [&](int64_t first, int64_t last) { kernel(x, first, last); });
}

template <class T> const T* read(const Tensor& x) { return static_cast<const T*>(x.const_data_ptr()); }
template <class T> T* written(const Tensor& x) { return static_cast<T*>(x.mutable_data_ptr()); }

// Calls f with a null pointer of the tensor's element type.
template <class F> void with_float(const Tensor& x, const F& f) {
  if (x.scalar_type() == ScalarType::Double) return f(static_cast<double*>(nullptr));
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float, "expected float32 or float64");
  f(static_cast<float*>(nullptr));
}

template <class T> using Element = std::remove_pointer_t<T>;

inline Tensor rows_like(const Tensor& x, const std::vector<int64_t>& sizes) {
  return torch::stable::empty(sizes, x.scalar_type());
}

inline void check_size(const Tensor& x, const Tensor& like, int64_t elements, const char* name) {
  STD_TORCH_CHECK(x.numel() == elements, name, " must have ", elements, " elements, got ", x.numel());
  STD_TORCH_CHECK(x.scalar_type() == like.scalar_type() && x.is_contiguous(), name,
                  " must be contiguous and of the same dtype");
}

}  // namespace vqkernels
