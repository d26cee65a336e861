// The codebook as the filter reads it: centred, scaled, rounded to float32, packed in tiles, with a proved lower bound.
//
// Notation. a = s (z - mu) and b_j = s (e_j - mu) are real vectors: s a power of two that brings the largest coordinate
// of b below 1, mu the mean code for the euclidean metric and 0 otherwise; for cosine b_j = e_j / |e_j| and a = z. The
// score is t_j = h_j - a.b_j with h_j = |b_j|^2 / 2 (euclidean) or 0, so the metric's order is the order of t_j; for
// euclidean, s^2 S_j = 2 t_j + |a|^2.
//
// Bound. The filter holds a' and b'_j, each coordinate rounded to float32 (relative error <= u = 2^-24, or absolute
// <= 2^-126 where it would be subnormal), and accumulates fl(h_j) - a'.b'_j in any order, fused or not, in at most D +
// 3 roundings per term. By the standard result |fl(x.y) - x.y| <= gamma_n |x|.|y|, gamma_n = n u / (1 - n u), and
// Cauchy-Schwarz, the computed score differs from t_j by at most
//     err_ij = c (h_j + |a_i| |b_j|) + eta_i,   c = 1.02 gamma_{D+16},   eta_i = (D+16) (2^-123 (1 + |a_i|) + c 2^-62).
// Of the D + 16, D + 3 are the accumulation, 2 the operands, 1 is fl(h_j), the rest and the factor 1.02 (gamma < 0.01
// is required) cover the roundings of the bound's own terms and of the measured |a_i|; eta covers underflow, also in
// |a_i|. For dot and cosine they also cover the contract's own float64 roundings, which are 2^-29 of these.
// The bound is folded into the pack: bias_j = h_j (1 - c), slope_j = -c |b_j|, so the kernel computes
//     L_ij = bias_j + slope_j |a_i| - a'.b'_j <= t_ij + eta_i
// at the price of one multiply-add per score, and every code carries its own error: one huge code spoils only itself.
//
// Certificate. Let 1 be the slot with the smallest L. Then t_1 <= L_1 + 2 err_1, and any code j that wins under the
// contract has t_j <= t_1 + g (|a| + |b_1|)^2, where g = (D + 8) 2^-52 covers the roundings of the float64 contract,
// which for the euclidean metric are relative to the squared distance (g = 0 for the others: see above).
// So every winner, and every tie of it, lies in {j : L_j <= T},  T = L_1 + 2 err_1 + g (|a| + |b_1|)^2 + eta.
// If the second smallest L is above T, slot 1 is the answer; otherwise the codes with L_j <= T are scored under the
// contract, in ascending order, with a strict comparison: the lowest index wins a tie.
//
// Equal codes are packed once, at their lowest index, and codes with a NaN or an infinity are left out: neither can
// win. Rows or codebooks outside the range in which the argument holds get T = +inf and are scored in full.
#pragma once
#include <stdint.h>

#include <mutex>
#include <vector>

#include "rows.h"
#include "sweep.h"

namespace vqkernels {

class PackedCodebook {
 public:
  // `certified` false packs without the error terms, for precision="fast": L_j is then the float32 score itself.
  // `rows` is z's type: unless it is double, the centre is rounded to float, so that rows subtract it in float.
  PackedCodebook(const Codes& codes, DType rows, Metric metric, bool certified, const Sweep& sweep);

  const Codes source;
  const Metric metric;
  const Sweep& sweep;

  // Packs the codes for the float32 sweep on the first call, from any thread.
  Tiles tiles() const;
  int64_t size() const { return int64_t(index_.size()); }  // distinct finite codes
  int64_t tile_count() const { return (size() + sweep.codes_per_tile - 1) / sweep.codes_per_tile; }
  int64_t index(int32_t slot) const { return index_[slot]; }
  const float* centre() const { return centre_.data(); }  // readable up to a multiple of 16 channels
  const double* wide_centre() const { return wide_centre_.data(); }
  float scale() const { return scale_; }
  bool provable() const { return provable_; }
  float norm(int32_t slot) const { return norm_[slot]; }      // of the centred and scaled code, rounded up
  float extent(int32_t slot) const { return extent_[slot]; }  // its largest coordinate, rounded up

  // T of the certificate for a row with centred norm `norm` whose smallest bound `best` is at `slot`.
  float threshold(float best, float norm, int32_t slot) const;

  // Code at `slot` widened to double, and its norm under the contract: float64, channels in order.
  void widen_code(int32_t slot, double* code) const;
  double contract_norm(const double* code) const;

  // Code at `slot` as a float32 row, (data - centre) * scale being the centred and scaled code within 4u; `buffer` has
  // room for its channels. For cosine it is the normalised code.
  struct Code {
    const float *data, *centre;
    float scale;
  };
  Code code(int32_t slot, float* buffer) const;

 private:
  void drop_equal_and_non_finite();
  void choose_centre();
  void choose_scale();
  void measure(bool certified);
  void prepare(int32_t slot, double* code) const;  // centred and scaled, or normalised
  void pack() const;

  bool narrow_;                 // rows and centre are float
  std::vector<int64_t> index_;  // slot -> code
  std::vector<float> centre_, zero_, norm_, extent_;
  std::vector<double> wide_centre_;
  float scale_ = 1.0f;
  double error_ = 0.0;  // c of the bound
  bool provable_ = true;
  mutable std::once_flag packed_;
  mutable std::vector<float> codes_, bias_, slope_;
};

}  // namespace vqkernels
