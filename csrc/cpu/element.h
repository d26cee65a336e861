// Element types of z and of the codebook, and how one element is read and written.
//
// Reading widens exactly (bf16, fp16 -> float, all -> double). Writing rounds once to nearest even; a double that goes
// to fp16 or bf16 passes through float, as torch's own conversion does.
#pragma once
#include <stdint.h>
#include <string.h>

#include "../cuda/portable.h"

namespace vqkernels {

enum class DType : int { f32, bf16, f16, f64 };

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

VQ_BOTH float widen(float x) { return x; }
VQ_BOTH double widen(double x) { return x; }

VQ_BOTH float widen(BFloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float y;
  memcpy(&y, &bits, 4);
  return y;
}

VQ_BOTH float widen(Float16 x) {
#if defined(__CUDA_ARCH__)
  float converted;
  asm("cvt.f32.f16 %0, %1;" : "=f"(converted) : "h"(x.bits));
  return converted;
#else
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16, rest = x.bits & 0x7fffu;
  uint32_t bits;
  float y;
  if (rest >= 0x7c00u) {  // inf, NaN
    bits = sign | 0x7f800000u | ((rest & 0x3ffu) << 13);
  } else if (rest >= 0x0400u) {  // normal: re-bias the exponent
    bits = sign | ((rest << 13) + (112u << 23));
  } else {  // subnormal: rest * 2^-24 is exact in float
    y = float(rest) * 0x1p-24f;
    memcpy(&bits, &y, 4);
    bits |= sign;
  }
  memcpy(&y, &bits, 4);
  return y;
#endif
}

VQ_BOTH void narrow(double x, double* out) { *out = x; }
VQ_BOTH void narrow(double x, float* out) { *out = float(x); }

VQ_BOTH void narrow(double x, BFloat16* out) {
  const float y = float(x);
  uint32_t bits;
  memcpy(&bits, &y, 4);
  if (y != y) {
    out->bits = 0x7fc0u;
    return;
  }
  out->bits = uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

VQ_BOTH void narrow(double x, Float16* out) {
  const float y = float(x);
  uint32_t bits;
  memcpy(&bits, &y, 4);
  const uint16_t sign = uint16_t((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) {
    out->bits = uint16_t(sign | 0x7e00u);
  } else if (magnitude >= 0x477ff000u) {  // 65520 and above round to infinity
    out->bits = uint16_t(sign | 0x7c00u);
  } else if (magnitude >= 0x38800000u) {  // normal in fp16: round at bit 13
    const uint32_t rebased = magnitude - (112u << 23);
    out->bits = uint16_t(sign | ((rebased + 0xfffu + ((rebased >> 13) & 1u)) >> 13));
  } else {  // subnormal: adding 0.5 rounds the value to a multiple of 2^-24 in the low mantissa bits
    float shifted;
    memcpy(&shifted, &magnitude, 4);
    shifted += 0.5f;
    uint32_t low;
    memcpy(&low, &shifted, 4);
    out->bits = uint16_t(sign | (low - 0x3f000000u));
  }
}

// The type in which a row is centred before it is rounded to the filter's float32: float unless the input is double.
template <class T> struct Wide {
  using type = float;
};
template <> struct Wide<double> {
  using type = double;
};

// Calls f with a null pointer of the element type named by `dtype`.
template <class F> inline auto with_type(DType dtype, F&& f) {
  switch (dtype) {
    case DType::bf16: return f(static_cast<const BFloat16*>(nullptr));
    case DType::f16: return f(static_cast<const Float16*>(nullptr));
    case DType::f64: return f(static_cast<const double*>(nullptr));
    default: return f(static_cast<const float*>(nullptr));
  }
}

}  // namespace vqkernels
