// Body of the entropy sweeps. The including file names the working type `Real`, its vector `Vector` of kLanes Reals
// with load, store, splat, add, sub, mul, fma, max and any_greater, `exponential` = 2^x with 0 below kLowest, kTile,
// and how many channels are summed at a time (kChannels; twice as many where there is one sum).
#include <math.h>
#include <string.h>

#include "entropy.h"

namespace vqkernels {
namespace {
namespace entropy_sweeps {

using Codes = Stream<Real>;
using Rows = Stream<Real>;

constexpr int kPanel = 2 * kLanes, kBlock = kTogether * kTile;
constexpr double kLog2 = 0.693147180559945309417;

struct Block {
  Real logit[kBlock][kPanel];
};

// Logits of one tile: two vectors of lanes and kTile items. Channels in order; `from_items`: the items are the codes.
template <bool from_items>
inline __attribute__((always_inline)) void tile_logits(const Real* panel, const Real* bias, const Real* values,
                                                       int64_t channels, Real (*out)[kPanel]) {
  Vector sum[kTile][2];
#pragma GCC unroll 16
  for (int c = 0; c < kTile; ++c)
    for (int v = 0; v < 2; ++v) sum[c][v] = from_items ? splat(bias[c]) : load(bias + v * kLanes);
  for (int64_t d = 0; d < channels; ++d) {
    const Vector x0 = load(panel + d * kPanel), x1 = load(panel + d * kPanel + kLanes);
#pragma GCC unroll 16
    for (int c = 0; c < kTile; ++c) {
      const Vector y = splat(values[d * kTile + c]);
      sum[c][0] = fma(x0, y, sum[c][0]);
      sum[c][1] = fma(x1, y, sum[c][1]);
    }
  }
#pragma GCC unroll 16
  for (int c = 0; c < kTile; ++c) {
    store(out[c], sum[c][0]);
    store(out[c] + kLanes, sum[c][1]);
  }
}

// Logits of the tiles from `first`, at most kTogether; returns how many items that is.
template <bool from_items>
inline int block_logits(const Real* panel, const Real* bias, const Stream<Real>& items, int64_t first, Block& block) {
  int count = 0;
  for (int64_t tile = first; tile < items.tiles && tile < first + kTogether; ++tile, count += kTile)
    tile_logits<from_items>(panel, from_items ? bias + tile * kTile : bias,
                            items.values + tile * items.channels * kTile, items.channels, block.logit + count);
  return count;
}

// acc[channel][lane] += sum over items of p (and q) times the item's channels, `channels` of them from d.
template <int channels, int sums>
inline __attribute__((always_inline)) void add_products(const Real (*const* p)[kPanel], const int64_t* offset,
                                                        int count, const Real* values, int64_t d, int64_t apart,
                                                        Real* total) {
  Vector sum[sums][channels][2];
#pragma GCC unroll 16
  for (int s = 0; s < sums; ++s)
#pragma GCC unroll 16
    for (int k = 0; k < channels; ++k)
      for (int v = 0; v < 2; ++v) sum[s][k][v] = load(total + s * apart + (d + k) * kPanel + v * kLanes);
  for (int i = 0; i < count; ++i) {
    const Real* y = values + offset[i] + d * kTile;
    Vector factor[sums][2];
#pragma GCC unroll 2
    for (int s = 0; s < sums; ++s)
      for (int v = 0; v < 2; ++v) factor[s][v] = load(p[s][i] + v * kLanes);
#pragma GCC unroll 16
    for (int k = 0; k < channels; ++k) {
      const Vector e = splat(y[k * kTile]);
#pragma GCC unroll 2
      for (int s = 0; s < sums; ++s)
        for (int v = 0; v < 2; ++v) sum[s][k][v] = fma(factor[s][v], e, sum[s][k][v]);
    }
  }
#pragma GCC unroll 16
  for (int s = 0; s < sums; ++s)
#pragma GCC unroll 16
    for (int k = 0; k < channels; ++k)
      for (int v = 0; v < 2; ++v) store(total + s * apart + (d + k) * kPanel + v * kLanes, sum[s][k][v]);
}

template <int sums>
inline void add_all_products(const Real (*const* p)[kPanel], const int64_t* offset, int count, const Real* values,
                             int64_t channels, Real* total) {
  constexpr int kStep = sums == 1 ? 2 * kChannels : kChannels;
  int64_t d = 0;
  if (count == 0) return;
  for (; d + kStep <= channels; d += kStep)
    add_products<kStep, sums>(p, offset, count, values, d, channels * kPanel, total);
  for (; d < channels; ++d) add_products<1, sums>(p, offset, count, values, d, channels * kPanel, total);
}

// total += part, and part = 0.
inline void flush(Real* part, double* total, int64_t count) {
  for (int64_t i = 0; i < count; ++i) total[i] += double(part[i]), part[i] = 0;
}

inline void add_lanes(double* total, Vector part, int v) {
  Real lane[kLanes];
  store(lane, part);
  for (int i = 0; i < kLanes; ++i) total[v * kLanes + i] += double(lane[i]);
}

void forward(const Real* panel, const Codes& codes, Real* partition, Real* share, double* entropy) {
  Block block;
  Real highest[kPanel], rescale[kLanes];
  double sum[kPanel] = {}, moment[kPanel] = {};  // of 2^x and of x 2^x, x = l - highest
  for (int i = 0; i < kPanel; ++i) highest[i] = -kFar;
  for (int64_t first = 0; first < codes.tiles; first += kTogether) {
    const int count = block_logits<true>(panel, codes.bias, codes, first, block);
    for (int v = 0; v < 2; ++v) {
      const Vector before = load(highest + v * kLanes);
      Vector most = load(block.logit[0] + v * kLanes);
      for (int i = 1; i < count; ++i) most = max(most, load(block.logit[i] + v * kLanes));
      if (any_greater(most, before)) {
        const Vector now = max(most, before), step = sub(before, now);
        Real fall[kLanes];
        store(rescale, exponential(step));
        store(fall, step);
        for (int i = 0; i < kLanes; ++i) {
          double& total = sum[v * kLanes + i];
          double& with = moment[v * kLanes + i];
          with = double(rescale[i]) * (with + total * double(fall[i]));
          total *= double(rescale[i]);
        }
        store(highest + v * kLanes, now);
      }
      const Vector top = load(highest + v * kLanes);
      if (!any_greater(sub(most, top), splat(kLowest))) continue;  // every 2^x of this block is 0
      Vector part = splat(Real(0)), with = splat(Real(0));
      for (int i = 0; i < count; ++i) {
        const Vector x = sub(load(block.logit[i] + v * kLanes), top), e = exponential(x);
        part = add(part, e);
        with = fma(e, max(x, splat(kLowest)), with);  // 0 times a finite number
      }
      add_lanes(sum, part, v);
      add_lanes(moment, with, v);
    }
  }
  for (int i = 0; i < kPanel; ++i) {
    const double width = log2(sum[i]);
    partition[i] = Real(double(highest[i]) + width);
    share[i] = Real(exp2(double(partition[i]) - double(highest[i])) / sum[i]);
    entropy[i] = fmax(kLog2 * (width - moment[i] / sum[i]), 0.0);
  }
}

void mean(const Real* panel, const Real* bias, const Rows& rows, double* sum) {
  Block block;
  for (int i = 0; i < kPanel; ++i) sum[i] = 0.0;
  const Vector lowest = splat(kLowest);
  for (int64_t first = 0; first < rows.tiles; first += kTogether) {
    const int count = block_logits<false>(panel, bias, rows, first, block);
    Vector part0 = splat(Real(0)), part1 = splat(Real(0));
    for (int i = 0; i < count; ++i) {
      const Vector partition = splat(rows.partition[first * kTile + i]), share = splat(rows.share[first * kTile + i]);
      const Vector x0 = sub(load(block.logit[i]), partition), x1 = sub(load(block.logit[i] + kLanes), partition);
      if (!any_greater(max(x0, x1), lowest)) continue;
      part0 = fma(exponential(x0), share, part0);
      part1 = fma(exponential(x1), share, part1);
    }
    add_lanes(sum, part0, 0);
    add_lanes(sum, part1, 1);
  }
}

void rows_backward(const Real* panel, const Codes& codes, const Real* partition, const Real* constant, Real slope,
                   double* sum, double* weighted, double* gradient, Real* scratch) {
  Block block;
  Real p[kBlock][kPanel];
  int64_t offset[kBlock];
  const int64_t channels = codes.channels, elements = 2 * channels * kPanel;
  const Vector lowest = splat(kLowest), steep = splat(slope);
  const Vector partition0 = load(partition), partition1 = load(partition + kLanes);
  const Vector constant0 = load(constant), constant1 = load(constant + kLanes);
  for (int i = 0; i < kPanel; ++i) sum[i] = weighted[i] = 0.0;
  for (int64_t i = 0; i < elements; ++i) gradient[i] = 0.0, scratch[i] = 0;
  for (int64_t first = 0, blocks = 0; first < codes.tiles; first += kTogether) {
    const int count = block_logits<true>(panel, codes.bias, codes, first, block);
    Vector sum0 = splat(Real(0)), sum1 = sum0, weighted0 = sum0, weighted1 = sum0;
    int used = 0;
    for (int i = 0; i < count; ++i) {
      const Vector x0 = sub(load(block.logit[i]), partition0), x1 = sub(load(block.logit[i] + kLanes), partition1);
      if (!any_greater(max(x0, x1), lowest)) continue;
      const Vector weight = splat(codes.weight[first * kTile + i]);
      const Vector p0 = exponential(x0), p1 = exponential(x1);
      const Vector q0 = mul(p0, fma(steep, max(x0, lowest), add(weight, constant0)));
      const Vector q1 = mul(p1, fma(steep, max(x1, lowest), add(weight, constant1)));
      sum0 = add(sum0, p0), sum1 = add(sum1, p1);
      weighted0 = add(weighted0, q0), weighted1 = add(weighted1, q1);
      store(p[used], p0), store(p[used] + kLanes, p1);
      // The logits that are overwritten were read: used <= i.
      store(block.logit[used], q0), store(block.logit[used] + kLanes, q1);
      offset[used++] = (i / kTile) * channels * kTile + i % kTile;
    }
    if (used == 0) continue;
    add_lanes(sum, sum0, 0), add_lanes(sum, sum1, 1);
    add_lanes(weighted, weighted0, 0), add_lanes(weighted, weighted1, 1);
    const Real(*const factors[2])[kPanel] = {p, block.logit};
    add_all_products<2>(factors, offset, used, codes.values + first * channels * kTile, channels, scratch);
    if (++blocks % kFlush == 0) flush(scratch, gradient, elements);
  }
  flush(scratch, gradient, elements);
}

void codes_backward(const Real* panel, const Real* bias, const Real* weight, const Rows& rows, Real slope, double* sum,
                    double* gradient, Real* scratch) {
  Block block;
  int64_t offset[kBlock];
  const int64_t channels = rows.channels, elements = channels * kPanel;
  const Vector lowest = splat(kLowest), steep = splat(slope);
  const Vector weight0 = load(weight), weight1 = load(weight + kLanes);
  for (int i = 0; i < kPanel; ++i) sum[i] = 0.0;
  for (int64_t i = 0; i < elements; ++i) gradient[i] = 0.0, scratch[i] = 0;
  for (int64_t first = 0, blocks = 0; first < rows.tiles; first += kTogether) {
    const int count = block_logits<false>(panel, bias, rows, first, block);
    Vector sum0 = splat(Real(0)), sum1 = sum0;
    int used = 0;
    for (int i = 0; i < count; ++i) {
      const int64_t item = first * kTile + i;
      const Vector partition = splat(rows.partition[item]);
      const Vector x0 = sub(load(block.logit[i]), partition), x1 = sub(load(block.logit[i] + kLanes), partition);
      if (!any_greater(max(x0, x1), lowest)) continue;
      const Vector share = splat(rows.share[item]), constant = splat(rows.constant[item]);
      const Vector w0 = fma(steep, max(x0, lowest), add(weight0, constant));
      const Vector w1 = fma(steep, max(x1, lowest), add(weight1, constant));
      const Vector g0 = mul(mul(exponential(x0), share), w0), g1 = mul(mul(exponential(x1), share), w1);
      sum0 = add(sum0, g0), sum1 = add(sum1, g1);
      store(block.logit[used], g0), store(block.logit[used] + kLanes, g1);
      offset[used++] = (i / kTile) * channels * kTile + i % kTile;
    }
    if (used == 0) continue;
    add_lanes(sum, sum0, 0), add_lanes(sum, sum1, 1);
    const Real(*const factors[1])[kPanel] = {block.logit};
    add_all_products<1>(factors, offset, used, rows.values + first * channels * kTile, channels, scratch);
    if (++blocks % kFlush == 0) flush(scratch, gradient, elements);
  }
  flush(scratch, gradient, elements);
}

void exponentials(const Real* x, Real* y, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) {
    Real lane[kLanes] = {};
    const int64_t some = count - i < kLanes ? count - i : kLanes;
    memcpy(lane, x + i, some * sizeof(Real));
    store(lane, exponential(load(lane)));
    memcpy(y + i, lane, some * sizeof(Real));
  }
}

constexpr EntropyKernels<Real> kEntropy = {kPanel, kTile, forward, mean, rows_backward, codes_backward, exponentials};

}  // namespace entropy_sweeps
}  // namespace
}  // namespace vqkernels
