// Body of the integer filter's inner kernels, compiled once per SIMD level that has 16-bit multiply-adds.
//
// Per tile and pair of channels: two vector loads of z, one broadcast per code, two 16-bit dot-product steps per code,
// each worth two multiply-adds. Integer sums are exact, so their order does not matter and wrapping of partial sums is
// harmless as long as the final score fits (codebook16.h sees to that).
namespace {

using vqkernels::IntegerTiles;

void quantize(const float* panel, float scale, int64_t channels, int32_t* out, float* residual, uint32_t* square,
              float* largest) {
  const Floats s = splat(scale), zero = splat(0.0f);
  for (int half = 0; half < 2; ++half) {
    Floats error = zero, top = zero;
    Ints sum = splat(int32_t(0));
    for (int64_t d = 0; d < channels; d += 2) {
      const Floats even = mul(load(panel + d * kRows + half * kLanes), s);
      const Floats odd = d + 1 < channels ? mul(load(panel + (d + 1) * kRows + half * kLanes), s) : zero;
      const Ints even_word = round(even), odd_word = round(odd);
      const Floats even_error = sub(even, convert(even_word)), odd_error = sub(odd, convert(odd_word));
      error = fma(even_error, even_error, fma(odd_error, odd_error, error));
      top = max(top, max(magnitude(even), magnitude(odd)));
      const Ints word = pair(even_word, odd_word);
      sum = dot(sum, word, word);
      store(out + (d / 2) * kRows + half * kLanes, word);
    }
    store(residual + half * kLanes, root(error));
    store(largest + half * kLanes, top);
    store(reinterpret_cast<int32_t*>(square) + half * kLanes, sum);
  }
}

// The scores of one tile, [code][half]. The loop is written in assembly because gcc 12 spills the accumulators of the same
// loop in intrinsics, at more than half its speed. A tile is one row of biases, then one row of codes per pair of channels.
struct IntegerTile {
  Ints score[kCodesPerTile][2];
};

#if defined(__AVX512F__)
#if defined(__AVX512VNNI__)
#define VQ_DOT(word, acc) "vpdpwssd %%zmm31, %%" word ", %" acc "\n\t"
#else
#define VQ_DOT(word, acc) "vpmaddwd %%zmm31, %%" word ", %%zmm28\n\t" "vpaddd %%zmm28, %" acc ", %" acc "\n\t"
#endif
#define VQ_INIT(byte, low, high) "vpbroadcastd " byte "(%25), %" low "\n\t" "vmovdqa64 %" low ", %" high "\n\t"
#define VQ_STEP(byte, low, high) \
  "vpbroadcastd " byte "(%25), %%zmm31\n\t" VQ_DOT("zmm29", low) VQ_DOT("zmm30", high)
#define VQ_ROW(F)                                                                                                \
  F("0", "0", "1") F("4", "2", "3") F("8", "4", "5") F("12", "6", "7") F("16", "8", "9") F("20", "10", "11")       \
  F("24", "12", "13") F("28", "14", "15") F("32", "16", "17") F("36", "18", "19") F("40", "20", "21")              \
  F("44", "22", "23")

inline __attribute__((always_inline)) IntegerTile score_tile(const int32_t* panel, const int32_t* code, int64_t pairs) {
  static_assert(kCodesPerTile == 12, "the assembly below has 12 codes");
  IntegerTile t;
  asm(VQ_ROW(VQ_INIT)
      "1:\n\t"
      "addq $48, %25\n\t"
      "vmovdqu64 (%24), %%zmm29\n\t"
      "vmovdqu64 64(%24), %%zmm30\n\t"
      "addq $128, %24\n\t" VQ_ROW(VQ_STEP)
      "decq %26\n\t"
      "jnz 1b\n\t"
      : "=&v"(t.score[0][0]), "=&v"(t.score[0][1]), "=&v"(t.score[1][0]), "=&v"(t.score[1][1]),
        "=&v"(t.score[2][0]), "=&v"(t.score[2][1]), "=&v"(t.score[3][0]), "=&v"(t.score[3][1]),
        "=&v"(t.score[4][0]), "=&v"(t.score[4][1]), "=&v"(t.score[5][0]), "=&v"(t.score[5][1]),
        "=&v"(t.score[6][0]), "=&v"(t.score[6][1]), "=&v"(t.score[7][0]), "=&v"(t.score[7][1]),
        "=&v"(t.score[8][0]), "=&v"(t.score[8][1]), "=&v"(t.score[9][0]), "=&v"(t.score[9][1]),
        "=&v"(t.score[10][0]), "=&v"(t.score[10][1]), "=&v"(t.score[11][0]), "=&v"(t.score[11][1]),
        "+&r"(panel), "+&r"(code), "+&r"(pairs)
      :
      : "xmm28", "xmm29", "xmm30", "xmm31", "memory", "cc");
  return t;
}
#else
#define VQ_DOT(word, acc) "vpmaddwd %%ymm15, %%" word ", %%ymm14\n\t" "vpaddd %%ymm14, %" acc ", %" acc "\n\t"
#define VQ_INIT(byte, low, high) "vpbroadcastd " byte "(%13), %" low "\n\t" "vmovdqa %" low ", %" high "\n\t"
#define VQ_STEP(byte, low, high) \
  "vpbroadcastd " byte "(%13), %%ymm15\n\t" VQ_DOT("ymm12", low) VQ_DOT("ymm13", high)
#define VQ_ROW(F)                                                                                          \
  F("0", "0", "1") F("4", "2", "3") F("8", "4", "5") F("12", "6", "7") F("16", "8", "9") F("20", "10", "11")

inline __attribute__((always_inline)) IntegerTile score_tile(const int32_t* panel, const int32_t* code, int64_t pairs) {
  static_assert(kCodesPerTile == 6, "the assembly below has 6 codes");
  IntegerTile t;
  asm(VQ_ROW(VQ_INIT)
      "1:\n\t"
      "addq $24, %13\n\t"
      "vmovdqu (%12), %%ymm12\n\t"
      "vmovdqu 32(%12), %%ymm13\n\t"
      "addq $64, %12\n\t" VQ_ROW(VQ_STEP)
      "decq %14\n\t"
      "jnz 1b\n\t"
      : "=&x"(t.score[0][0]), "=&x"(t.score[0][1]), "=&x"(t.score[1][0]), "=&x"(t.score[1][1]),
        "=&x"(t.score[2][0]), "=&x"(t.score[2][1]), "=&x"(t.score[3][0]), "=&x"(t.score[3][1]),
        "=&x"(t.score[4][0]), "=&x"(t.score[4][1]), "=&x"(t.score[5][0]), "=&x"(t.score[5][1]),
        "+&r"(panel), "+&r"(code), "+&r"(pairs)
      :
      : "xmm12", "xmm13", "xmm14", "xmm15", "memory", "cc");
  return t;
}
#endif
#undef VQ_DOT
#undef VQ_INIT
#undef VQ_STEP
#undef VQ_ROW

// Running minimum, second minimum and slot of one half of a panel, taken through memory once per tile.
inline __attribute__((always_inline)) void keep_best(const IntegerTile& tile, int half, int64_t index, int32_t* best,
                                                     int32_t* second, int32_t* slot) {
  Ints b = load(best), s = load(second), at = load(slot);
#pragma GCC unroll 16
  for (int c = 0; c < kCodesPerTile; ++c) {  // strict: the lowest slot keeps a tie
    const Ints x = tile.score[c][half];
    at = pick(less(x, b), splat(int32_t(index * kCodesPerTile + c)), at);
    s = min(s, max(x, b));
    b = min(b, x);
  }
  store(best, b);
  store(second, s);
  store(slot, at);
}

void sweep16(const int32_t* panel, const IntegerTiles& tiles, int64_t first, int64_t last, int32_t* best,
             int32_t* second, int32_t* slot) {
  for (int64_t index = first; index < last; ++index) {
    const IntegerTile tile = score_tile(panel, tiles.codes + index * (tiles.pairs + 1) * kCodesPerTile, tiles.pairs);
    keep_best(tile, 0, index, best, second, slot);
    keep_best(tile, 1, index, best + kLanes, second + kLanes, slot + kLanes);
  }
}

}  // namespace
