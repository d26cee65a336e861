#include "codebook16.h"

#include <math.h>

#include <algorithm>
#include <limits>

namespace vqkernels {
namespace {

constexpr double kNorms = 90000.0;       // P + Q
constexpr double kCoordinate = 32766.0;  // of a code: one below int16's limit, so that rint cannot pass it
constexpr double kLargestNorm = 64000.0; // |q|^2 and |p|^2 fit 32 bits

}  // namespace

IntegerCodebook::IntegerCodebook(const PackedCodebook& codebook, double row_norm)
    : channels_(codebook.source.channels), pairs_((codebook.source.channels + 1) / 2) {
  if (codebook.metric != Metric::euclidean || codebook.size() < 2 || !codebook.provable() || !(row_norm >= 0.0))
    return;
  std::vector<double> code(channels_);
  double code_norm = 0.0, coordinate = 0.0;
  const auto prepared = [&](int64_t slot) {
    codebook.widen_code(int32_t(slot), code.data());
    for (int64_t d = 0; d < channels_; ++d)
      code[d] = (code[d] - codebook.wide_centre()[d]) * double(codebook.scale());
  };
  for (int64_t slot = 0; slot < codebook.size(); ++slot) {
    prepared(slot);
    double square = 0.0;
    for (double x : code) square += x * x, coordinate = std::max(coordinate, fabs(x));
    code_norm = std::max(code_norm, sqrt(square));
  }
  if (!(code_norm > 0.0)) return;
  // Rounding adds at most half a unit per coordinate to either norm.
  const double slack = 0.5 * sqrt(double(channels_)) + 1.0;
  const double scale = std::min({(kNorms - 2.0 * slack) / (code_norm + row_norm), kCoordinate / coordinate,
                                 (kLargestNorm - slack) / code_norm, (kLargestNorm - slack) / std::max(row_norm, 1e-30)});
  scale_ = float(scale * (1.0 - 1e-6));
  if (!(scale_ * code_norm > 16.0) || !isfinite(scale_)) return;  // codes that vanish beside z: nothing would be decided
  const double norms_p = code_norm * double(scale_) + slack;
  const double norms_q = std::min(kNorms - norms_p, kLargestNorm);
  row_limit_ = norms_q - slack;
  middle_ = floor(0.5 * (0.5 * norms_p * norms_p + norms_p * norms_q - 0.5 * norms_q * norms_q));

  const int64_t per_tile = codebook.sweep.codes_per_tile;
  const int64_t tile_words = (pairs_ + 1) * per_tile;
  codes_.assign(codebook.tile_count() * tile_words, 0);
  for (int64_t tile = 0; tile < codebook.tile_count(); ++tile)
    std::fill_n(&codes_[tile * tile_words], per_tile, std::numeric_limits<int32_t>::max());
  for (int64_t slot = 0; slot < codebook.size(); ++slot) {
    prepared(slot);
    int32_t* packed = codes_.data() + (slot / per_tile) * tile_words + slot % per_tile;
    double residual = 0.0, square = 0.0;
    for (int64_t d = 0; d < channels_; ++d) {
      const double x = code[d] * double(scale_), p = nearbyint(x);
      residual += (x - p) * (x - p);
      square += p * p;
      const uint32_t half = uint16_t(int16_t(-p));
      packed[(1 + d / 2) * per_tile] |= int32_t(half << (d % 2 * 16));
    }
    code_residual_ = std::max(code_residual_, sqrt(residual) * (1.0 + 1e-9));
    packed[0] = int32_t(floor(0.5 * square) - middle_);
  }
  usable_ = true;
}

double IntegerCodebook::threshold(int32_t best, float norm, float residual, uint32_t square) const {
  // `residual` is a float32 sum of D squares, `norm` likewise: both are at most 1e-2 low for any D that fits (D < 1e5).
  const double slack = 1.0 + 4.0 * double(channels_ + 8) * 0x1p-24;
  const double length = double(norm) * double(scale_) * slack;
  const double w = double(residual) * slack + code_residual_ + 4.0 * 0x1p-24 * length;
  const double nearest = sqrt(std::max(0.0, 2.0 * (double(best) + middle_) + 1.0 + double(square)));
  const double wide = w + double(channels_ + 8) * 0x1p-52 * (nearest + w);
  return double(best) + 1.0 + 2.0 * wide * (nearest + wide) * (1.0 + 1e-9);
}

}  // namespace vqkernels
