// The inner kernels of the integer filters, one set per SIMD level that has 16-bit multiply-adds. Raw pointers only.
//
// Layout. A row or a code is a sequence of 32-bit words: two int16 (fine) or four int8 (coarse) channels a word. Rows
// of a panel are lanes, [word][row]; codes are packed [tile][1 + word][code in tile], negated, the first line of a tile
// being its biases (padding INT32_MAX, words 0). The score of code j for row i is  bias[j] - q_i . p_j  in int32.
// Coarse rows are stored with 128 added, as the instruction wants one unsigned operand; the biases make up for it.
// For scores one by one there are plain fine rows and codes too, padded with zeros to a multiple of kFineStep channels.
#pragma once
#include <stdint.h>

namespace vqkernels {

struct IntegerTiles {
  const int32_t* codes;
  int64_t words;  // per code, at least 1
};

// The constants of T, for one filter; see codebook16.h.
struct Certificate {
  float row_scale;   // S, of the centred and scaled rows
  float code_scale;  // R, of the codes
  bool triangle;     // S = R, and the metric is a distance
  double residual;   // Delta
  double code_norm;  // E
  double middle;     // c
  double bias;       // how far the biases may be off, at least 1
  double roundings;  // (D + 8) u, u = 2^-24
  double contract;   // (D + 8) 2^-52
};

struct IntegerKernels {
  // Rounds a prepared panel, [channel][row], to whole words: q = rint(fine_scale * x), saturated, and the same in int8
  // where `coarse` is not null. Writes |scale * x - q| of each row and rounding.
  void (*round)(const float* panel, float fine_scale, float coarse_scale, int64_t channels, int32_t* fine,
                int32_t* coarse, float* residual, float* coarse_residual);

  // Lowest score of each tile in [first, last), [tile - first][row], and the running minimum of each row.
  void (*sweep_fine)(const int32_t* panel, const IntegerTiles& tiles, int64_t first, int64_t last, int32_t* lowest,
                     int32_t* best);
  void (*sweep_coarse)(const int32_t* panel, const IntegerTiles& tiles, int64_t first, int64_t last, int32_t* lowest,
                       int32_t* best);  // null where the level has no 8-bit dot product

  // T of `rows` rows from their smallest scores, as int32; INT32_MAX where it does not fit or is NaN.
  void (*limits)(const Certificate& certificate, const int32_t* best, const float* norm, const float* residual,
                 int32_t* limit);

  // Numbers  tile * rows + row  of the entries of `lowest` (tiles, rows) that are not above their row's limit,
  // ascending, and their values. Returns how many.
  int64_t (*scan)(const int32_t* lowest, int64_t tiles, const int32_t* limit, int32_t* number, int32_t* value);

  // Numbers, ascending, of the codes of one tile whose scores for one row of a panel are not above the limit. Room for
  // a tile's codes is needed. Returns how many.
  int64_t (*pick_fine)(const int32_t* row, const IntegerTiles& tiles, int64_t tile, int32_t limit, int32_t* numbers);
  int64_t (*pick_coarse)(const int32_t* row, const IntegerTiles& tiles, int64_t tile, int32_t limit, int32_t* numbers);

  // Fine scores of the numbered codes for one plain row; returns the lowest.
  int32_t (*score)(const int16_t* row, const int16_t* codes, const int32_t* bias, int64_t stride,
                   const int32_t* numbers, int64_t count, int32_t* scores);
};

constexpr int kFineStep = 32;  // channels

}  // namespace vqkernels
