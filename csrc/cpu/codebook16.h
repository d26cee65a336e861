// The codebook as the integer filters read it: rounded to int16 and int8, packed in tiles, with certificates.
//
// Why. An integer dot-product instruction does two (int16) or four (int8) times the work of a float32 one, and integer
// sums are exact, so the only error is the rounding of the operands, which is measured, not bounded a priori.
//
// Notation. A = S (z - mu) and B_j = R (e_j - mu) are real vectors (mu as in codebook.h: 0 for dot and cosine, for
// which e_j is the normalised code; S and R any scales, others for int8 than for int16). q and p_j are integer vectors,
// any at all; they are rint(A') and rint(B'_j), saturated, where A' is the float32 value of A, |A' - A| <= 4u |A|, u =
// 2^-24. Measured: rho = |A - q| <= |A' - q| + 4u |A| per row, Delta >= |B_j - p_j| likewise, and E >= |B_j|.
// The kernel computes F_j = b_j - q.p_j exactly in int32. Let 1 be any code; a code j that wins under the contract is
// at least as good as 1 but for the roundings of the float64 contract, g = (D + 8) 2^-52.
//
// Certificate by products (Cauchy-Schwarz): int8, any metric; int16, dot and cosine.
//     |A.B_j - q.p_j| <= |A - q| |B_j| + |q| |B_j - p_j| <= m := rho E + |q| Delta.
// With b_j = rint(R S |e_j - mu|^2 / 2) for the euclidean metric and 0 otherwise, F_j is within m + 1 of R S times the
// score of the metric (half the squared distance but for a term of the row, or minus the product), so every winner, and
// every tie of it, has
//     F_j <= F_1 + 2 (m + 1) + 2 g (|A| sqrt(R / S) + E sqrt(S / R))^2 = T,
// 1 being the error of b_j, a little more where b_j is large: `bias`.
//
// Certificate by distances (triangle inequality): int16, euclidean, S = R. d_j = |A - B_j| is the true distance,
// D_j = |q - p_j| the integer one, and |d_j - D_j| <= w := rho + Delta. A winner has d_j <= d_1 (1 + g), hence
//     D_j <= d_j + w <= d_1 (1 + g) + w <= D_1 + 2 w',   w' = w + g (D_1 + w).
// With b_j = floor(|p_j|^2 / 2) - c and G_j = |p_j|^2 / 2 - q.p_j, F_j + c <= G_j <= F_j + c + 1/2 and D_j^2 = 2 G_j +
// |q|^2, so every winner, and every tie of it, has
//     F_j <= G_j - c <= G_1 - c + 2 w' (D_1 + w') <= F_1 + 1 + 2 w' (D_1 + w') = T,   D_1^2 <= 2 (F_1 + c) + 1 + |q|^2.
// It is the better one where rows are near to their codes, the other where codes are small beside z; S = R costs bits.
//
// So the winners are among the tiles whose lowest F is at most T (int8 first, where it pays: few codes survive it),
// then among the codes of those tiles whose int16 F is at most the int16 T. One survivor is the answer; of a few the
// contract decides; a row with many goes to the float32 filter.
//
// No overflow. int16, distances: G_j lies in [-Q^2 / 2, P^2 / 2 + P Q] for |q| <= Q, |p_j| <= P, an interval of length
// (P + Q)^2 / 2. S is chosen so that P + Q <= 90000, c puts the interval's middle at 0, and (90000)^2 / 4 < 2^31 - 1.
// int16, products: |F_j| <= P Q with P, Q <= 45000. Rows with |A| too large for that, or a NaN, go to the float32
// filter; so does everything where S cannot be chosen. int8: |q|, |p_j| <= 128 sqrt(D) and b_j <= 2 (128)^2 D, so D <
// 32768 suffices.
//
// Codes set aside. S follows the largest code, so a code far larger than the others would leave no bits to them. The
// codes with norms beyond `kAside` times the median are left out (euclidean metric); none of them can win a row for
// which |e_j - mu| - |z - mu| > d_1 (1 + g), the rows that are not so far from all of them go to the float32 filter.
#pragma once
#include <stdint.h>

#include <mutex>
#include <vector>

#include "codebook.h"
#include "parallel.h"

namespace vqkernels {

class IntegerCodebook {
 public:
  // `row_norm` is the norm of a typical large row, centred and scaled as PackedCodebook's rows are; NaN: do not pack.
  IntegerCodebook(const PackedCodebook& codebook, double row_norm, const Parallel& parallel);

  bool usable() const { return usable_; }
  bool has_coarse() const { return !coarse_.empty(); }
  int64_t size() const { return int64_t(slot_.size()); }
  int64_t tile_count() const { return (size() + per_tile_ - 1) / per_tile_; }
  int64_t pairs() const { return pairs_; }
  int64_t quads() const { return quads_; }
  int32_t slot(int64_t number) const { return slot_[number]; }  // of PackedCodebook

  IntegerTiles fine_tiles() const;  // packed on the first call, from any thread
  IntegerTiles coarse_tiles() const { return {coarse_.data(), quads_}; }
  // Plain fine codes, negated, `stride` channels apart, and their biases.
  const int16_t* codes() const { return codes_.data(); }
  const int32_t* bias() const { return bias_.data(); }
  int64_t stride() const { return stride_; }
  const Certificate& fine() const { return fine_certificate_; }
  const Certificate& coarse() const { return coarse_certificate_; }

  // Whether a row's norm (centred and scaled) leaves no room to overflow.
  bool fits(float norm) const { return norm * double(fine_certificate_.row_scale) <= row_limit_; }

  // Whether no code set aside can be nearer to a row than the code with this score is, by this pass.
  bool clear_of_aside(const Certificate& pass, int32_t best, float norm, float residual) const;

 private:
  void choose_codes(const PackedCodebook& codebook);
  bool choose_scales(double code_norm, double coordinate, double row_norm);
  void pack(const PackedCodebook& codebook, const Parallel& parallel);
  void pack_fine_tiles() const;

  int64_t channels_, pairs_, quads_, per_tile_, stride_;
  const bool euclidean_;
  std::vector<int32_t> slot_, bias_, coarse_;
  std::vector<int16_t> codes_;
  mutable std::once_flag fine_packed_;
  mutable std::vector<int32_t> fine_;
  Certificate fine_certificate_{}, coarse_certificate_{};
  double row_limit_ = 0.0, aside_ = 0.0;  // norm of the smallest code set aside, centred and scaled; 0: none is
  bool usable_ = false;
};

}  // namespace vqkernels
