#include "entropy.h"

#include <math.h>

#include <algorithm>
#include <type_traits>

#include "reading.h"

namespace vqkernels {
namespace {

constexpr double kLog2E = 1.44269504088896340736;
constexpr int64_t kChunk = 256;            // rows that are read at a time
constexpr double kFloatRange = 0x1p24;     // a larger float has no fraction
constexpr double kFar[2] = {1e30, 1e300};  // of float and double: beyond every logit

template <class Real> constexpr double far_away() { return kFar[sizeof(Real) == sizeof(double)]; }

// Rows or codes as the sweeps stream them, [tile][channel][item], zeros behind the last.
template <class Real> struct Packed {
  Packed(int64_t items, int64_t channels, int tile)
      : count(items),
        channels(channels),
        tile(tile),
        tiles((items + tile - 1) / tile),
        values(tiles * tile * channels, Real(0)) {}

  Real& at(int64_t item, int64_t d) { return values[((item / tile) * channels + d) * tile + item % tile]; }
  const Real& at(int64_t item, int64_t d) const { return const_cast<Packed*>(this)->at(item, d); }

  // Items from `first` as lanes; the last one again where there are too few.
  void panel(int64_t first, int lanes, Real* out) const {
    for (int lane = 0; lane < lanes; ++lane) {
      const Real* item = &at(std::min(first + lane, count - 1), 0);
      for (int64_t d = 0; d < channels; ++d) out[d * lanes + lane] = item[d * tile];
    }
  }

  int64_t count, channels, tile, tiles;
  std::vector<Real> values;
};

// One number for each item, in Real, with `filler` up to a whole tile.
template <class Real> std::vector<Real> padded(const std::vector<double>& x, int tile, double filler) {
  std::vector<Real> out((int64_t(x.size()) + tile - 1) / tile * tile, Real(filler));
  std::transform(x.begin(), x.end(), out.begin(), [](double value) { return Real(value); });
  return out;
}

template <class Real> void lanes_of(const std::vector<Real>& x, int64_t count, int64_t first, int lanes, Real* out) {
  for (int lane = 0; lane < lanes; ++lane) out[lane] = x[std::min(first + lane, count - 1)];
}

template <class Real> Packed<Real> pack_rows(const EntropyInputs& inputs, int tile, const Parallel& parallel) {
  const int64_t count = int64_t(inputs.row.size());
  Packed<Real> packed(count, inputs.rows.channels, tile);
  const double scale = inputs.scale() * kLog2E;
  parallel((count + kChunk - 1) / kChunk, [&](int64_t first, int64_t last) {
    for (int64_t i = first * kChunk; i < std::min(last * kChunk, count); ++i)
      read_row(inputs.rows, inputs.row[i], [&](int64_t d, double x) {
        packed.at(i, d) = Real(scale * (inputs.euclidean ? x - inputs.centre[d] : x));
      });
  });
  return packed;
}

template <class Real> Packed<Real> pack_codes(const EntropyInputs& inputs, int tile, std::vector<double>& bias) {
  const int64_t count = int64_t(inputs.code.size());
  Packed<Real> packed(count, inputs.codes.channels, tile);
  bias.assign(count, 0.0);
  for (int64_t j = 0; j < count; ++j) {
    double square = 0.0;
    read_code(inputs.codes, inputs.code[j], [&](int64_t d, double e) {
      const double y = e - inputs.centre[d];
      packed.at(j, d) = Real(y);
      square += y * y;
    });
    if (inputs.euclidean) bias[j] = -square * kLog2E / inputs.temperature;
  }
  return packed;
}

int64_t panels(int64_t count, int lanes) { return (count + lanes - 1) / lanes; }

// Partition, share and entropy of every counted row.
template <class Real>
void sweep_rows(const EntropyKernels<Real>& kernels, const Packed<Real>& rows, const Stream<Real>& codes,
                const Parallel& parallel, std::vector<Real>& partition, std::vector<Real>& share,
                std::vector<double>& entropy) {
  const int lanes = kernels.lanes;
  // What is behind the last row has no weight.
  partition.assign(rows.tiles * rows.tile, Real(far_away<Real>()));
  share.assign(rows.tiles * rows.tile, Real(0));
  entropy.assign(rows.count, 0.0);
  parallel(panels(rows.count, lanes), [&](int64_t first, int64_t last) {
    std::vector<Real> panel(rows.channels * lanes), found(2 * lanes);
    std::vector<double> entropies(lanes);
    for (int64_t begin = first * lanes; begin < std::min(last * lanes, rows.count); begin += lanes) {
      const int64_t some = std::min<int64_t>(lanes, rows.count - begin);
      rows.panel(begin, lanes, panel.data());
      kernels.forward(panel.data(), codes, found.data(), found.data() + lanes, entropies.data());
      std::copy_n(found.data(), some, partition.data() + begin);
      std::copy_n(found.data() + lanes, some, share.data() + begin);
      std::copy_n(entropies.data(), some, entropy.data() + begin);
    }
  });
}

template <class T> void write_row(const RowsOut& out, int64_t row, int64_t channels, const double* value) {
  T* x = static_cast<T*>(out.data) + out.offset(row);
  for (int64_t d = 0; d < channels; ++d) narrow(value[d], x + d * out.channel_stride);
}

template <class T> using Plain = std::remove_const_t<std::remove_pointer_t<T>>;

}  // namespace

EntropyInputs::EntropyInputs(const Rows& rows_, const Codes& codes_, const bool* mask, bool euclidean_,
                             double temperature_, const Parallel& parallel)
    : rows(rows_), codes(codes_), euclidean(euclidean_), temperature(temperature_), centre(codes_.channels, 0.0) {
  for (int64_t k = 0; k < codes.size; ++k) {
    double poison = 0.0;
    read_code(codes, k, [&](int64_t, double e) { poison += e * 0.0; });
    if (poison == 0.0) code.push_back(k);
  }
  const double part = 1.0 / double(std::max<size_t>(code.size(), 1));
  for (int64_t k : code) read_code(codes, k, [&](int64_t d, double e) { centre[d] += e * part; });
  double farthest = 0.0;  // squared norm of a centred code
  for (int64_t k : code) {
    double square = 0.0;
    read_code(codes, k, [&](int64_t d, double e) { square += (e - centre[d]) * (e - centre[d]); });
    farthest = std::max(farthest, square);
  }
  const int64_t count = rows.count(), chunks = (count + kChunk - 1) / kChunk;
  enum : char { masked, counted, broken };
  std::vector<char> state(count, masked);
  std::vector<double> largest(chunks, 0.0);
  parallel(chunks, [&](int64_t first, int64_t last) {
    for (int64_t i = first * kChunk; i < std::min(last * kChunk, count); ++i) {
      if (mask != nullptr && !mask[i]) continue;
      double square = 0.0, poison = 0.0;
      read_row(rows, i, [&](int64_t d, double x) {
        poison += x * 0.0;
        const double from = euclidean ? x - centre[d] : x;
        square += from * from;
      });
      state[i] = poison == 0.0 ? counted : broken;
      if (poison == 0.0) largest[i / kChunk] = std::max(largest[i / kChunk], square);
    }
  });
  for (int64_t i = 0; i < count; ++i) {
    if (state[i] == counted) row.push_back(i);
    if (state[i] == broken) bad.push_back(i);
  }
  const double row_norm = chunks > 0 ? sqrt(*std::max_element(largest.begin(), largest.end())) * scale() * kLog2E : 0.0;
  const double code_norm = sqrt(farthest), bias = euclidean ? farthest * kLog2E / temperature : 0.0;
  in_float = rows.dtype != DType::f64 && codes.dtype != DType::f64 && row_norm * code_norm + bias < kFloatRange &&
             row_norm < 1e30 && (code_norm == 0.0 || code_norm > 1e-30);
}

template <class Real>
Entropies entropies(const EntropyInputs& inputs, const EntropyKernels<Real>& kernels, const Parallel& parallel) {
  const int64_t channels = inputs.rows.channels, size = int64_t(inputs.code.size());
  const int lanes = kernels.lanes;
  Entropies out;
  out.entropy.assign(inputs.row.size(), 0.0);
  out.partition.assign(inputs.row.size(), 0.0);
  out.mean.assign(size, 0.0);
  if (inputs.row.empty() || inputs.code.empty()) return out;
  std::vector<double> biases;
  const Packed<Real> rows = pack_rows<Real>(inputs, kernels.tile, parallel);
  const Packed<Real> codes = pack_codes<Real>(inputs, kernels.tile, biases);
  const std::vector<Real> bias = padded<Real>(biases, kernels.tile, -far_away<Real>());
  std::vector<Real> partition, share;
  const Stream<Real> code_stream{codes.values.data(), bias.data(), nullptr, nullptr, nullptr, nullptr,
                                 codes.tiles,         channels};
  sweep_rows(kernels, rows, code_stream, parallel, partition, share, out.entropy);
  std::copy_n(partition.begin(), rows.count, out.partition.begin());
  const Stream<Real> row_stream{rows.values.data(), nullptr, nullptr,    partition.data(),
                                share.data(),       nullptr, rows.tiles, channels};
  parallel(panels(size, lanes), [&](int64_t first, int64_t last) {
    std::vector<Real> panel(channels * lanes), lane_bias(lanes);
    std::vector<double> sum(lanes);
    for (int64_t begin = first * lanes; begin < std::min(last * lanes, size); begin += lanes) {
      codes.panel(begin, lanes, panel.data());
      lanes_of(bias, size, begin, lanes, lane_bias.data());
      kernels.mean(panel.data(), lane_bias.data(), row_stream, sum.data());
      for (int64_t j = begin; j < std::min(begin + lanes, size); ++j) out.mean[j] = sum[j - begin] / double(rows.count);
    }
  });
  return out;
}

template <class Real>
void entropy_gradients(const EntropyInputs& inputs, const EntropyKernels<Real>& kernels, const Entropies& known,
                       double grad_sample, double grad_codebook_entropy, const RowsOut& grad_z, void* grad_codebook,
                       const Parallel& parallel) {
  const int64_t channels = inputs.rows.channels, size = int64_t(inputs.code.size());
  const int lanes = kernels.lanes;
  const double count = double(inputs.row.size()), scale = inputs.scale();
  if (inputs.row.empty() || inputs.code.empty()) return;
  std::vector<double> biases, weights(size), constants(inputs.row.size());
  const Packed<Real> rows = pack_rows<Real>(inputs, kernels.tile, parallel);
  const Packed<Real> codes = pack_codes<Real>(inputs, kernels.tile, biases);
  const std::vector<Real> bias = padded<Real>(biases, kernels.tile, -far_away<Real>());
  // -log p = slope * (l - partition) + constant of the row. What is added to all weights of a row cancels: weights are
  // taken from their means, which the rounding of their sums is relative to.
  const double slope = -grad_sample / kLog2E;
  double entropy_of_mean = 0.0;
  for (double m : known.mean) entropy_of_mean -= m > 0.0 ? m * log(m) : 0.0;
  for (int64_t j = 0; j < size; ++j)
    weights[j] = known.mean[j] > 0.0 ? -grad_codebook_entropy * (log(known.mean[j]) + entropy_of_mean) : 0.0;
  const std::vector<Real> weight = padded<Real>(weights, kernels.tile, 0.0);
  const Stream<Real> code_stream{codes.values.data(), bias.data(), weight.data(), nullptr, nullptr, nullptr,
                                 codes.tiles,         channels};
  std::vector<Real> partition, share;
  std::vector<double> entropy = known.entropy;
  if (known.partition.empty()) {
    sweep_rows(kernels, rows, code_stream, parallel, partition, share, entropy);
  } else {
    partition = padded<Real>(known.partition, kernels.tile, far_away<Real>());
    share.assign(partition.size(), Real(0));
  }
  std::vector<Real> constant(partition.size(), Real(0));
  parallel(panels(rows.count, lanes), [&](int64_t first, int64_t last) {
    std::vector<Real> panel(channels * lanes), lane(2 * lanes), scratch(2 * channels * lanes);
    std::vector<double> sum(lanes), weighted(lanes), gradient(2 * channels * lanes), step(channels);
    for (int64_t begin = first * lanes; begin < std::min(last * lanes, rows.count); begin += lanes) {
      rows.panel(begin, lanes, panel.data());
      lanes_of(partition, rows.count, begin, lanes, lane.data());
      for (int i = 0; i < lanes; ++i)
        lane[lanes + i] = Real(-grad_sample * entropy[std::min(begin + i, rows.count - 1)]);
      kernels.rows_backward(panel.data(), code_stream, lane.data(), lane.data() + lanes, Real(slope), sum.data(),
                            weighted.data(), gradient.data(), scratch.data());
      for (int64_t i = begin; i < std::min(begin + lanes, rows.count); ++i) {
        const int at = int(i - begin);
        const double mean = weighted[at] / sum[at];
        share[i] = Real(1.0 / sum[at]);
        constant[i] = Real(double(lane[lanes + at]) - mean);
        for (int64_t d = 0; d < channels; ++d) {
          const double of_p = gradient[d * lanes + at], of_pw = gradient[(channels + d) * lanes + at];
          step[d] = scale / count / sum[at] * (of_pw - mean * of_p);
        }
        with_type(inputs.rows.dtype,
                  [&](auto* type) { write_row<Plain<decltype(type)>>(grad_z, inputs.row[i], channels, step.data()); });
      }
    }
  });
  if (grad_codebook == nullptr) return;
  const Stream<Real> row_stream{rows.values.data(), nullptr,         nullptr,    partition.data(),
                                share.data(),       constant.data(), rows.tiles, channels};
  parallel(panels(size, lanes), [&](int64_t first, int64_t last) {
    std::vector<Real> panel(channels * lanes), lane(2 * lanes), scratch(channels * lanes);
    std::vector<double> sum(lanes), gradient(channels * lanes), step(channels);
    for (int64_t begin = first * lanes; begin < std::min(last * lanes, size); begin += lanes) {
      codes.panel(begin, lanes, panel.data());
      lanes_of(bias, size, begin, lanes, lane.data());
      lanes_of(weight, size, begin, lanes, lane.data() + lanes);
      kernels.codes_backward(panel.data(), lane.data(), lane.data() + lanes, row_stream, Real(slope), sum.data(),
                             gradient.data(), scratch.data());
      for (int64_t j = begin; j < std::min(begin + lanes, size); ++j) {
        const int at = int(j - begin);
        for (int64_t d = 0; d < channels; ++d) {
          const double own = inputs.euclidean ? scale * sum[at] * double(codes.at(j, d)) : 0.0;
          step[d] = (gradient[d * lanes + at] / kLog2E - own) / count;
        }
        const RowsOut out{grad_codebook, inputs.codes.size, 0, channels, 1};
        with_type(inputs.codes.dtype,
                  [&](auto* type) { write_row<Plain<decltype(type)>>(out, inputs.code[j], channels, step.data()); });
      }
    }
  });
}

void fill_rows(const RowsOut& out, DType dtype, int64_t channels, const std::vector<int64_t>& rows, double value) {
  const std::vector<double> row(channels, value);
  with_type(dtype, [&](auto* type) {
    for (int64_t i : rows) write_row<Plain<decltype(type)>>(out, i, channels, row.data());
  });
}

template Entropies entropies(const EntropyInputs&, const EntropyKernels<float>&, const Parallel&);
template Entropies entropies(const EntropyInputs&, const EntropyKernels<double>&, const Parallel&);
template void entropy_gradients(const EntropyInputs&, const EntropyKernels<float>&, const Entropies&, double, double,
                                const RowsOut&, void*, const Parallel&);
template void entropy_gradients(const EntropyInputs&, const EntropyKernels<double>&, const Entropies&, double, double,
                                const RowsOut&, void*, const Parallel&);

}  // namespace vqkernels
