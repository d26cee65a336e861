// Body of the float32 filter and of the contract, compiled once per SIMD level, which sets kCodesPerTile (kernels.h).
//
// Per tile and channel: two vector loads of z, one broadcast per code, two multiply-adds per code. kCodesPerTile is as
// large as the register file allows (2 accumulators per code), which also hides the latency of the multiply-add.
#pragma once
#include "simd.h"
#include "sweep.h"

namespace vqkernels {
namespace {
namespace filter {

constexpr int kRows = 2 * kLanes;

struct Tile {
  Floats score[kCodesPerTile][2];
};

// Scores of one tile: [code][row].
inline __attribute__((always_inline)) Tile score_tile(const float* panel, Floats norm0, Floats norm1,
                                                      const Tiles& tiles, int64_t index) {
  const float* code = tiles.codes + index * tiles.channels * kCodesPerTile;
  const float* bias = tiles.bias + index * kCodesPerTile;
  const float* slope = tiles.slope + index * kCodesPerTile;
  Tile tile;
#pragma GCC unroll 16
  for (int c = 0; c < kCodesPerTile; ++c) {
    tile.score[c][0] = fma(splat(slope[c]), norm0, splat(bias[c]));
    tile.score[c][1] = fma(splat(slope[c]), norm1, splat(bias[c]));
  }
  for (int64_t d = 0; d < tiles.channels; ++d) {
    const Floats z0 = load(panel + d * kRows), z1 = load(panel + d * kRows + kLanes);
#pragma GCC unroll 16
    for (int c = 0; c < kCodesPerTile; ++c) {
      const Floats e = splat(code[d * kCodesPerTile + c]);
      tile.score[c][0] = fma(e, z0, tile.score[c][0]);
      tile.score[c][1] = fma(e, z1, tile.score[c][1]);
    }
  }
  return tile;
}

void prepare(float* panel, const float* centre, float scale, int64_t channels, float* norm) {
  const Floats s = splat(scale);
  Floats square0 = splat(0.0f), square1 = splat(0.0f);
  for (int64_t d = 0; d < channels; ++d) {
    float* x = panel + d * kRows;
    const Floats mu = splat(centre[d]);
    const Floats x0 = mul(sub(load(x), mu), s), x1 = mul(sub(load(x + kLanes), mu), s);
    store(x, x0);
    store(x + kLanes, x1);
    square0 = fma(x0, x0, square0);
    square1 = fma(x1, x1, square1);
  }
  store(norm, root(square0));
  store(norm + kLanes, root(square1));
}

void sweep(const float* panel, const float* norm, const Tiles& tiles, int64_t first, int64_t last, float* best,
           float* second, int32_t* slot) {
  float* slot_bits = reinterpret_cast<float*>(slot);
  const Floats norm0 = load(norm), norm1 = load(norm + kLanes);
  Floats best0 = load(best), best1 = load(best + kLanes);
  Floats second0 = load(second), second1 = load(second + kLanes);
  Floats slot0 = load(slot_bits), slot1 = load(slot_bits + kLanes);
  for (int64_t index = first; index < last; ++index) {
    const Tile tile = score_tile(panel, norm0, norm1, tiles, index);
#pragma GCC unroll 16
    for (int c = 0; c < kCodesPerTile; ++c) {
      const Floats here = splat_bits(int32_t(index * kCodesPerTile + c));
      const Floats s0 = tile.score[c][0], s1 = tile.score[c][1];
      // A score takes a place only where it compares less, so the lowest slot keeps a tie and NaN never enters.
      slot0 = pick(less(s0, best0), here, slot0);
      slot1 = pick(less(s1, best1), here, slot1);
      second0 = min(max(s0, best0), second0);
      second1 = min(max(s1, best1), second1);
      best0 = min(s0, best0);
      best1 = min(s1, best1);
    }
  }
  store(best, best0);
  store(best + kLanes, best1);
  store(second, second0);
  store(second + kLanes, second1);
  store(slot_bits, slot0);
  store(slot_bits + kLanes, slot1);
}

int64_t sift(const float* panel, const float* norm, const Tiles& tiles, int64_t count, const float* threshold,
             int32_t* slots) {
  const Floats norm0 = load(norm), norm1 = load(norm + kLanes);
  const Floats limit0 = load(threshold), limit1 = load(threshold + kLanes);
  int64_t found = 0;
  for (int64_t index = 0; index * kCodesPerTile < count; ++index) {
    const Tile tile = score_tile(panel, norm0, norm1, tiles, index);
    for (int c = 0; c < kCodesPerTile && index * kCodesPerTile + c < count; ++c) {
      slots[found] = int32_t(index * kCodesPerTile + c);
      found += any_not_greater(tile.score[c][0], limit0) || any_not_greater(tile.score[c][1], limit1);
    }
  }
  return found;
}

void contract(const double* panel, const double* code, int64_t channels, bool euclidean, double* score) {
  constexpr int kStep = kLanes / 2;
  Doubles sum[4] = {splat(0.0), splat(0.0), splat(0.0), splat(0.0)};
  if (euclidean) {
    for (int64_t d = 0; d < channels; ++d) {
      const Doubles e = splat(code[d]);
      for (int i = 0; i < 4; ++i) {
        const Doubles difference = sub(load(panel + d * kRows + i * kStep), e);
        sum[i] = add(sum[i], mul(difference, difference));
      }
    }
  } else {  // minus the dot product: negation is exact, so ties and order are those of the product
    for (int64_t d = 0; d < channels; ++d) {
      const Doubles e = splat(code[d]);
      for (int i = 0; i < 4; ++i) sum[i] = sub(sum[i], mul(load(panel + d * kRows + i * kStep), e));
    }
  }
  for (int i = 0; i < 4; ++i) store(score + i * kStep, sum[i]);
}

void transpose_words(const int32_t* const* rows, int64_t count, int64_t words, int32_t* out, int64_t stride) {
  for (int64_t half = 0; half < kRows; half += kLanes) {
    for (int64_t first = 0; first < words; first += kLanes) {
      const int64_t some = words - first < kLanes ? words - first : kLanes;
      Ints block[kLanes] = {};
      for (int64_t i = 0; i < kLanes && half + i < count; ++i)
        block[i] = some == kLanes ? load(rows[half + i] + first) : load_some(rows[half + i] + first, some);
      transpose(block);
      for (int64_t w = 0; w < some; ++w) store(out + (first + w) * stride + half, block[w]);
    }
  }
}

}  // namespace filter
}  // namespace
}  // namespace vqkernels
