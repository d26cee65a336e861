// One vector type per SIMD level, chosen by the flags of the translation unit: float lanes for the filter, double lanes
// for the contract. Everything has internal linkage, so that no copy compiled for a higher level is ever linked into a
// lower one. Multiply-add is fused only where it is asked for by name (`fma`); -ffp-contract=off keeps it that way.
#pragma once
#include <stdint.h>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

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
inline Floats pick(Mask m, Floats a, Floats b) { return _mm512_mask_blend_ps(m, b, a); }  // m ? a : b
inline Floats splat_bits(int32_t x) { return _mm512_castsi512_ps(_mm512_set1_epi32(x)); }
inline Doubles load(const double* p) { return _mm512_loadu_pd(p); }
inline void store(double* p, Doubles x) { _mm512_storeu_pd(p, x); }
inline Doubles splat(double x) { return _mm512_set1_pd(x); }
inline Doubles add(Doubles a, Doubles b) { return _mm512_add_pd(a, b); }
inline Doubles sub(Doubles a, Doubles b) { return _mm512_sub_pd(a, b); }
inline Doubles mul(Doubles a, Doubles b) { return _mm512_mul_pd(a, b); }

using Ints = __m512i;
inline Ints load(const int32_t* p) { return _mm512_loadu_si512(p); }
inline void store(int32_t* p, Ints x) { _mm512_storeu_si512(p, x); }
inline Ints splat(int32_t x) { return _mm512_set1_epi32(x); }
inline Ints add(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
inline Ints min(Ints a, Ints b) { return _mm512_min_epi32(a, b); }
inline Ints max(Ints a, Ints b) { return _mm512_max_epi32(a, b); }
inline Mask less(Ints a, Ints b) { return _mm512_cmplt_epi32_mask(a, b); }
inline Ints pick(Mask m, Ints a, Ints b) { return _mm512_mask_blend_epi32(m, b, a); }
inline Floats magnitude(Floats a) { return _mm512_abs_ps(a); }
inline Ints round(Floats a) { return _mm512_cvtps_epi32(a); }  // to nearest even
inline Floats convert(Ints a) { return _mm512_cvtepi32_ps(a); }
// Low halves of `even` and of `odd` side by side: two int16 a word.
inline Ints pair(Ints even, Ints odd) { return _mm512_mask_blend_epi16(0xaaaaaaaau, even, _mm512_slli_epi32(odd, 16)); }
inline Ints dot(Ints sum, Ints a, Ints b) {  // sum + a.lo * b.lo + a.hi * b.hi, modulo 2^32
#if defined(__AVX512VNNI__)
  return _mm512_dpwssd_epi32(sum, a, b);
#else
  return _mm512_add_epi32(sum, _mm512_madd_epi16(a, b));
#endif
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
inline Floats pick(Mask m, Floats a, Floats b) { return _mm256_blendv_ps(b, a, m); }
inline Floats splat_bits(int32_t x) { return _mm256_castsi256_ps(_mm256_set1_epi32(x)); }
inline Doubles load(const double* p) { return _mm256_loadu_pd(p); }
inline void store(double* p, Doubles x) { _mm256_storeu_pd(p, x); }
inline Doubles splat(double x) { return _mm256_set1_pd(x); }
inline Doubles add(Doubles a, Doubles b) { return _mm256_add_pd(a, b); }
inline Doubles sub(Doubles a, Doubles b) { return _mm256_sub_pd(a, b); }
inline Doubles mul(Doubles a, Doubles b) { return _mm256_mul_pd(a, b); }

using Ints = __m256i;
inline Ints load(const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline void store(int32_t* p, Ints x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x); }
inline Ints splat(int32_t x) { return _mm256_set1_epi32(x); }
inline Ints add(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
inline Ints min(Ints a, Ints b) { return _mm256_min_epi32(a, b); }
inline Ints max(Ints a, Ints b) { return _mm256_max_epi32(a, b); }
inline Ints less(Ints a, Ints b) { return _mm256_cmpgt_epi32(b, a); }
inline Ints pick(Ints m, Ints a, Ints b) { return _mm256_blendv_epi8(b, a, m); }
inline Floats magnitude(Floats a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
inline Ints round(Floats a) { return _mm256_cvtps_epi32(a); }
inline Floats convert(Ints a) { return _mm256_cvtepi32_ps(a); }
inline Ints pair(Ints even, Ints odd) { return _mm256_blend_epi16(even, _mm256_slli_epi32(odd, 16), 0xaa); }
inline Ints dot(Ints sum, Ints a, Ints b) { return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b)); }

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
inline Floats pick(Mask m, Floats a, Floats b) { return m ? a : b; }
inline Floats splat_bits(int32_t x) { return reinterpret_cast<Floats>(Mask{x, x, x, x}); }
inline Doubles load(const double* p) { return *reinterpret_cast<const UnalignedDoubles*>(p); }
inline void store(double* p, Doubles x) { *reinterpret_cast<UnalignedDoubles*>(p) = x; }
inline Doubles splat(double x) { return Doubles{x, x}; }
inline Doubles add(Doubles a, Doubles b) { return a + b; }
inline Doubles sub(Doubles a, Doubles b) { return a - b; }
inline Doubles mul(Doubles a, Doubles b) { return a * b; }

#endif

}  // namespace
