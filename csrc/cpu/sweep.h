// The inner kernels of the search, one set per SIMD level, chosen at run time. Raw pointers only.
//
// Layout. `rows()` rows of z form a panel [channel][row]: a row is a lane, so minima, indices and ties never cross lanes.
// Codes are packed as [tile][channel][code in tile], negated. One tile gives rows() x codes_per_tile() scores that live
// and die in registers: no score is ever written to memory.
#pragma once
#include <stdint.h>

#include "level.h"

namespace vqkernels {

// A lower bound on the score of code j for row i is  bias[j] + slope[j] * norm[i] - z_i . e_j  (see codebook.h).
struct Tiles {
  const float* codes;  // [tile][channel][code], negated; padding codes are 0
  const float* bias;   // [tile][code]; padding +inf
  const float* slope;  // [tile][code]; padding 0
  int64_t channels;
};

// The integer filter's codes (see codebook16.h): the score of code j for row i is  bias[j] - q_i . p_j  in int32. A tile is
// one row of biases (padding INT32_MAX), then one row of codes per pair of channels: two int16 a word, negated.
struct IntegerTiles {
  const int32_t* codes;  // [tile][1 + pair][code]
  int64_t pairs;         // at least 1
};

struct Sweep {
  Level level;
  int rows;            // rows per panel
  int codes_per_tile;

  // Centres and scales a panel in place, x <- (x - centre[d]) * scale, and writes each row's Euclidean norm, which is
  // NaN or infinite where the row holds a non-finite value or leaves the range of float.
  void (*prepare)(float* panel, const float* centre, float scale, int64_t channels, float* norm);

  // Running minimum, second minimum and slot of the minimum over tiles [first, last), in ascending order with a strict
  // comparison: the lowest slot wins a tie, and NaN never wins.
  void (*sweep)(const float* panel, const float* norm, const Tiles& tiles, int64_t first, int64_t last, float* best,
                float* second, int32_t* slot);

  // Slots, ascending, at which some row's bound is not above its threshold (or is NaN). Returns how many.
  int64_t (*sift)(const float* panel, const float* norm, const Tiles& tiles, int64_t count, const float* threshold,
                  int32_t* slots);

  // The contract for rows() rows [channel][row] in double against one code: channels in order, every operation rounded
  // separately. `euclidean`: the squared distance; otherwise minus the dot product.
  void (*contract)(const double* panel, const double* code, int64_t channels, bool euclidean, double* score);

  // Rounds a prepared panel to int16, q = rint(scale * x), two channels a word: [pair][row]. Writes for each row
  // |scale * x - q| (`residual`), |q|^2 modulo 2^32 (`square`) and the largest |scale * x| (`largest`).
  // Null where the level has no integer filter.
  void (*quantize)(const float* panel, float scale, int64_t channels, int32_t* out, float* residual, uint32_t* square,
                   float* largest);

  // As `sweep`, for the integer scores.
  void (*sweep16)(const int32_t* panel, const IntegerTiles& tiles, int64_t first, int64_t last, int32_t* best,
                  int32_t* second, int32_t* slot);
};

extern const Sweep kSweepBaseline;
#if defined(__x86_64__)
extern const Sweep kSweepAvx2;
extern const Sweep kSweepAvx512;
extern const Sweep kSweepVnni;
#endif

inline const Sweep& active_sweep() {
#if defined(__x86_64__)
  switch (active_level()) {
    case Level::vnni: return kSweepVnni;
    case Level::avx512: return kSweepAvx512;
    case Level::avx2: return kSweepAvx2;
    default: return kSweepBaseline;
  }
#else
  return kSweepBaseline;
#endif
}

}  // namespace vqkernels
