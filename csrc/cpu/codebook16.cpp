#include "codebook16.h"

#include <math.h>
#include <string.h>

#include <algorithm>
#include <limits>
#include <mutex>

namespace vqkernels {
namespace {

constexpr double kNorms = 90000.0;       // P + Q
constexpr double kByte = 127.0;          // a code's largest int8
constexpr double kCoordinate = 32766.0;  // of a code: one below int16's limit, so that rint cannot pass it
constexpr double kLargestNorm = 64000.0;
constexpr float kAside = 4.0f;
constexpr int64_t kMostAside = 16;  // one code in so many
constexpr int64_t kCoarseChannels = 32767;
constexpr int64_t kPadding = 16;  // words behind the last tile that IntegerKernels::pick may read

double unit(int64_t channels) { return double(channels + 8) * 0x1p-24; }

}  // namespace

IntegerCodebook::IntegerCodebook(const PackedCodebook& codebook, double row_norm, const Parallel& parallel)
    : channels_(codebook.source.channels),
      pairs_((channels_ + 1) / 2),
      quads_((channels_ + 3) / 4),
      per_tile_(codebook.sweep.codes_per_tile),
      stride_((channels_ + kFineStep - 1) / kFineStep * kFineStep),
      euclidean_(codebook.metric == Metric::euclidean) {
  if (codebook.size() < 2 || !codebook.provable() || !(row_norm >= 0.0)) return;
  choose_codes(codebook);
  double code_norm = 0.0, coordinate = 0.0;
  for (const int32_t slot : slot_) {
    code_norm = std::max(code_norm, double(codebook.norm(slot)));
    coordinate = std::max(coordinate, double(codebook.extent(slot)));
  }
  if (!choose_scales(code_norm, coordinate, row_norm)) return;
  pack(codebook, parallel);
  usable_ = true;
}

// Leaves out codes far larger than the others, where they are few.
void IntegerCodebook::choose_codes(const PackedCodebook& codebook) {
  std::vector<float> norms(codebook.size());
  for (int64_t slot = 0; slot < codebook.size(); ++slot) norms[slot] = codebook.norm(int32_t(slot));
  std::vector<float> sorted = norms;
  std::nth_element(sorted.begin(), sorted.begin() + sorted.size() / 2, sorted.end());
  const float limit = kAside * sorted[sorted.size() / 2];
  const int64_t beyond = std::count_if(norms.begin(), norms.end(), [&](float n) { return n > limit; });
  const bool leave_out = euclidean_ && beyond > 0 && beyond * kMostAside <= codebook.size();
  slot_.reserve(codebook.size());
  for (int64_t slot = 0; slot < codebook.size(); ++slot) {
    if (!leave_out || norms[slot] <= limit) slot_.push_back(int32_t(slot));
    else aside_ = aside_ > 0.0 ? std::min(aside_, double(norms[slot])) : double(norms[slot]);
  }
  aside_ *= 1.0 - 1e-5;  // the norms are rounded up
}

bool IntegerCodebook::choose_scales(double code_norm, double coordinate, double row_norm) {
  if (!(code_norm > 0.0)) return false;
  const double rows = std::max(row_norm, 1e-30), root = sqrt(double(channels_));
  // Rounding adds at most half a unit per coordinate to either norm.
  const double slack = 0.5 * root + 1.0, half = 0.5 * kNorms - slack;
  const double contract = double(channels_ + 8) * 0x1p-52;
  double row_scale, code_scale, middle = 0.0;
  if (euclidean_) {
    row_scale = code_scale = std::min({(kNorms - 2.0 * slack) / (code_norm + row_norm), kCoordinate / coordinate,
                                       (kLargestNorm - slack) / std::max(code_norm, row_norm)});
  } else {
    row_scale = half / rows;
    code_scale = std::min(half / code_norm, kCoordinate / coordinate);
  }
  row_scale = double(float(row_scale * (1.0 - 1e-6)));
  code_scale = double(float(code_scale * (1.0 - 1e-6)));
  if (!isfinite(row_scale) || !(code_scale * code_norm > 16.0)) return false;  // codes that vanish beside z
  row_limit_ = half;
  if (euclidean_) {
    const double norms_p = code_norm * code_scale + slack, norms_q = std::min(kNorms - norms_p, kLargestNorm);
    row_limit_ = norms_q - slack;
    middle = floor(0.5 * (0.5 * norms_p * norms_p + norms_p * norms_q - 0.5 * norms_q * norms_q));
  }
  fine_certificate_ = {float(row_scale), float(code_scale), euclidean_, 0.0, code_norm * code_scale, middle, 1.0,
                       unit(channels_),  contract};
  // int8. A row's coordinates may be saturated, a code's may not: rows are many, and each has a residual of its own.
  const double byte_codes = double(float(kByte * (1.0 - 1e-6) / coordinate));
  const double byte_rows = double(float(std::min(kByte * root / (2.9 * rows), 4.0 * kByte * root / code_norm)));
  // The norms that the biases are made from are at most 1.2e-6 too large.
  const double bias = 1.0 + 3e-6 * (0.5 * code_norm * code_norm * byte_rows * byte_codes);
  coarse_certificate_ = {float(byte_rows), float(byte_codes), false, 0.0, code_norm * byte_codes, 0.0, bias,
                         unit(channels_),  contract};
  return isfinite(byte_codes) && isfinite(byte_rows);
}

// Codes are rounded by the kernel that rounds rows, a panel of them at a time.
void IntegerCodebook::pack(const PackedCodebook& codebook, const Parallel& parallel) {
  const Sweep& sweep = codebook.sweep;
  const IntegerKernels& kernels = *sweep.integers;
  const int64_t lanes = sweep.rows, words = (quads_ + 1) * per_tile_, panels = (size() + lanes - 1) / lanes;
  const bool coarse = kernels.sweep_coarse != nullptr && channels_ <= kCoarseChannels;
  const float fine_scale = fine_certificate_.code_scale, coarse_scale = coarse_certificate_.code_scale;
  const double half_ratio = euclidean_ ? 0.5 * double(coarse_certificate_.row_scale) * double(coarse_scale) : 0.0;
  const double slack = 1.0 + 4.0 * unit(channels_);
  codes_.resize(size() * stride_);
  bias_.resize(size());
  if (coarse) {
    coarse_.resize(tile_count() * words + kPadding);
    for (int64_t number = size(); number < tile_count() * per_tile_; ++number)  // padding codes
      coarse_[number / per_tile_ * words + number % per_tile_] = std::numeric_limits<int32_t>::max();
  }
  std::mutex mutex;
  parallel(panels, [&](int64_t first, int64_t last) {
    std::vector<float> rows(lanes * channels_), panel(lanes * channels_), norm(lanes), lost(lanes), coarse_lost(lanes);
    std::vector<int32_t> fine(lanes * 2 * quads_), bytes(lanes * quads_);
    std::vector<const int32_t*> at(lanes);
    double fine_residual = 0.0, coarse_residual = 0.0;
    for (int64_t p = first; p < last; ++p) {
      const int64_t begin = p * lanes, some = std::min(lanes, size() - begin);
      PackedCodebook::Code code{};
      for (int64_t i = 0; i < some; ++i) {
        code = codebook.code(slot_[begin + i], &rows[i * channels_]);
        at[i] = reinterpret_cast<const int32_t*>(code.data);
      }
      sweep.transpose(at.data(), some, channels_, reinterpret_cast<int32_t*>(panel.data()), lanes);
      sweep.prepare(panel.data(), code.centre, code.scale, channels_, norm.data());
      kernels.round(panel.data(), fine_scale, coarse_scale, channels_, fine.data(), coarse ? bytes.data() : nullptr,
                    lost.data(), coarse_lost.data());
      for (int64_t i = 0; i < some; ++i) {
        const int64_t number = begin + i;
        const double rounding = 4.0 * 0x1p-24 * double(codebook.norm(slot_[number]));
        fine_residual = std::max(fine_residual, lost[i] * slack + rounding * fine_scale);
        int16_t* plain = &codes_[number * stride_];
        int64_t square = 0;
        for (int64_t w = 0; w < pairs_; ++w) {
          const uint32_t word = uint32_t(fine[w * lanes + i]);
          const int32_t even = int16_t(word), odd = int16_t(word >> 16);
          square += int64_t(even) * even + int64_t(odd) * odd;
          plain[2 * w] = int16_t(-even);
          plain[2 * w + 1] = int16_t(-odd);
        }
        bias_[number] = euclidean_ ? int32_t((square >> 1) - int64_t(fine_certificate_.middle)) : 0;
        if (!coarse) continue;
        coarse_residual = std::max(coarse_residual, coarse_lost[i] * slack + rounding * coarse_scale);
        int32_t* packed = &coarse_[number / per_tile_ * words + number % per_tile_];
        int32_t sum8 = 0;
        for (int64_t w = 0; w < quads_; ++w) {
          const uint32_t word = uint32_t(bytes[w * lanes + i]) ^ 0x80808080u;
          uint32_t negated = 0;
          for (int j = 0; j < 4; ++j) {
            const int32_t x = int8_t(word >> (8 * j));  // at least -127: the scale is the largest coordinate's
            sum8 += x;
            negated |= uint32_t(uint8_t(-x)) << (8 * j);
          }
          packed[(1 + w) * per_tile_] = int32_t(negated);
        }
        const double norm_of = codebook.norm(slot_[number]);
        packed[0] = int32_t(nearbyint(half_ratio * norm_of * norm_of)) + 128 * sum8;
      }
    }
    const std::lock_guard<std::mutex> lock(mutex);
    fine_certificate_.residual = std::max(fine_certificate_.residual, fine_residual);
    coarse_certificate_.residual = std::max(coarse_certificate_.residual, coarse_residual);
  });
}

IntegerTiles IntegerCodebook::fine_tiles() const {
  std::call_once(fine_packed_, [this] { pack_fine_tiles(); });
  return {fine_.data(), pairs_};
}

void IntegerCodebook::pack_fine_tiles() const {
  const int64_t words = (pairs_ + 1) * per_tile_;
  fine_.resize(tile_count() * words + kPadding);
  for (int64_t number = 0; number < tile_count() * per_tile_; ++number) {
    int32_t* packed = &fine_[number / per_tile_ * words + number % per_tile_];
    packed[0] = number < size() ? bias_[number] : std::numeric_limits<int32_t>::max();
    if (number >= size()) continue;
    const int16_t* plain = &codes_[number * stride_];
    for (int64_t w = 0; w < pairs_; ++w) memcpy(&packed[(1 + w) * per_tile_], &plain[2 * w], sizeof(int32_t));
  }
}

bool IntegerCodebook::clear_of_aside(const Certificate& c, int32_t best, float norm, float residual) const {
  if (aside_ == 0.0) return true;
  // In units of A; the squared distance to the code with this score is at most 2 (F + c + m + 1) S / R + |A|^2.
  const double slack = 1.0 + 4.0 * c.roundings, length = double(norm) * double(c.row_scale) * slack;
  const double rho = double(residual) * slack + 4.0 * 0x1p-24 * length, q = length + rho;
  double reach;
  if (c.triangle) {
    reach = sqrt(std::max(0.0, 2.0 * (double(best) + c.middle) + 1.0 + q * q)) + rho + c.residual;
  } else {
    const double worst = double(best) + rho * c.code_norm + q * c.residual + c.bias;
    reach = sqrt(std::max(0.0, 2.0 * worst * double(c.row_scale) / double(c.code_scale) + length * length));
  }
  return aside_ * double(c.row_scale) - length > reach * (1.0 + 1e-6);
}

}  // namespace vqkernels
