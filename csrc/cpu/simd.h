// One vector type per SIMD level, chosen by the flags of the translation unit: float lanes for the filter, double lanes
// for the contract. Everything has internal linkage, so that no copy compiled for a higher level is ever linked into a
// lower one. Multiply-add is fused only where it is asked for by name (`fma`); -ffp-contract=off keeps it that way.
#pragma once
#include <stdint.h>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#pragma GCC diagnostic ignored "-Wpsabi"  // these vectors never leave their translation unit

namespace {

#if defined(__AVX512F__)

constexpr int kLanes = 16;
using Floats = __m512;
using Doubles = __m512d;
inline Floats load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, Floats x) { _mm512_storeu_ps(p, x); }
inline Floats splat(float x) { return _mm512_set1_ps(x); }
inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
inline Floats sub(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
inline Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Floats min(Floats a, Floats b) { return _mm512_min_ps(a, b); }  // b where either is NaN
inline Floats max(Floats a, Floats b) { return _mm512_max_ps(a, b); }
inline Floats root(Floats a) { return _mm512_sqrt_ps(a); }
using Mask = __mmask16;
inline Mask less(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
inline bool any_not_greater(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_NGT_UQ) != 0; }
inline bool any_greater(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ) != 0; }
inline Floats pick(Mask m, Floats a, Floats b) { return _mm512_mask_blend_ps(m, b, a); }  // m ? a : b
inline Floats splat_bits(int32_t x) { return _mm512_castsi512_ps(_mm512_set1_epi32(x)); }
inline Doubles load(const double* p) { return _mm512_loadu_pd(p); }
inline void store(double* p, Doubles x) { _mm512_storeu_pd(p, x); }
inline Doubles splat(double x) { return _mm512_set1_pd(x); }
inline Doubles add(Doubles a, Doubles b) { return _mm512_add_pd(a, b); }
inline Doubles sub(Doubles a, Doubles b) { return _mm512_sub_pd(a, b); }
inline Doubles mul(Doubles a, Doubles b) { return _mm512_mul_pd(a, b); }
inline Doubles fma(Doubles a, Doubles b, Doubles c) { return _mm512_fmadd_pd(a, b, c); }

using Ints = __m512i;
inline Ints load(const int32_t* p) { return _mm512_loadu_si512(p); }
inline Ints load_some(const int32_t* p, int64_t count) {  // the first `count` lanes; reads nothing else
  return _mm512_maskz_loadu_epi32(__mmask16((1u << count) - 1u), p);
}
inline void store(int32_t* p, Ints x) { _mm512_storeu_si512(p, x); }
inline Ints splat(int32_t x) { return _mm512_set1_epi32(x); }
inline Ints add(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
inline Ints min(Ints a, Ints b) { return _mm512_min_epi32(a, b); }
inline Mask less(Ints a, Ints b) { return _mm512_cmplt_epi32_mask(a, b); }
inline Ints pick(Mask m, Ints a, Ints b) { return _mm512_mask_blend_epi32(m, b, a); }
inline Ints round(Floats a) { return _mm512_cvtps_epi32(a); }  // to nearest even
inline Floats convert(Ints a) { return _mm512_cvtepi32_ps(a); }
inline Floats add_exponent(Floats a, Floats n) {  // a * 2^k, where the low bits of n hold k
  return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(a), _mm512_slli_epi32(_mm512_castps_si512(n), 23)));
}
inline Ints lane_numbers() { return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }
inline int32_t sum(Ints a) { return _mm512_reduce_add_epi32(a); }  // modulo 2^32
inline Ints bits_and(Ints a, Ints b) { return _mm512_and_si512(a, b); }
inline Ints bits_or(Ints a, Ints b) { return _mm512_or_si512(a, b); }
inline Ints bits_xor(Ints a, Ints b) { return _mm512_xor_si512(a, b); }
template <int kBits> inline Ints shift_left(Ints a) { return _mm512_slli_epi32(a, kBits); }
inline unsigned not_above(Ints a, Ints b) { return _mm512_cmple_epi32_mask(a, b); }  // one bit a lane
inline Ints dot(Ints sum, Ints a, Ints b) {  // sum + a.lo * b.lo + a.hi * b.hi, modulo 2^32
#if defined(__AVX512VNNI__)
  return _mm512_dpwssd_epi32(sum, a, b);
#else
  return _mm512_add_epi32(sum, _mm512_madd_epi16(a, b));
#endif
}
// Writes the lanes of x that are not above the limit, and base + their lane numbers, side by side; returns how many. Up
// to kLanes values behind them are overwritten too.
inline int64_t compress(Ints x, Ints limit, int32_t base, int32_t* number, int32_t* value) {
  const unsigned m = not_above(x, limit);
  if (m == 0) return 0;
  store(number, _mm512_maskz_compress_epi32(__mmask16(m), add(lane_numbers(), splat(base))));
  store(value, _mm512_maskz_compress_epi32(__mmask16(m), x));
  return __builtin_popcount(m);
}
inline void transpose(Ints (&x)[16]) {
  Ints t[16];
  for (int i = 0; i < 16; i += 2)
    t[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]), t[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; ++j)
      x[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + j + 2]),
                x[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + j + 2]);
  for (int j = 0; j < 4; ++j) {  // x[4 i + j] holds columns j, j + 4, j + 8, j + 12 of rows 4 i to 4 i + 3
    const Ints a = _mm512_shuffle_i32x4(x[j], x[4 + j], 0x88), b = _mm512_shuffle_i32x4(x[j], x[4 + j], 0xdd);
    const Ints c = _mm512_shuffle_i32x4(x[8 + j], x[12 + j], 0x88), d = _mm512_shuffle_i32x4(x[8 + j], x[12 + j], 0xdd);
    t[j] = _mm512_shuffle_i32x4(a, c, 0x88), t[j + 8] = _mm512_shuffle_i32x4(a, c, 0xdd);
    t[j + 4] = _mm512_shuffle_i32x4(b, d, 0x88), t[j + 12] = _mm512_shuffle_i32x4(b, d, 0xdd);
  }
  for (int i = 0; i < 16; ++i) x[i] = t[i];
}

#elif defined(__AVX2__)

constexpr int kLanes = 8;
using Floats = __m256;
using Doubles = __m256d;
inline Floats load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, Floats x) { _mm256_storeu_ps(p, x); }
inline Floats splat(float x) { return _mm256_set1_ps(x); }
inline Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
inline Floats sub(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
inline Floats mul(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
inline Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
inline Floats min(Floats a, Floats b) { return _mm256_min_ps(a, b); }
inline Floats max(Floats a, Floats b) { return _mm256_max_ps(a, b); }
inline Floats root(Floats a) { return _mm256_sqrt_ps(a); }
using Mask = __m256;
inline Mask less(Floats a, Floats b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }
inline bool any_not_greater(Floats a, Floats b) { return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_NGT_UQ)) != 0; }
inline bool any_greater(Floats a, Floats b) { return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)) != 0; }
inline Floats pick(Mask m, Floats a, Floats b) { return _mm256_blendv_ps(b, a, m); }
inline Floats splat_bits(int32_t x) { return _mm256_castsi256_ps(_mm256_set1_epi32(x)); }
inline Doubles load(const double* p) { return _mm256_loadu_pd(p); }
inline void store(double* p, Doubles x) { _mm256_storeu_pd(p, x); }
inline Doubles splat(double x) { return _mm256_set1_pd(x); }
inline Doubles add(Doubles a, Doubles b) { return _mm256_add_pd(a, b); }
inline Doubles sub(Doubles a, Doubles b) { return _mm256_sub_pd(a, b); }
inline Doubles mul(Doubles a, Doubles b) { return _mm256_mul_pd(a, b); }
inline Doubles fma(Doubles a, Doubles b, Doubles c) { return _mm256_fmadd_pd(a, b, c); }

using Ints = __m256i;
inline Ints load(const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline Ints lane_numbers() { return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7); }
inline void store(int32_t* p, Ints x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x); }
inline Ints splat(int32_t x) { return _mm256_set1_epi32(x); }
inline Ints add(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
inline Ints min(Ints a, Ints b) { return _mm256_min_epi32(a, b); }
inline Ints less(Ints a, Ints b) { return _mm256_cmpgt_epi32(b, a); }
inline Ints load_some(const int32_t* p, int64_t count) {
  return _mm256_maskload_epi32(p, less(lane_numbers(), splat(int32_t(count))));
}
inline Ints pick(Ints m, Ints a, Ints b) { return _mm256_blendv_epi8(b, a, m); }
inline Ints round(Floats a) { return _mm256_cvtps_epi32(a); }
inline Floats convert(Ints a) { return _mm256_cvtepi32_ps(a); }
inline Floats add_exponent(Floats a, Floats n) {
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a), _mm256_slli_epi32(_mm256_castps_si256(n), 23)));
}
inline int32_t sum(Ints a) {
  __m128i x = _mm_add_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  x = _mm_add_epi32(x, _mm_shuffle_epi32(x, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(x, _mm_shuffle_epi32(x, 0xb1)));
}
inline Ints bits_and(Ints a, Ints b) { return _mm256_and_si256(a, b); }
inline Ints bits_or(Ints a, Ints b) { return _mm256_or_si256(a, b); }
inline Ints bits_xor(Ints a, Ints b) { return _mm256_xor_si256(a, b); }
template <int kBits> inline Ints shift_left(Ints a) { return _mm256_slli_epi32(a, kBits); }
inline unsigned not_above(Ints a, Ints b) {
  return ~unsigned(_mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpgt_epi32(a, b)))) & 0xffu;
}
inline Ints dot(Ints sum, Ints a, Ints b) { return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b)); }
inline int64_t compress(Ints x, Ints limit, int32_t base, int32_t* number, int32_t* value) {
  unsigned m = not_above(x, limit);
  if (m == 0) return 0;
  int32_t lane[8];
  store(lane, x);
  int64_t found = 0;
  for (; m != 0; m &= m - 1, ++found) {
    const int i = __builtin_ctz(m);
    number[found] = base + i;
    value[found] = lane[i];
  }
  return found;
}
inline void transpose(Ints (&x)[8]) {
  Ints t[8];
  for (int i = 0; i < 8; i += 2)
    t[i] = _mm256_unpacklo_epi32(x[i], x[i + 1]), t[i + 1] = _mm256_unpackhi_epi32(x[i], x[i + 1]);
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; ++j)
      x[i + 2 * j] = _mm256_unpacklo_epi64(t[i + j], t[i + j + 2]),
                x[i + 2 * j + 1] = _mm256_unpackhi_epi64(t[i + j], t[i + j + 2]);
  for (int j = 0; j < 4; ++j)
    t[j] = _mm256_permute2x128_si256(x[j], x[4 + j], 0x20), t[j + 4] = _mm256_permute2x128_si256(x[j], x[4 + j], 0x31);
  for (int i = 0; i < 8; ++i) x[i] = t[i];
}

#else  // any CPU: the compiler's own four-lane vectors

constexpr int kLanes = 4;
typedef float Floats __attribute__((vector_size(16)));
typedef double Doubles __attribute__((vector_size(16)));
typedef int32_t Mask __attribute__((vector_size(16)));
typedef float UnalignedFloats __attribute__((vector_size(16), aligned(4), may_alias));
typedef double UnalignedDoubles __attribute__((vector_size(16), aligned(8), may_alias));
inline Floats load(const float* p) { return *reinterpret_cast<const UnalignedFloats*>(p); }
inline void store(float* p, Floats x) { *reinterpret_cast<UnalignedFloats*>(p) = x; }
inline Floats splat(float x) { return Floats{x, x, x, x}; }
inline Floats add(Floats a, Floats b) { return a + b; }
inline Floats sub(Floats a, Floats b) { return a - b; }
inline Floats mul(Floats a, Floats b) { return a * b; }
inline Floats fma(Floats a, Floats b, Floats c) { return a * b + c; }  // two roundings: the bound allows for it
inline Floats min(Floats a, Floats b) { return a < b ? a : b; }
inline Floats max(Floats a, Floats b) { return a > b ? a : b; }
inline Floats root(Floats a) {
  return Floats{__builtin_sqrtf(a[0]), __builtin_sqrtf(a[1]), __builtin_sqrtf(a[2]), __builtin_sqrtf(a[3])};
}
inline Mask less(Floats a, Floats b) { return a < b; }
inline bool any_not_greater(Floats a, Floats b) {
  const Mask greater = a > b;
  return (greater[0] & greater[1] & greater[2] & greater[3]) == 0;
}
inline bool any_greater(Floats a, Floats b) {
  const Mask greater = a > b;
  return (greater[0] | greater[1] | greater[2] | greater[3]) != 0;
}
inline Floats pick(Mask m, Floats a, Floats b) { return m ? a : b; }
inline Floats add_exponent(Floats a, Floats n) {
  return reinterpret_cast<Floats>(reinterpret_cast<Mask>(a) + (reinterpret_cast<Mask>(n) << 23));
}
inline Floats splat_bits(int32_t x) { return reinterpret_cast<Floats>(Mask{x, x, x, x}); }
inline Doubles load(const double* p) { return *reinterpret_cast<const UnalignedDoubles*>(p); }
inline void store(double* p, Doubles x) { *reinterpret_cast<UnalignedDoubles*>(p) = x; }
inline Doubles splat(double x) { return Doubles{x, x}; }
inline Doubles add(Doubles a, Doubles b) { return a + b; }
inline Doubles sub(Doubles a, Doubles b) { return a - b; }
inline Doubles mul(Doubles a, Doubles b) { return a * b; }
inline Doubles fma(Doubles a, Doubles b, Doubles c) { return a * b + c; }

using Ints = Mask;
typedef int32_t UnalignedInts __attribute__((vector_size(16), aligned(4), may_alias));
inline Ints load(const int32_t* p) { return *reinterpret_cast<const UnalignedInts*>(p); }
inline void store(int32_t* p, Ints x) { *reinterpret_cast<UnalignedInts*>(p) = x; }
inline Ints load_some(const int32_t* p, int64_t count) {
  Ints x = {};
  for (int64_t i = 0; i < count; ++i) x[i] = p[i];
  return x;
}
inline void transpose(Ints (&x)[4]) {
  const Ints a = x[0], b = x[1], c = x[2], d = x[3];
  for (int i = 0; i < 4; ++i) x[i] = Ints{a[i], b[i], c[i], d[i]};
}

#endif

}  // namespace
