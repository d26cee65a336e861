// Body of the integer filters' inner kernels, compiled once per SIMD level that has 16-bit multiply-adds.
//
// Per tile and word: two vector loads of rows, one broadcast per code, two dot-product steps per code, each worth two
// (fine) or four (coarse) multiply-adds a lane. The epilogue keeps one minimum a tile, a twelfth (AVX2: a sixth) of an
// operation a score; which code it was is found later, for the few tiles that can hold the answer. Integer sums are
// exact, so their order does not matter, and wrapping of partial sums is harmless where the final score fits.
#include "integers.h"
#include "sweep.inl"

namespace vqkernels {
namespace {
namespace filter {

// The scores of one tile, [code][half]. The loop is written in assembly because gcc 12 spills the accumulators of the
// same loop in intrinsics, at more than half its speed.
struct IntegerTile {
  Ints score[kCodesPerTile][2];
};

#if defined(__AVX512F__)
#if defined(__AVX512VNNI__)
#define VQ_FINE(word, acc) "vpdpwssd %%zmm31, %%" word ", %" acc "\n\t"
#define VQ_COARSE(word, acc) "vpdpbusd %%zmm31, %%" word ", %" acc "\n\t"
#else
#define VQ_FINE(word, acc)    \
  "vpmaddwd %%zmm31, %%" word \
  ", %%zmm28\n\t"             \
  "vpaddd %%zmm28, %" acc ", %" acc "\n\t"
#endif
#define VQ_INIT(byte, low, high)      \
  "vpbroadcastd " byte "(%25), %" low \
  "\n\t"                              \
  "vmovdqa64 %" low ", %" high "\n\t"
#define VQ_FINE_STEP(byte, low, high) \
  "vpbroadcastd " byte "(%25), %%zmm31\n\t" VQ_FINE("zmm29", low) VQ_FINE("zmm30", high)
#define VQ_COARSE_STEP(byte, low, high) \
  "vpbroadcastd " byte "(%25), %%zmm31\n\t" VQ_COARSE("zmm29", low) VQ_COARSE("zmm30", high)
#define VQ_EVERY(F)                                                                                                \
  F("0", "0", "1")                                                                                                 \
  F("4", "2", "3")                                                                                                 \
  F("8", "4", "5") F("12", "6", "7") F("16", "8", "9") F("20", "10", "11") F("24", "12", "13") F("28", "14", "15") \
      F("32", "16", "17") F("36", "18", "19") F("40", "20", "21") F("44", "22", "23")
#define VQ_TILE(STEP)                                                                                                \
  static_assert(kCodesPerTile == 12, "the assembly below has 12 codes");                                             \
  IntegerTile t;                                                                                                     \
  asm(VQ_EVERY(VQ_INIT)                                                                                            \
      "1:\n\t"                                                                                                     \
      "addq $48, %25\n\t"                                                                                          \
      "vmovdqu64 (%24), %%zmm29\n\t"                                                                               \
      "vmovdqu64 64(%24), %%zmm30\n\t"                                                                             \
      "addq $128, %24\n\t" VQ_EVERY(STEP)                                                                          \
      "decq %26\n\t"                                                                                               \
      "jnz 1b\n\t"                                                                                                 \
      : "=&v"(t.score[0][0]), "=&v"(t.score[0][1]), "=&v"(t.score[1][0]), "=&v"(t.score[1][1]),                    \
        "=&v"(t.score[2][0]), "=&v"(t.score[2][1]), "=&v"(t.score[3][0]), "=&v"(t.score[3][1]),                    \
        "=&v"(t.score[4][0]), "=&v"(t.score[4][1]), "=&v"(t.score[5][0]), "=&v"(t.score[5][1]),                    \
        "=&v"(t.score[6][0]), "=&v"(t.score[6][1]), "=&v"(t.score[7][0]), "=&v"(t.score[7][1]),                    \
        "=&v"(t.score[8][0]), "=&v"(t.score[8][1]), "=&v"(t.score[9][0]), "=&v"(t.score[9][1]),                    \
        "=&v"(t.score[10][0]), "=&v"(t.score[10][1]), "=&v"(t.score[11][0]), "=&v"(t.score[11][1]),                \
        "+&r"(panel), "+&r"(code), "+&r"(words)                                                                    \
      :                                                                                                            \
      : "xmm28", "xmm29", "xmm30", "xmm31", "memory", "cc"); \
  return t
#else
#define VQ_FINE(word, acc)    \
  "vpmaddwd %%ymm15, %%" word \
  ", %%ymm14\n\t"             \
  "vpaddd %%ymm14, %" acc ", %" acc "\n\t"
#define VQ_INIT(byte, low, high)      \
  "vpbroadcastd " byte "(%13), %" low \
  "\n\t"                              \
  "vmovdqa %" low ", %" high "\n\t"
#define VQ_FINE_STEP(byte, low, high) \
  "vpbroadcastd " byte "(%13), %%ymm15\n\t" VQ_FINE("ymm12", low) VQ_FINE("ymm13", high)
#define VQ_EVERY(F) \
  F("0", "0", "1") F("4", "2", "3") F("8", "4", "5") F("12", "6", "7") F("16", "8", "9") F("20", "10", "11")
#define VQ_TILE(STEP)                                                                                                \
  static_assert(kCodesPerTile == 6, "the assembly below has 6 codes");                                               \
  IntegerTile t;                                                                                                     \
  asm(VQ_EVERY(VQ_INIT)                                                                                            \
      "1:\n\t"                                                                                                     \
      "addq $24, %13\n\t"                                                                                          \
      "vmovdqu (%12), %%ymm12\n\t"                                                                                 \
      "vmovdqu 32(%12), %%ymm13\n\t"                                                                               \
      "addq $64, %12\n\t" VQ_EVERY(STEP)                                                                           \
      "decq %14\n\t"                                                                                               \
      "jnz 1b\n\t"                                                                                                 \
      : "=&x"(t.score[0][0]), "=&x"(t.score[0][1]), "=&x"(t.score[1][0]), "=&x"(t.score[1][1]),                    \
        "=&x"(t.score[2][0]), "=&x"(t.score[2][1]), "=&x"(t.score[3][0]), "=&x"(t.score[3][1]),                    \
        "=&x"(t.score[4][0]), "=&x"(t.score[4][1]), "=&x"(t.score[5][0]), "=&x"(t.score[5][1]),                    \
        "+&r"(panel), "+&r"(code), "+&r"(words)                                                                    \
      :                                                                                                            \
      : "xmm12", "xmm13", "xmm14", "xmm15", "memory", "cc"); \
  return t
#endif

inline __attribute__((always_inline)) IntegerTile fine_tile(const int32_t* panel, const int32_t* code, int64_t words) {
  VQ_TILE(VQ_FINE_STEP);
}
#if defined(VQ_COARSE)
inline
    __attribute__((always_inline)) IntegerTile coarse_tile(const int32_t* panel, const int32_t* code, int64_t words) {
  VQ_TILE(VQ_COARSE_STEP);
}
#endif
#undef VQ_FINE
#undef VQ_COARSE
#undef VQ_INIT
#undef VQ_FINE_STEP
#undef VQ_COARSE_STEP
#undef VQ_EVERY
#undef VQ_TILE

// The lowest score of a half tile, by a tree: its depth hides behind the products of the next tile.
template <int kFirst, int kCount>
inline __attribute__((always_inline)) Ints lowest_of(const IntegerTile& tile, int half) {
  if constexpr (kCount == 1) {
    return tile.score[kFirst][half];
  } else {
    return min(lowest_of<kFirst, kCount / 2>(tile, half),
               lowest_of<kFirst + kCount / 2, kCount - kCount / 2>(tile, half));
  }
}

template <class Score>
inline __attribute__((always_inline)) void sweep_tiles(const Score& score, const int32_t* panel,
                                                       const IntegerTiles& tiles, int64_t first, int64_t last,
                                                       int32_t* lowest, int32_t* best) {
  Ints best0 = load(best), best1 = load(best + kLanes);
  for (int64_t index = first; index < last; ++index) {
    const IntegerTile tile = score(panel, tiles.codes + index * (tiles.words + 1) * kCodesPerTile, tiles.words);
    const Ints low0 = lowest_of<0, kCodesPerTile>(tile, 0), low1 = lowest_of<0, kCodesPerTile>(tile, 1);
    store(lowest, low0);
    store(lowest + kLanes, low1);
    lowest += kRows;
    best0 = min(best0, low0);
    best1 = min(best1, low1);
  }
  store(best, best0);
  store(best + kLanes, best1);
}

void sweep_fine(const int32_t* panel, const IntegerTiles& tiles, int64_t first, int64_t last, int32_t* lowest,
                int32_t* best) {
  sweep_tiles([](auto... x) __attribute__((always_inline)) { return fine_tile(x...); }, panel, tiles, first, last,
              lowest, best);
}

#if defined(__AVX512VNNI__)
void sweep_coarse(const int32_t* panel, const IntegerTiles& tiles, int64_t first, int64_t last, int32_t* lowest,
                  int32_t* best) {
  sweep_tiles([](auto... x) __attribute__((always_inline)) { return coarse_tile(x...); }, panel, tiles, first, last,
              lowest, best);
}
#else
constexpr decltype(IntegerKernels::sweep_coarse) sweep_coarse = nullptr;
#endif

// One channel of one half of a panel, rounded and saturated; adds the square of what is lost.
inline __attribute__((always_inline)) Ints round_channel(Floats x, Floats scale, float low, float high, Floats& lost) {
  const Floats y = mul(x, scale);
  const Ints q = round(min(max(y, splat(low)), splat(high)));
  const Floats e = sub(y, convert(q));
  lost = fma(e, e, lost);
  return q;
}

template <bool kCoarse>
inline void round_half(const float* panel, float fine_scale, float coarse_scale, int64_t channels, int32_t* fine,
                       int32_t* coarse, float* residual, float* coarse_residual) {
  const Floats fine_s = splat(fine_scale), coarse_s = splat(coarse_scale), zero = splat(0.0f);
  Floats lost = zero, coarse_lost = zero;
  for (int64_t d = 0; d < channels; d += 4) {
    Ints word[2], byte[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const Floats x = d + i < channels ? load(panel + (d + i) * kRows) : zero;
      const Ints q = round_channel(x, fine_s, -32768.0f, 32767.0f, lost);
      word[i / 2] = i % 2 == 0 ? bits_and(q, splat(0xffff)) : bits_or(word[i / 2], shift_left<16>(q));
      if constexpr (kCoarse) byte[i] = bits_and(round_channel(x, coarse_s, -128.0f, 127.0f, coarse_lost), splat(0xff));
    }
    store(fine, word[0]);
    if (d + 2 < channels) store(fine + kRows, word[1]);
    fine += 2 * kRows;
    if constexpr (kCoarse) {
      const Ints four =
          bits_or(bits_or(byte[0], shift_left<8>(byte[1])), bits_or(shift_left<16>(byte[2]), shift_left<24>(byte[3])));
      store(coarse, bits_xor(four, splat(int32_t(0x80808080u))));
      coarse += kRows;
    }
  }
  store(residual, root(lost));
  if constexpr (kCoarse) store(coarse_residual, root(coarse_lost));
}

void round_panel(const float* panel, float fine_scale, float coarse_scale, int64_t channels, int32_t* fine,
                 int32_t* coarse, float* residual, float* coarse_residual) {
  for (int at = 0; at < kRows; at += kLanes) {
    if (coarse == nullptr)
      round_half<false>(panel + at, fine_scale, coarse_scale, channels, fine + at, nullptr, residual + at, nullptr);
    else
      round_half<true>(panel + at, fine_scale, coarse_scale, channels, fine + at, coarse + at, residual + at,
                       coarse_residual + at);
  }
}

void limits(const Certificate& c, const int32_t* best, const float* norm, const float* residual, int32_t* limit) {
  constexpr double kLargest = 2147483647.0;
  const double slack = 1.0 + 4.0 * c.roundings, ratio = __builtin_sqrt(double(c.code_scale) / double(c.row_scale));
  for (int r = 0; r < kRows; ++r) {
    const double length = double(norm[r]) * double(c.row_scale) * slack;  // |A|
    const double rho = double(residual[r]) * slack + 4.0 * 0x1p-24 * length, q = length + rho;
    double window;
    if (c.triangle) {
      const double square = 2.0 * (double(best[r]) + c.middle) + 1.0 + q * q, w = rho + c.residual;
      const double nearest = __builtin_sqrt(square > 0.0 ? square : 0.0), wide = w + c.contract * (nearest + w);
      window = wide * (nearest + wide);
    } else {
      const double sum = length * ratio + c.code_norm / ratio;
      window = rho * c.code_norm + q * c.residual + c.bias + c.contract * sum * sum;
    }
    const double t = double(best[r]) + 2.0 + 2.0 * window * (1.0 + 1e-9);
    limit[r] = int32_t(t < kLargest ? t : kLargest);  // a NaN fails the comparison
  }
}

int64_t scan(const int32_t* lowest, int64_t tiles, const int32_t* limit, int32_t* number, int32_t* value) {
  int64_t found = 0;
  const Ints limit0 = load(limit), limit1 = load(limit + kLanes);
  for (int64_t tile = 0; tile < tiles; ++tile, lowest += kRows) {
    const Ints low0 = load(lowest), low1 = load(lowest + kLanes);
    found += compress(low0, limit0, int32_t(tile * kRows), number + found, value + found);
    found += compress(low1, limit1, int32_t(tile * kRows + kLanes), number + found, value + found);
  }
  return found;
}

// Scores of one tile for one row, codes being lanes; the lanes behind the last code belong to the next line of the
// tile.
template <class Step>
inline __attribute__((always_inline)) int64_t pick_codes(const Step& step, const int32_t* row,
                                                         const IntegerTiles& tiles, int64_t tile, int32_t limit,
                                                         int32_t* numbers) {
  const int32_t* code = tiles.codes + tile * (tiles.words + 1) * kCodesPerTile;
  Ints part[4] = {load(code), splat(int32_t(0)), splat(int32_t(0)), splat(int32_t(0))};
  code += kCodesPerTile;
  int64_t w = 0;
  for (; w + 4 <= tiles.words; w += 4, code += 4 * kCodesPerTile, row += 4 * kRows)
    for (int i = 0; i < 4; ++i) part[i] = step(part[i], splat(row[i * kRows]), load(code + i * kCodesPerTile));
  for (; w < tiles.words; ++w, code += kCodesPerTile, row += kRows) part[0] = step(part[0], splat(*row), load(code));
  unsigned within =
      not_above(add(add(part[0], part[1]), add(part[2], part[3])), splat(limit)) & ((1u << kCodesPerTile) - 1u);
  int64_t found = 0;
  for (; within != 0; within &= within - 1) numbers[found++] = int32_t(tile * kCodesPerTile + __builtin_ctz(within));
  return found;
}

int64_t pick_fine(const int32_t* row, const IntegerTiles& tiles, int64_t tile, int32_t limit, int32_t* numbers) {
  return pick_codes([](Ints s, Ints a, Ints b) { return dot(s, a, b); }, row, tiles, tile, limit, numbers);
}

#if defined(__AVX512VNNI__)
int64_t pick_coarse(const int32_t* row, const IntegerTiles& tiles, int64_t tile, int32_t limit, int32_t* numbers) {
  return pick_codes([](Ints s, Ints a, Ints b) { return _mm512_dpbusd_epi32(s, a, b); }, row, tiles, tile, limit,
                    numbers);
}
#else
constexpr decltype(IntegerKernels::pick_coarse) pick_coarse = nullptr;
#endif

int32_t score(const int16_t* row, const int16_t* codes, const int32_t* bias, int64_t stride, const int32_t* numbers,
              int64_t count, int32_t* scores) {
  const int32_t* words = reinterpret_cast<const int32_t*>(row);
  int32_t lowest = 0x7fffffff;
  for (int64_t i = 0; i < count; ++i) {
    const int32_t* code = reinterpret_cast<const int32_t*>(codes + numbers[i] * stride);
    if (i + 2 < count)
      for (int64_t d = 0; d < stride; d += 32) __builtin_prefetch(codes + numbers[i + 2] * stride + d);
    Ints part[2] = {splat(int32_t(0)), splat(int32_t(0))};
    int64_t w = 0;
    for (; w + 2 * kLanes <= stride / 2; w += 2 * kLanes)
      for (int j = 0; j < 2; ++j) part[j] = dot(part[j], load(words + w + j * kLanes), load(code + w + j * kLanes));
    for (; w < stride / 2; w += kLanes) part[0] = dot(part[0], load(words + w), load(code + w));
    scores[i] = bias[numbers[i]] + sum(add(part[0], part[1]));
    lowest = scores[i] < lowest ? scores[i] : lowest;
  }
  return lowest;
}

constexpr IntegerKernels kIntegers = {round_panel, sweep_fine, sweep_coarse, limits,
                                      scan,        pick_fine,  pick_coarse,  score};

}  // namespace filter
}  // namespace
}  // namespace vqkernels
