// The body of sample_panel for one SIMD level: a row a lane, in the compiler's own vectors of the level's width.
#include <string.h>

#include "counter.h"
#include "sample.h"

namespace vqkernels {
namespace {
namespace sampling {

#if defined(__AVX512F__)
constexpr int kWidth = 64;
#elif defined(__AVX2__)
constexpr int kWidth = 32;
#else
constexpr int kWidth = 16;
#endif
typedef float Floats __attribute__((vector_size(kWidth)));
typedef uint32_t Bits __attribute__((vector_size(kWidth)));
typedef int32_t Ints __attribute__((vector_size(kWidth)));
typedef int64_t Longs __attribute__((vector_size(kWidth)));
constexpr int kLanes = kWidth / 4;
constexpr int kTogether = 8;  // codes whose sums are kept in registers side by side

template <class V, class T> inline __attribute__((always_inline)) V splat_of(T x) {
#if defined(__AVX512F__)
  return V{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x};
#elif defined(__AVX2__)
  return V{x, x, x, x, x, x, x, x};
#else
  return V{x, x, x, x};
#endif
}

inline __attribute__((always_inline)) Floats splat(float x) { return splat_of<Floats>(x); }

template <class V, class T> inline __attribute__((always_inline)) V load(const T* p) {
  V x;
  memcpy(&x, p, sizeof x);
  return x;
}

// Scores of `count` codes from `first` for kLanes rows: minus the squared distance, or the product. Channels in order,
// no contraction.
template <int count, bool euclidean>
inline __attribute__((always_inline)) void scores(const SamplePanel& panel, int lane, int64_t first, Floats* a) {
  const int64_t channels = panel.channels;
  const float* code = panel.codes + first * channels;
  Floats sum[count];
#pragma GCC unroll 8
  for (int i = 0; i < count; ++i) sum[i] = splat(0.0f);
  for (int64_t d = 0; d < channels; ++d) {
    const Floats x = load<Floats>(panel.rows + d * kSampleRows + lane);
#pragma GCC unroll 8
    for (int i = 0; i < count; ++i) {
      const Floats e = splat(code[i * channels + d]);
      sum[i] += euclidean ? (x - e) * (x - e) : x * e;
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < count; ++i) a[i] = euclidean ? -sum[i] : sum[i];
}

template <int count, bool euclidean>
inline __attribute__((always_inline)) void step(const SamplePanel& panel, int lane, int64_t first,
                                                const Floats& inverse, Floats& limit) {
  Floats a[count];
  scores<count, euclidean>(panel, lane, first, a);
  const Bits low = load<Bits>(panel.low + lane), high = load<Bits>(panel.high + lane);
  Bits bits[count];
  Floats over[count];
  Ints any = Ints{};
#pragma GCC unroll 8
  for (int i = 0; i < count; ++i) {
    bits[i] = splat_of<Bits>(uint32_t(panel.index[first + i]));
    to_bits(bits[i], low, high);
    // v >= f 2^-31 and f >= 2^e: G <= -log v <= (31 - e) log 2. The slack covers every rounding of this bound.
    const Floats f = __builtin_convertvector(Ints(bits[i] >> 1), Floats);
    const Floats bound = __builtin_convertvector(158 - (Ints(f) >> 23), Floats) * splat(0.6931473f);
    const Floats t = a[i] * inverse;
    const Floats size = Floats(Ints(t) & 0x7fffffff);
    over[i] = t + size * splat(0x1p-20f) + bound + splat(1e-4f);
    any |= over[i] > limit;
  }
  const Longs some = Longs(any);
  int64_t found = 0;
#pragma GCC unroll 8
  for (int i = 0; i < kLanes / 2; ++i) found |= some[i];
  if (found == 0) return;
  float score[count][kLanes], highest[count][kLanes];  // arrays of vectors indexed by variables would live in memory
  uint32_t drawn[count][kLanes];
#pragma GCC unroll 8
  for (int i = 0; i < count; ++i) {
    memcpy(score[i], &a[i], sizeof a[i]);
    memcpy(highest[i], &over[i], sizeof over[i]);
    memcpy(drawn[i], &bits[i], sizeof bits[i]);
  }
  float most[kLanes];
  memcpy(most, &limit, sizeof limit);
  for (int i = 0; i < count; ++i) {
    for (int r = 0; r < kLanes; ++r) {
      if (!(highest[i][r] > most[r])) continue;
      const double total = double(score[i][r]) * panel.inverse[lane + r] + gumbel(drawn[i][r]);
      if (!(total > panel.best[lane + r])) continue;
      panel.best[lane + r] = total;
      panel.slot[lane + r] = int32_t(first + i);
      most[r] = float(total) - 1e-6f * (1.0f + __builtin_fabsf(float(total)));
    }
  }
  memcpy(&limit, most, sizeof limit);
}

template <bool euclidean> inline __attribute__((always_inline)) void sweep(const SamplePanel& panel) {
  float clamped[kSampleRows];
  for (int64_t r = 0; r < kSampleRows; ++r) {
    panel.best[r] = -__builtin_inf(), panel.slot[r] = 0;
    clamped[r] = panel.inverse[r] < 3e38 ? float(panel.inverse[r]) : 3e38f;
  }
  for (int lane = 0; lane < kSampleRows; lane += kLanes) {
    const Floats inverse = load<Floats>(clamped + lane);
    Floats limit = splat(-__builtin_inff());  // not above each row's running maximum
    int64_t k = 0;
    for (; k + kTogether <= panel.count; k += kTogether) step<kTogether, euclidean>(panel, lane, k, inverse, limit);
    for (; k < panel.count; ++k) step<1, euclidean>(panel, lane, k, inverse, limit);
  }
}

void sample_panel(const SamplePanel& panel) {
  if (panel.euclidean) sweep<true>(panel);
  else sweep<false>(panel);
}

}  // namespace sampling
}  // namespace
}  // namespace vqkernels
