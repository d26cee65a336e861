#include "codebook.h"

#include <math.h>

#include <algorithm>
#include <limits>

namespace vqkernels {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

double gamma(double n) {
  const double nu = n * 0x1p-24;
  return nu < 0.01 ? nu / (1.0 - nu) : kInfinity;
}

double terms(int64_t channels) { return double(channels) + 16.0; }

constexpr int kPartials = 8;  // independent sums, so that compilers can use vectors

// Sum of f(d) over the channels, in no promised order.
template <class F> double sum_channels(int64_t channels, const F& f) {
  double part[kPartials] = {};
  int64_t d = 0;
  for (; d + kPartials <= channels; d += kPartials)
    for (int i = 0; i < kPartials; ++i) part[i] += f(d + i);
  for (; d < channels; ++d) part[0] += f(d);
  return ((part[0] + part[1]) + (part[2] + part[3])) + ((part[4] + part[5]) + (part[6] + part[7]));
}

// Whether all channels are finite: x - x is 0 for them and NaN otherwise.
template <class T> bool finite_row(const T* row, int64_t channels) {
  return sum_channels(channels, [row](int64_t d) { return double(widen(row[d])) - double(widen(row[d])); }) == 0.0;
}

uint64_t hash_bytes(const char* bytes, int64_t count) {
  uint64_t h = 0x9e3779b97f4a7c15ull;
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    uint64_t word;
    memcpy(&word, bytes + i, 8);
    h = (h ^ word) * 0xff51afd7ed558ccdull;
    h ^= h >> 32;
  }
  for (; i < count; ++i) h = (h ^ uint8_t(bytes[i])) * 0x100000001b3ull;
  return h ^ (h >> 29);
}

int64_t element_size(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

}  // namespace

PackedCodebook::PackedCodebook(const Codes& codes, DType rows, Metric m, bool certified, const Sweep& s)
    : source(codes), metric(m), sweep(s), narrow_(rows != DType::f64) {
  drop_equal_and_non_finite();
  const int64_t padded = (source.channels + 15) / 16 * 16;
  wide_centre_.assign(padded, 0.0);
  centre_.assign(padded, 0.0f);
  zero_.assign(padded, 0.0f);
  if (metric == Metric::euclidean && size() > 0) choose_centre();
  if (metric != Metric::cosine) choose_scale();
  measure(certified);
}

void PackedCodebook::drop_equal_and_non_finite() {
  const int64_t bytes = source.channels * element_size(source.dtype);
  const char* base = static_cast<const char*>(source.data);
  uint64_t capacity = 16;
  while (capacity < uint64_t(source.size) * 2) capacity *= 2;
  std::vector<int64_t> table(capacity, -1);
  index_.reserve(source.size);
  for (int64_t k = 0; k < source.size; ++k) {
    const char* row = base + k * bytes;
    const bool finite = with_type(
        source.dtype, [&](auto* t) { return finite_row(reinterpret_cast<decltype(t)>(row), source.channels); });
    if (!finite) continue;
    uint64_t at = hash_bytes(row, bytes) & (capacity - 1);
    while (table[at] >= 0 && memcmp(base + table[at] * bytes, row, bytes) != 0) at = (at + 1) & (capacity - 1);
    if (table[at] >= 0) continue;
    table[at] = k;
    index_.push_back(k);
  }
}

void PackedCodebook::widen_code(int32_t slot, double* code) const {
  with_type(source.dtype, [&](auto* t) {
    const auto* row = static_cast<decltype(t)>(source.data) + index_[slot] * source.channels;
    for (int64_t d = 0; d < source.channels; ++d) code[d] = double(widen(row[d]));
  });
}

double PackedCodebook::contract_norm(const double* code) const {
  double square = 0.0;
  for (int64_t d = 0; d < source.channels; ++d) square += code[d] * code[d];
  return sqrt(square);
}

// The mean of the codes, but for those far larger than the others, which would drag it away from them. Any centre is
// valid as long as rows and codes subtract the same one.
void PackedCodebook::choose_centre() {
  constexpr double kFar = 16.0;  // times the median square
  const int64_t channels = source.channels;
  with_type(source.dtype, [&](auto* t) {
    const auto* base = static_cast<decltype(t)>(source.data);
    std::vector<double> square(size());
    for (int64_t slot = 0; slot < size(); ++slot) {
      const auto* row = base + index_[slot] * channels;
      square[slot] = sum_channels(channels, [row](int64_t d) { return double(widen(row[d])) * double(widen(row[d])); });
    }
    std::vector<double> sorted = square;
    std::nth_element(sorted.begin(), sorted.begin() + sorted.size() / 2, sorted.end());
    const double limit = kFar * sorted[sorted.size() / 2];
    int64_t near = 0;
    for (int64_t slot = 0; slot < size(); ++slot) near += square[slot] <= limit;
    if (near == 0) return;  // squares beyond double: their centre is as good as any
    const double share = 1.0 / double(near);
    for (int64_t slot = 0; slot < size(); ++slot) {
      if (!(square[slot] <= limit)) continue;
      const auto* row = base + index_[slot] * channels;
      for (int64_t d = 0; d < channels; ++d) wide_centre_[d] += double(widen(row[d])) * share;
    }
  });
  for (int64_t d = 0; d < channels; ++d) {
    if (narrow_) wide_centre_[d] = double(float(wide_centre_[d]));
    centre_[d] = float(wide_centre_[d]);
  }
}

// A power of two that brings the largest coordinate below 1.
void PackedCodebook::choose_scale() {
  double largest = 0.0;
  with_type(source.dtype, [&](auto* t) {
    for (int64_t slot = 0; slot < size(); ++slot) {
      const auto* row = static_cast<decltype(t)>(source.data) + index_[slot] * source.channels;
      for (int64_t d = 0; d < source.channels; ++d) {
        const double x = fabs(double(widen(row[d])) - wide_centre_[d]);
        largest = x > largest ? x : largest;
      }
    }
  });
  if (largest == 0.0) return;
  int exponent = 0;
  frexp(largest, &exponent);
  provable_ = isfinite(largest) && exponent <= 126 && exponent >= -126;
  scale_ = provable_ ? ldexpf(1.0f, -exponent) : 1.0f;
}

void PackedCodebook::prepare(int32_t slot, double* code) const {
  widen_code(slot, code);
  if (metric != Metric::cosine) {
    for (int64_t d = 0; d < source.channels; ++d) code[d] = (code[d] - wide_centre_[d]) * double(scale_);
    return;
  }
  // The contract's own norm where it is a normal number; elsewhere the direction is not provable.
  const double norm = contract_norm(code);
  const bool normal = norm > 0x1p-480 && norm < 0x1p480;
  for (int64_t d = 0; d < source.channels; ++d) code[d] = normal ? code[d] / norm : 0.0;
}

void PackedCodebook::measure(bool certified) {
  const double c = 1.02 * gamma(terms(source.channels));
  norm_.resize(size());
  extent_.resize(size());
  std::vector<double> code(source.channels);
  for (int64_t slot = 0; slot < size(); ++slot) {
    prepare(int32_t(slot), code.data());
    const double norm = sqrt(sum_channels(source.channels, [&](int64_t d) { return code[d] * code[d]; }));
    double largest = 0.0;
    for (const double x : code) largest = fabs(x) > largest ? fabs(x) : largest;
    norm_[slot] = float(norm * (1.0 + 1e-6));
    extent_[slot] = float(largest * (1.0 + 1e-6));
    if (metric != Metric::cosine || norm > 0.0) continue;
    widen_code(int32_t(slot), code.data());
    if (!std::all_of(code.begin(), code.end(), [](double x) { return x == 0.0; })) provable_ = false;
  }
  provable_ = provable_ && isfinite(c);
  error_ = certified && provable_ ? c : 0.0;
}

Tiles PackedCodebook::tiles() const {
  std::call_once(packed_, [this] { pack(); });
  return {codes_.data(), bias_.data(), slope_.data(), source.channels};
}

void PackedCodebook::pack() const {
  const int64_t channels = source.channels, per_tile = sweep.codes_per_tile;
  codes_.assign(tile_count() * channels * per_tile, 0.0f);
  bias_.assign(tile_count() * per_tile, std::numeric_limits<float>::infinity());
  slope_.assign(tile_count() * per_tile, 0.0f);
  std::vector<double> code(channels);
  for (int64_t slot = 0; slot < size(); ++slot) {
    prepare(int32_t(slot), code.data());
    float* packed = codes_.data() + (slot / per_tile) * channels * per_tile + slot % per_tile;
    for (int64_t d = 0; d < channels; ++d) packed[d * per_tile] = -float(code[d]);
    const double square = sum_channels(channels, [&](int64_t d) { return code[d] * code[d]; });
    const double norm = sqrt(square) * (1.0 + 1e-6);
    const double half_square = metric == Metric::euclidean ? 0.5 * square : 0.0;
    bias_[slot] = float(half_square * (1.0 - error_));
    slope_[slot] = -float(error_ * norm * (1.0 + 1e-6));
  }
}

PackedCodebook::Code PackedCodebook::code(int32_t slot, float* buffer) const {
  if (source.dtype == DType::f32 && narrow_ && metric != Metric::cosine)
    return {static_cast<const float*>(source.data) + index_[slot] * source.channels, centre(), scale()};
  std::vector<double> wide(source.channels);
  prepare(slot, wide.data());
  for (int64_t d = 0; d < source.channels; ++d) buffer[d] = float(wide[d]);
  return {buffer, zero_.data(), 1.0f};
}

float PackedCodebook::threshold(float best, float norm, int32_t slot) const {
  constexpr float kUnlimited = std::numeric_limits<float>::infinity();
  // Norms above 2^60 could overflow a product; a NaN or infinite norm fails the comparison too.
  if (!provable_ || !(norm < 0x1p60f)) return kUnlimited;
  const double n = terms(source.channels);
  const double a = double(norm) * (1.0 + 2.0 * error_), b = norm_[slot];
  const double half_square = metric == Metric::euclidean ? 0.5 * b * b : 0.0;
  const double contract = metric == Metric::euclidean ? n * 0x1p-52 * (a + b) * (a + b) : 0.0;
  const double underflow = 4.0 * n * (0x1p-123 * (1.0 + a) + error_ * 0x1p-62);
  const double limit = double(best) + 2.0 * error_ * (1.0 + 1e-4) * (half_square + a * b) + contract + underflow;
  return nextafterf(float(limit), kUnlimited);
}

}  // namespace vqkernels
