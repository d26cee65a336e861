// The lanes of float and double, and the gate tanh(a) sigmoid(b), for one SIMD level.
#pragma once
#include <stdint.h>
#include <string.h>

#include "simd.h"

namespace vqkernels {
namespace {
namespace pixelcnn {

template <class T> struct Lanes;
template <> struct Lanes<float> {
  using Vector = Floats;
  typedef int32_t Bits __attribute__((vector_size(sizeof(Floats))));
  static constexpr int kCount = kLanes, kMantissa = 23, kTerms = 7;
  static constexpr int32_t kOne = 0x3f800000, kSign = INT32_MIN;
  static constexpr float kRound = 0x1.8p23f, kLowest = -87.0f, kLog2High = 0x1.62e4p-1f, kLog2Low = 0x1.7f7d1cp-20f;
};
template <> struct Lanes<double> {
  using Vector = Doubles;
  typedef int64_t Bits __attribute__((vector_size(sizeof(Doubles))));
  static constexpr int kCount = kLanes / 2, kMantissa = 52, kTerms = 14;
  static constexpr int64_t kOne = 0x3ff0000000000000, kSign = INT64_MIN;
  static constexpr double kRound = 0x1.8p52, kLowest = -708.0, kLog2High = 0x1.62e42fefa38p-1,
                          kLog2Low = 0x1.ef35793c7673p-45;
};

template <class T>
inline __attribute__((always_inline)) typename Lanes<T>::Vector load_some(const T* p, int64_t count) {
  constexpr int kCount = Lanes<T>::kCount;
  if (count >= kCount) return load(p);
  T part[kCount] = {};
  if (count > 0) memcpy(part, p, count * sizeof(T));
  return load(part);
}

template <class T>
inline __attribute__((always_inline)) void store_some(T* p, typename Lanes<T>::Vector x, int64_t count) {
  constexpr int kCount = Lanes<T>::kCount;
  if (count >= kCount) return store(p, x);
  T part[kCount];
  store(part, x);
  if (count > 0) memcpy(p, part, count * sizeof(T));
}

// x = n log 2 + r: 2^n and e^r - 1, for x in [kLowest, 0]. The Taylor series of e^r ends where |r| <= log(2) / 2 leaves
// less than the rounding.
template <class T> struct Exponential {
  typename Lanes<T>::Vector scale, rest;
};

template <class T> inline __attribute__((always_inline)) Exponential<T> exponential(typename Lanes<T>::Vector x) {
  using L = Lanes<T>;
  using Vector = typename L::Vector;
  using Bits = typename L::Bits;
  constexpr T kInverse[] = {0,
                            1,
                            0.5,
                            T(1.0 / 6),
                            T(1.0 / 24),
                            T(1.0 / 120),
                            T(1.0 / 720),
                            T(1.0 / 5040),
                            T(1.0 / 40320),
                            T(1.0 / 362880),
                            T(1.0 / 3628800),
                            T(1.0 / 39916800),
                            T(1.0 / 479001600),
                            T(1.0 / 6227020800),
                            T(1.0 / 87178291200)};
  const Vector shifted = fma(x, splat(T(1.4426950408889634)), splat(L::kRound));
  const Vector n = sub(shifted, splat(L::kRound));
  const Vector r = fma(n, splat(-L::kLog2Low), fma(n, splat(-L::kLog2High), x));
  Vector sum = splat(kInverse[L::kTerms]);
#pragma GCC unroll 16
  for (int i = L::kTerms - 1; i >= 2; --i) sum = fma(sum, r, splat(kInverse[i]));
  const Bits scale = ((Bits)shifted << L::kMantissa) + L::kOne;
  return {(Vector)scale, fma(mul(sum, r), r, r)};
}

// tanh(a) sigmoid(b), with one division: tanh(|a|) = -e / (e + 2) where e = exp(-2|a|) - 1, exact near 0.
template <class T>
inline __attribute__((always_inline)) typename Lanes<T>::Vector gate(typename Lanes<T>::Vector a,
                                                                     typename Lanes<T>::Vector b) {
  using L = Lanes<T>;
  using Vector = typename L::Vector;
  using Bits = typename L::Bits;
  const Vector lowest = splat(L::kLowest), one = splat(T(1)), zero = splat(T(0));
  const Vector minus_a = (Vector)((Bits)a | L::kSign), minus_b = (Vector)((Bits)b | L::kSign);
  Vector x = add(minus_a, minus_a);
  x = x < lowest ? lowest : x;
  const Exponential<T> ea = exponential<T>(x);
  const Vector e = fma(ea.scale, ea.rest, sub(ea.scale, one));
  const Exponential<T> eb = exponential<T>(minus_b < lowest ? lowest : minus_b);
  const Vector f = fma(eb.scale, eb.rest, eb.scale);
  const Vector above = mul(sub(zero, e), b < zero ? f : one);
  const Vector below = mul(add(e, splat(T(2))), add(one, f));
  return (Vector)((Bits)(above / below) ^ ((Bits)a & L::kSign));
}

// out[c] = gate(x[c] + shift[c], x[channels + c] + shift[channels + c]); shift may be null.
template <class T> inline void gate_row(const T* x, const T* shift, int64_t channels, T* out) {
  using Vector = typename Lanes<T>::Vector;
  for (int64_t c = 0; c < channels; c += Lanes<T>::kCount) {
    const int64_t left = channels - c;
    Vector a = load_some(x + c, left), b = load_some(x + channels + c, left);
    if (shift) a = add(a, load_some(shift + c, left)), b = add(b, load_some(shift + channels + c, left));
    store_some(out + c, gate<T>(a, b), left);
  }
}

}  // namespace pixelcnn
}  // namespace
}  // namespace vqkernels
