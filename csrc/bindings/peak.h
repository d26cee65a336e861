// The float32 multiply-add peak of one thread, for benchmarks: nothing but independent fused multiply-adds in
// registers, at the widest vector this CPU has whatever VQKERNELS_SIMD says. Current x86 cores start two a cycle and
// take four cycles for each, so twelve chains keep both ports full. Sums stay finite: x -> x/2 + 1 tends to 2.
#pragma once
#include <chrono>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace vqkernels {

constexpr int kChains = 12, kLinks = 4096;

#if defined(__x86_64__)
__attribute__((target("avx512f"))) inline float chains_avx512(float start) {
  const __m512 half = _mm512_set1_ps(0.5f), one = _mm512_set1_ps(1.0f);
  __m512 x[kChains];
#pragma GCC unroll 12
  for (int c = 0; c < kChains; ++c) x[c] = _mm512_set1_ps(start + c);
  for (int i = 0; i < kLinks; ++i) {
#pragma GCC unroll 12
    for (int c = 0; c < kChains; ++c) x[c] = _mm512_fmadd_ps(x[c], half, one);
  }
  __m512 sum = x[0];
#pragma GCC unroll 12
  for (int c = 1; c < kChains; ++c) sum = _mm512_add_ps(sum, x[c]);
  return _mm512_cvtss_f32(sum);
}

__attribute__((target("avx2,fma"))) inline float chains_avx2(float start) {
  const __m256 half = _mm256_set1_ps(0.5f), one = _mm256_set1_ps(1.0f);
  __m256 x[kChains];
#pragma GCC unroll 12
  for (int c = 0; c < kChains; ++c) x[c] = _mm256_set1_ps(start + c);
  for (int i = 0; i < kLinks; ++i) {
#pragma GCC unroll 12
    for (int c = 0; c < kChains; ++c) x[c] = _mm256_fmadd_ps(x[c], half, one);
  }
  __m256 sum = x[0];
#pragma GCC unroll 12
  for (int c = 1; c < kChains; ++c) sum = _mm256_add_ps(sum, x[c]);
  return _mm256_cvtss_f32(sum);
}
#endif

// Elsewhere the compiler's own vectors of four: fused where the base instruction set has a multiply-add (Arm), and two
// instructions where it has none.
inline float chains_baseline(float start) {
  typedef float Four __attribute__((vector_size(16)));
  Four x[kChains];
  for (int c = 0; c < kChains; ++c) x[c] = Four{start, start, start, start} + float(c);
  for (int i = 0; i < kLinks; ++i) {
#pragma GCC unroll 12
    for (int c = 0; c < kChains; ++c)
#if defined(__FP_FAST_FMAF) || defined(__aarch64__)
      for (int lane = 0; lane < 4; ++lane) x[c][lane] = __builtin_fmaf(x[c][lane], 0.5f, 1.0f);
#else
      x[c] = x[c] * 0.5f + 1.0f;
#endif
  }
  Four sum = x[0];
  for (int c = 1; c < kChains; ++c) sum += x[c];
  return sum[0];
}

// Float32 operations per second (a multiply-add counts two) of this thread, over about `seconds`.
inline double fma_rate(double seconds) {
  using Clock = std::chrono::steady_clock;
  float (*chains)(float) = chains_baseline;
  int lanes = 4;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) chains = chains_avx2, lanes = 8;
  if (__builtin_cpu_supports("avx512f")) chains = chains_avx512, lanes = 16;
#endif
  volatile float kept = chains(1.0f);  // volatile: the work must not be optimised away
  const auto start = Clock::now();
  double calls = 0, passed = 0;
  while (passed < seconds) {
    for (int i = 0; i < 8; ++i) kept = chains(kept);
    calls += 8;
    passed = std::chrono::duration<double>(Clock::now() - start).count();
  }
  return calls * kChains * kLinks * lanes * 2 / passed;
}

}  // namespace vqkernels
