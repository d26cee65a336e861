#include "sample.h"

#include <math.h>

#include <algorithm>
#include <limits>

#include "counter.h"
#include "kernels.h"
#include "reading.h"

namespace vqkernels {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// A power of two that brings x below 1, and a finite one: 1 for 0.
double power_of_two_below_one_over(double x) {
  int exponent = 0;
  frexp(x, &exponent);
  return ldexp(1.0, -std::clamp(exponent, -1000, 1000));
}

// A row whose float32 scores overflow: in double, relative to the best score, so that one of them is 0.
int64_t sample_in_double(const Rows& rows, const SampleCodes& codes, double inverse_temperature, uint64_t key,
                         int64_t row) {
  const int64_t count = int64_t(codes.index.size());
  std::vector<double> x(rows.channels), score(count);
  read_row(rows, row, [&](int64_t d, double value) { x[d] = value; });
  double best = -kInfinity;
  for (int64_t k = 0; k < count; ++k) {
    double sum = 0.0;
    const bool euclidean = codes.metric == Metric::euclidean;
    read_code(codes.source, codes.index[k],
              [&](int64_t d, double e) { sum += euclidean ? -(x[d] - e) * (x[d] - e) : x[d] * e; });
    if (codes.metric == Metric::cosine) sum = codes.norm[k] > 0.0 ? sum / codes.norm[k] : 0.0;
    score[k] = sum;
    if (sum > best) best = sum;
  }
  int64_t chosen = 0;
  double highest = -kInfinity;
  for (int64_t k = 0; k < count; ++k) {
    uint32_t bits = uint32_t(codes.index[k]);
    to_bits(bits, uint32_t(key), uint32_t(key >> 32));
    const double behind = score[k] - best;
    const double total = (behind == 0.0 ? 0.0 : behind * inverse_temperature) + gumbel(bits);
    if (total > highest) highest = total, chosen = k;
  }
  return chosen;
}

}  // namespace

double gumbel(uint32_t bits) { return -log(-log1p(-(double(bits) + 0.5) * 0x1p-32)); }

SampleCodes::SampleCodes(const Codes& codebook, Metric by)
    : source(codebook), metric(by), channels(codebook.channels), centre(codebook.channels, 0.0), scale(1.0) {
  for (int64_t k = 0; k < codebook.size; ++k) {
    double poison = 0.0;
    read_code(codebook, k, [&](int64_t, double e) { poison += e * 0.0; });
    if (poison == 0.0) index.push_back(int32_t(k));
  }
  const double share = 1.0 / double(std::max<size_t>(index.size(), 1));
  if (metric == Metric::euclidean)
    for (int32_t k : index) read_code(codebook, k, [&](int64_t d, double e) { centre[d] += e * share; });
  double largest = 0.0;
  for (int32_t k : index)
    read_code(codebook, k, [&](int64_t d, double e) { largest = std::max(largest, fabs(e - centre[d])); });
  scale = metric == Metric::cosine ? 1.0 : power_of_two_below_one_over(largest);
  codes.resize(index.size() * channels);
  for (size_t slot = 0; slot < index.size(); ++slot) {
    double factor = scale;
    if (metric == Metric::cosine) {
      double square = 0.0;
      read_code(codebook, index[slot], [&](int64_t, double e) { square += e * e; });
      norm.push_back(sqrt(square));
      factor = norm.back() > 0.0 ? 1.0 / norm.back() : 0.0;
    }
    float* out = &codes[slot * channels];
    read_code(codebook, index[slot], [&](int64_t d, double e) { out[d] = float((e - centre[d]) * factor); });
  }
}

void sample_rows(const Rows& rows, const SampleCodes& codes, double temperature, uint64_t start, int64_t number,
                 int64_t begin, int64_t end, const bool* mask, int64_t* index) {
  const double most = std::numeric_limits<double>::max(), inverse = std::min(1.0 / temperature, most);
  const int64_t channels = rows.channels;
  const bool euclidean = codes.metric == Metric::euclidean;
  std::vector<float> panel(channels * kSampleRows, 0.0f);
  bool wanted[kSampleRows] = {};
  uint64_t key[kSampleRows] = {};
  uint32_t low[kSampleRows] = {}, high[kSampleRows] = {};
  double scaled_inverse[kSampleRows] = {};
  for (int64_t i = 0; i < end - begin; ++i) {
    index[i] = mask == nullptr || mask[i] ? 0 : -1;
    if (index[i] < 0) continue;
    double poison = 0.0, largest = 0.0;
    read_row(rows, begin + i, [&](int64_t, double x) { poison += x * 0.0, largest = std::max(largest, fabs(x)); });
    // A distance needs one scale for rows and codes; a product lets every row have its own.
    const double scale = euclidean ? codes.scale : power_of_two_below_one_over(largest);
    read_row(rows, begin + i,
             [&](int64_t d, double x) { panel[d * kSampleRows + i] = float((x - codes.centre[d]) * scale); });
    scaled_inverse[i] = std::min(inverse / scale / codes.scale, most);
    wanted[i] = poison == 0.0 && !codes.index.empty();
    key[i] = row_key(start, number + i);
    low[i] = uint32_t(key[i]), high[i] = uint32_t(key[i] >> 32);
    for (int64_t d = 0; !wanted[i] && d < channels; ++d) panel[d * kSampleRows + i] = 0.0f;
  }
  double best[kSampleRows];
  int32_t slot[kSampleRows];
  active().sample_panel({panel.data(), low, high, codes.codes.data(), codes.index.data(), int64_t(codes.index.size()),
                         channels, euclidean, scaled_inverse, best, slot});
  for (int64_t i = 0; i < end - begin; ++i) {
    if (!wanted[i]) continue;
    const int64_t chosen = fabs(best[i]) < 1e30 ? slot[i] : sample_in_double(rows, codes, inverse, key[i], begin + i);
    index[i] = codes.index[chosen];
  }
}

}  // namespace vqkernels
