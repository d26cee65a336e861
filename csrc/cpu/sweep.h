// The inner kernels of the search, one set per SIMD level (kernels.h). Raw pointers only.
//
// Layout. `rows` rows of z form a panel [channel][row]: a row is a lane, so minima, indices and ties never cross lanes.
// Codes are packed as [tile][channel][code in tile], negated. One tile gives rows x codes_per_tile scores that live
// and die in registers: no score is ever written to memory.
#pragma once
#include <stdint.h>

#include "integers.h"

namespace vqkernels {

// A lower bound on the score of code j for row i is  bias[j] + slope[j] * norm[i] - z_i . e_j  (see codebook.h).
struct Tiles {
  const float* codes;  // [tile][channel][code], negated; padding codes are 0
  const float* bias;   // [tile][code]; padding +inf
  const float* slope;  // [tile][code]; padding 0
  int64_t channels;
};

struct Sweep {
  int rows;  // of a panel
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

  // The contract for `rows` rows [channel][row] in double against one code: channels in order, every operation rounded
  // separately. `euclidean`: the squared distance; otherwise minus the dot product.
  void (*contract)(const double* panel, const double* code, int64_t channels, bool euclidean, double* score);

  // Transposes 32-bit words: out[word * stride + i] = rows[i][word] for i < rows and word < words; zeros from `count`
  // on. Reads nothing behind a row's last word.
  void (*transpose)(const int32_t* const* rows, int64_t count, int64_t words, int32_t* out, int64_t stride);

  const IntegerKernels* integers;  // null where the level has no integer filter
};

}  // namespace vqkernels
