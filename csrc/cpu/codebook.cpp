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

template <class T> bool finite_row(const T* row, int64_t channels) {
  for (int64_t d = 0; d < channels; ++d)
    if (!isfinite(double(widen(row[d])))) return false;
  return true;
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
    : source(codes), metric(m), sweep(s) {
  drop_equal_and_non_finite();
  centre_and_scale(rows != DType::f64);
  pack(certified);
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
    const bool finite = with_type(source.dtype, [&](auto* t) {
      return finite_row(reinterpret_cast<decltype(t)>(row), source.channels);
    });
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

void PackedCodebook::centre_and_scale(bool narrow_centre) {
  const int64_t channels = source.channels;
  wide_centre_.assign(channels, 0.0);
  centre_.assign(channels, 0.0f);
  if (metric == Metric::cosine) return;
  std::vector<double> code(channels);
  if (metric == Metric::euclidean && size() > 0) {
    for (int64_t slot = 0; slot < size(); ++slot) {
      widen_code(int32_t(slot), code.data());
      for (int64_t d = 0; d < channels; ++d) wide_centre_[d] += code[d] / double(size());
    }
    // Any centre is valid as long as rows and codes subtract the same one.
    for (int64_t d = 0; d < channels; ++d) {
      if (narrow_centre) wide_centre_[d] = double(float(wide_centre_[d]));
      centre_[d] = float(wide_centre_[d]);
    }
  }
  double largest = 0.0;
  for (int64_t slot = 0; slot < size(); ++slot) {
    widen_code(int32_t(slot), code.data());
    for (int64_t d = 0; d < channels; ++d) largest = std::max(largest, fabs(code[d] - wide_centre_[d]));
  }
  if (largest == 0.0) return;
  int exponent = 0;
  frexp(largest, &exponent);
  provable_ = isfinite(largest) && exponent <= 126 && exponent >= -126;
  scale_ = provable_ ? ldexpf(1.0f, -exponent) : 1.0f;
}

void PackedCodebook::pack(bool certified) {
  const int64_t channels = source.channels, per_tile = sweep.codes_per_tile;
  const double c = 1.02 * gamma(terms(channels));
  provable_ = provable_ && isfinite(c);
  error_ = certified && provable_ ? c : 0.0;
  codes_.assign(tile_count() * channels * per_tile, 0.0f);
  bias_.assign(tile_count() * per_tile, std::numeric_limits<float>::infinity());
  slope_.assign(tile_count() * per_tile, 0.0f);
  norm_.assign(size(), 0.0f);
  std::vector<double> code(channels);
  for (int64_t slot = 0; slot < size(); ++slot) {
    widen_code(int32_t(slot), code.data());
    if (metric == Metric::cosine) {
      // The contract's own norm where it is a normal number; elsewhere the direction is not provable.
      const double norm = contract_norm(code.data());
      const bool zero = std::all_of(code.begin(), code.end(), [](double x) { return x == 0.0; });
      const bool normal = norm > 0x1p-480 && norm < 0x1p480;
      if (!zero && !normal) provable_ = false;
      for (double& x : code) x = normal ? x / norm : 0.0;
    } else {
      for (int64_t d = 0; d < channels; ++d) code[d] = (code[d] - wide_centre_[d]) * double(scale_);
    }
    double square = 0.0;
    float* packed = codes_.data() + (slot / per_tile) * channels * per_tile + slot % per_tile;
    for (int64_t d = 0; d < channels; ++d) {
      square += code[d] * code[d];
      packed[d * per_tile] = -float(code[d]);
    }
    const double norm = sqrt(square) * (1.0 + 1e-6);
    const double half_square = metric == Metric::euclidean ? 0.5 * square : 0.0;
    norm_[slot] = float(norm);
    bias_[slot] = float(half_square * (1.0 - error_));
    slope_[slot] = -float(error_ * norm * (1.0 + 1e-6));
  }
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
