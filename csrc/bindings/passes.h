// What the element-wise passes of a model share: element types, new tensors, threads and SIMD levels.
#pragma once
#include <algorithm>
#include <type_traits>
#include <vector>

#include "../cpu/level.h"
#include "views.h"

namespace vqkernels {

constexpr int64_t kPassElements = 1 << 13;  // below, a second thread costs more than it gains

// Runs pass_LEVEL(x, first, last) over [0, count) on torch's threads; `elements` of them are one item's.
#if defined(__x86_64__)
#define VQKERNELS_PASS(pass, x, count, elements)                                                     \
  const Level level = active_level();                                                                \
  const int64_t grain = std::max<int64_t>(1, kPassElements / std::max<int64_t>(1, elements));        \
  parallel_for(count, grain, [&](int64_t first, int64_t last) {                                      \
    if (level >= Level::avx512) return pass##_avx512(x, first, last);                                \
    if (level == Level::avx2) return pass##_avx2(x, first, last);                                    \
    pass##_baseline(x, first, last);                                                                 \
  });
#else
#define VQKERNELS_PASS(pass, x, count, elements)                                                     \
  const int64_t grain = std::max<int64_t>(1, kPassElements / std::max<int64_t>(1, elements));        \
  parallel_for(count, grain, [&](int64_t first, int64_t last) { pass##_baseline(x, first, last); });
#endif

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
