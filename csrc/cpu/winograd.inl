// Winograd's filtering F(4, 3) for one SIMD level: the transforms of tiles, and those of a convolution's weight. See
// pixelcnn_layer.h.
#pragma once
#include <type_traits>

#include "gate.inl"
#include "pixelcnn_layer.h"

namespace vqkernels {
namespace {
namespace pixelcnn {

// Winograd's F(4, 3) at 0, +-p, +-q and infinity.
constexpr double kP = 0.75, kQ = 1.5, kP2 = kP * kP, kQ2 = kQ * kQ, kProduct = kP2 * kQ2, kSum = kP2 + kQ2;
constexpr int kElements = 6, kOutputs = 4;

template <class V> inline __attribute__((always_inline)) void into_tile(const V (&d)[6], V (&v)[6]) {
  using S = std::remove_cv_t<std::remove_reference_t<decltype(v[0][0])>>;
  const auto c = [](double x) { return splat(S(x)); };
  v[0] = fma(c(kProduct), d[0], fma(c(-kSum), d[2], d[4]));
  v[5] = fma(c(kProduct), d[1], fma(c(-kSum), d[3], d[5]));
  const V even_p = fma(c(-kQ2), d[2], d[4]), odd_p = mul(c(kP), fma(c(-kQ2), d[1], d[3]));
  const V even_q = fma(c(-kP2), d[2], d[4]), odd_q = mul(c(kQ), fma(c(-kP2), d[1], d[3]));
  v[1] = add(even_p, odd_p), v[2] = sub(even_p, odd_p);
  v[3] = add(even_q, odd_q), v[4] = sub(even_q, odd_q);
}

// The transpose of into_tile.
template <class V> inline __attribute__((always_inline)) void into_tile_backward(const V (&v)[6], V (&d)[6]) {
  using S = std::remove_cv_t<std::remove_reference_t<decltype(d[0][0])>>;
  const auto c = [](double x) { return splat(S(x)); };
  const V sum_p = add(v[1], v[2]), odd_p = sub(v[1], v[2]), sum_q = add(v[3], v[4]), odd_q = sub(v[3], v[4]);
  d[0] = mul(c(kProduct), v[0]);
  d[1] = fma(c(kProduct), v[5], fma(c(-kP * kQ2), odd_p, mul(c(-kQ * kP2), odd_q)));
  d[2] = fma(c(-kSum), v[0], fma(c(-kQ2), sum_p, mul(c(-kP2), sum_q)));
  d[3] = fma(c(-kSum), v[5], fma(c(kP), odd_p, mul(c(kQ), odd_q)));
  d[4] = add(v[0], add(sum_p, sum_q));
  d[5] = v[5];
}

template <class V> inline __attribute__((always_inline)) void out_of_tile(const V (&m)[6], V (&y)[4]) {
  using S = std::remove_cv_t<std::remove_reference_t<decltype(y[0][0])>>;
  const auto c = [](double x) { return splat(S(x)); };
  const V sum_p = add(m[1], m[2]), odd_p = sub(m[1], m[2]), sum_q = add(m[3], m[4]), odd_q = sub(m[3], m[4]);
  y[0] = add(m[0], add(sum_p, sum_q));
  y[1] = fma(c(kP), odd_p, mul(c(kQ), odd_q));
  y[2] = fma(c(kP2), sum_p, mul(c(kQ2), sum_q));
  y[3] = fma(c(kP2 * kP), odd_p, fma(c(kQ2 * kQ), odd_q, m[5]));
}

// The transpose of out_of_tile.
template <class V> inline __attribute__((always_inline)) void out_of_tile_backward(const V (&y)[4], V (&m)[6]) {
  using S = std::remove_cv_t<std::remove_reference_t<decltype(y[0][0])>>;
  const auto c = [](double x) { return splat(S(x)); };
  const V even_p = fma(c(kP2), y[2], y[0]), odd_p = fma(c(kP2 * kP), y[3], mul(c(kP), y[1]));
  const V even_q = fma(c(kQ2), y[2], y[0]), odd_q = fma(c(kQ2 * kQ), y[3], mul(c(kQ), y[1]));
  m[0] = y[0];
  m[1] = add(even_p, odd_p), m[2] = sub(even_p, odd_p);
  m[3] = add(even_q, odd_q), m[4] = sub(even_q, odd_q);
  m[5] = y[3];
}

constexpr double kNormP = 2 * kP2 * (kP2 - kQ2), kNormQ = 2 * kQ2 * (kQ2 - kP2);  // of the Lagrange polynomials

template <class T> inline void filters(const PixelCNNFilters<T>& x, int64_t first, int64_t last) {
  const int64_t channels = x.channels, twice = 2 * channels, element = x.outputs * twice;
  for (int64_t n = first; n < last; ++n)
    for (int64_t r = 0; r < 2; ++r) {
      const T* w = x.from + n * 3 * twice + 3 * r;
      T* u = x.to + n * twice + r * channels;
      for (int64_t c = 0; c < channels; ++c) {
        const T w0 = w[6 * c], w1 = w[6 * c + 1], w2 = w[6 * c + 2];
        const T even_p = (w0 + T(kP2) * w2) * T(1 / kNormP), odd_p = w1 * T(kP / kNormP);
        const T even_q = (w0 + T(kQ2) * w2) * T(1 / kNormQ), odd_q = w1 * T(kQ / kNormQ);
        u[c] = w0 * T(1 / kProduct);
        u[element + c] = even_p + odd_p;
        u[2 * element + c] = even_p - odd_p;
        u[3 * element + c] = even_q + odd_q;
        u[4 * element + c] = even_q - odd_q;
        u[5 * element + c] = w2;
      }
    }
}

template <class T> inline void filters_backward(const PixelCNNFilters<T>& x, int64_t first, int64_t last) {
  const int64_t channels = x.channels, twice = 2 * channels, element = x.outputs * twice;
  for (int64_t n = first; n < last; ++n)
    for (int64_t r = 0; r < 2; ++r) {
      T* w = x.to + n * 3 * twice + 3 * r;
      const T* u = x.from + n * twice + r * channels;
      for (int64_t c = 0; c < channels; ++c) {
        const T p = u[element + c], minus_p = u[2 * element + c], q = u[3 * element + c], minus_q = u[4 * element + c];
        const T even_p = (p + minus_p) * T(1 / kNormP), even_q = (q + minus_q) * T(1 / kNormQ);
        w[6 * c] = u[c] * T(1 / kProduct) + even_p + even_q;
        w[6 * c + 1] = (p - minus_p) * T(kP / kNormP) + (q - minus_q) * T(kQ / kNormQ);
        w[6 * c + 2] = u[5 * element + c] + T(kP2) * even_p + T(kQ2) * even_q;
      }
    }
}

}  // namespace pixelcnn
}  // namespace
}  // namespace vqkernels
