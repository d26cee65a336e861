// The codebook as the integer filter reads it: rounded to int16 at a common scale, packed in tiles, with a certificate.
//
// Why. A 16-bit multiply-add instruction does twice the work of a float32 one, and integer sums are exact, so the only
// error is the rounding of the operands, which is measured, not bounded a priori.
//
// Notation. A = S (z - mu) and B_j = S (e_j - mu) are real vectors (euclidean metric only; mu as in codebook.h, S any
// scale, the same for rows and codes). q = rint(A') and p_j = rint(B_j) are the integer vectors, A' the float32 value of
// A with |A' - A| <= 4u |A|, u = 2^-24. Measured: rho = |A' - q| per row, and Delta = max_j |B_j - p_j|.
// d_j = |A - B_j| is the true distance, D_j = |q - p_j| the integer one.
//
// Certificate. By the triangle inequality |d_j - D_j| <= w := rho + Delta + 4u|A|. Let 1 be any code. A code j that wins
// under the contract has d_j <= d_1 (1 + g), g = (D + 8) 2^-52 for the roundings of the float64 contract, hence
//     D_j <= d_j + w <= d_1 (1 + g) + w <= D_1 + 2 w',   w' = w + g (D_1 + w).
// The kernel computes F_j = b_j - q.p_j, b_j = floor(|p_j|^2 / 2) - c, exactly in int32. With G_j = |p_j|^2 / 2 - q.p_j,
// F_j + c <= G_j <= F_j + c + 1/2 and D_j^2 = 2 G_j + |q|^2, so every winner, and every tie of it, has
//     F_j <= G_j - c <= G_1 - c + 2 w' (D_1 + w') <= F_1 + 1 + 2 w' (D_1 + w') = T,   D_1^2 <= 2 (F_1 + c) + 1 + |q|^2.
// If 1 is the slot of the smallest F and the second smallest is above T, slot 1 is the answer. Otherwise the row goes to
// the float32 filter.
//
// No overflow. G_j lies in [-Q^2 / 2, P^2 / 2 + P Q] for |q| <= Q, |p_j| <= P, an interval of length (P + Q)^2 / 2. S is
// chosen so that P + Q <= 90000, c puts the interval's middle at 0, and (90000)^2 / 4 < 2^31 - 1. Rows with |q| > Q, or a
// coordinate that does not fit int16, or a NaN, go to the float32 filter; so does everything where S cannot be chosen.
#pragma once
#include <stdint.h>

#include <vector>

#include "codebook.h"

namespace vqkernels {

class IntegerCodebook {
 public:
  // `row_norm` is the norm of a typical large row, centred and scaled as PackedCodebook's rows are; NaN: do not pack.
  IntegerCodebook(const PackedCodebook& codebook, double row_norm);

  bool usable() const { return usable_; }
  float scale() const { return scale_; }  // of the prepared rows of PackedCodebook
  IntegerTiles tiles() const { return {codes_.data(), pairs_}; }
  int64_t pairs() const { return pairs_; }

  // Whether a row may be swept: its coordinates fit int16, and its norm (of the prepared row) leaves no room to overflow.
  bool fits(float largest, float norm) const { return largest <= 32767.0f && norm * scale_ <= row_limit_; }

  // T of the certificate. `norm` as in `fits`; `residual` and `square` as measured by Sweep::quantize.
  double threshold(int32_t best, float norm, float residual, uint32_t square) const;

 private:
  int64_t channels_, pairs_;
  std::vector<int32_t> codes_;
  float scale_ = 0.0f;
  double row_limit_ = 0.0, code_residual_ = 0.0, middle_ = 0.0;
  bool usable_ = false;
};

}  // namespace vqkernels
