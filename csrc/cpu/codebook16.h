// The codebook as the integer filters read it: rounded to int16 and int8, packed in tiles, with a certificate.
//
// Why. An integer dot-product instruction does two (int16) or four (int8) times the work of a float32 one, and integer sums
// are exact, so the only error is the rounding of the operands, which is measured, not bounded a priori.
//
// Notation. A = S (z - mu) and B_j = S (e_j - mu) are real vectors (euclidean metric only; mu as in codebook.h, S any
// scale, the same for rows and codes, another for int8 than for int16). q and p_j are integer vectors, any at all; they are
// rint(A') and rint(B'_j), saturated, where A' is the float32 value of A, |A' - A| <= 4u |A|, u = 2^-24. Measured:
// rho = |A' - q| per row, and Delta = max_j (|B'_j - p_j| + 4u |B_j|).
// d_j = |A - B_j| is the true distance, D_j = |q - p_j| the integer one.
//
// Certificate. By the triangle inequality |d_j - D_j| <= w := rho + Delta + 4u|A|. Let 1 be any code. A code j that wins
// under the contract has d_j <= d_1 (1 + g), g = (D + 8) 2^-52 for the roundings of the float64 contract, hence
//     D_j <= d_j + w <= d_1 (1 + g) + w <= D_1 + 2 w',   w' = w + g (D_1 + w).
// The kernel computes F_j = b_j - q.p_j, b_j = floor(|p_j|^2 / 2) - c, exactly in int32. With G_j = |p_j|^2 / 2 - q.p_j,
// F_j + c <= G_j <= F_j + c + 1/2 and D_j^2 = 2 G_j + |q|^2, so every winner, and every tie of it, has
//     F_j <= G_j - c <= G_1 - c + 2 w' (D_1 + w') <= F_1 + 1 + 2 w' (D_1 + w') = T,   D_1^2 <= 2 (F_1 + c) + 1 + |q|^2,
// where |q| <= |A'| + rho. So the winners are among the tiles whose lowest F is at most T (int8 first, where it pays:
// few codes survive it), then among the codes of those tiles whose int16 F is at most the int16 T. One survivor is the
// answer; of a few the contract decides; a row with many goes to the float32 filter.
//
// No overflow. int16: G_j lies in [-Q^2 / 2, P^2 / 2 + P Q] for |q| <= Q, |p_j| <= P, an interval of length (P + Q)^2 / 2.
// S is chosen so that P + Q <= 90000, c puts the interval's middle at 0, and (90000)^2 / 4 < 2^31 - 1. Rows with |A| too
// large for that, or a NaN, go to the float32 filter; so does everything where S cannot be chosen. int8: |q|, |p_j| <=
// 128 sqrt(D), so c = 0 and D < 32768 suffice.
//
// Codes set aside. S follows the largest code, so a code far larger than the others would leave no bits to them. The codes
// with norms beyond `kAside` times the median are left out; none of them can win a row with |B_j| - |A| > d_1 (1 + g), the
// rows that are not so far from all of them go to the float32 filter.
#pragma once
#include <stdint.h>

#include <functional>
#include <mutex>
#include <vector>

#include "codebook.h"

namespace vqkernels {

// Runs f(first, last) over [0, count), possibly in several threads.
using Parallel = std::function<void(int64_t count, const std::function<void(int64_t, int64_t)>& f)>;

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
  bool fits(float norm) const { return norm * fine_certificate_.scale <= row_limit_; }

  // Whether a row so near to its best code, by that pass, cannot be nearer to a code set aside.
  bool clear_of_aside(const Certificate& pass, int32_t best, float norm, float residual) const;

 private:
  void choose_codes(const PackedCodebook& codebook);
  bool choose_scales(double code_norm, double coordinate, double row_norm);
  void pack(const PackedCodebook& codebook, const Parallel& parallel);
  void pack_fine_tiles() const;

  int64_t channels_, pairs_, quads_, per_tile_, stride_;
  std::vector<int32_t> slot_, bias_, coarse_;
  std::vector<int16_t> codes_;
  mutable std::once_flag fine_packed_;
  mutable std::vector<int32_t> fine_;
  Certificate fine_certificate_{}, coarse_certificate_{};
  double row_limit_ = 0.0, aside_ = 0.0;  // norm of the smallest code set aside, centred and scaled; 0: none is
  bool usable_ = false;
};

}  // namespace vqkernels
