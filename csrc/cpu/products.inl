// Small products with weights in panels, for one SIMD level.
#pragma once
#include "gate.inl"

namespace vqkernels {
namespace {
namespace pixelcnn {

constexpr int kPanelVectors = 128 / int(sizeof(Floats));  // of a panel of outputs
constexpr int kTogether = 2;                              // of them in one tile
#if defined(__AVX512F__)
constexpr int kTileRows = 12;  // 24 sums of 32 registers
#else
constexpr int kTileRows = 6;  // 12 sums of 16 registers
#endif

// out = initial + bias + x W for `rows` rows, outputs [0, outputs). A stride counts elements; initial and bias may be
// null, and initial may be out.
template <class T> struct Product {
  const T* x;
  int64_t x_stride, inputs;
  const T* weights;
  int64_t panel_stride, outputs;
  const T* bias;
  const T* initial;
  int64_t initial_stride;
  T* out;
  int64_t out_stride;
};

// One tile: `rows` rows from `row`, two vectors of outputs from `output` on.
template <class T, int rows>
__attribute__((noinline)) void tile(const Product<T>& p, int64_t row, int64_t output, const T* weights) {
  using Vector = typename Lanes<T>::Vector;
  constexpr int kCount = Lanes<T>::kCount, kPanel = kPanelVectors * kCount;
  Vector sum[rows][kTogether];
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < kTogether; ++v) {
      const int64_t at = output + v * kCount, left = p.outputs - at;
      sum[r][v] = p.initial ? load_some(p.initial + (row + r) * p.initial_stride + at, left) : splat(T(0));
      if (p.bias) sum[r][v] = add(sum[r][v], load(p.bias + at));
    }
  }
  const T* x[rows];
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) x[r] = p.x + (row + r) * p.x_stride;
  for (int64_t i = 0; i < p.inputs; ++i) {
    const Vector w0 = load(weights + i * kPanel), w1 = load(weights + i * kPanel + kCount);
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) {
      const Vector one = splat(x[r][i]);
      sum[r][0] = fma(one, w0, sum[r][0]);
      sum[r][1] = fma(one, w1, sum[r][1]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < kTogether; ++v) {
      const int64_t at = output + v * kCount;
      store_some(p.out + (row + r) * p.out_stride + at, sum[r][v], p.outputs - at);
    }
  }
}

template <class T, int most>
inline void tiles(const Product<T>& p, int64_t row, int64_t rows, int64_t output, const T* weights) {
  if constexpr (most > 1) {
    if (rows < most) return tiles<T, most - 1>(p, row, rows, output, weights);
  }
  tile<T, most>(p, row, output, weights);
}

// Panels outside, so that one stays in the first-level cache for all rows.
template <class T> inline void multiply(const Product<T>& p, int64_t rows) {
  constexpr int kCount = Lanes<T>::kCount;
  const int64_t blocks = (rows + kTileRows - 1) / kTileRows;
  for (int64_t panel = 0; panel * kPanelVectors * kCount < p.outputs; ++panel) {
    for (int part = 0; part < kPanelVectors; part += kTogether) {
      const int64_t output = (panel * kPanelVectors + part) * kCount;
      if (output >= p.outputs) break;
      const T* weights = p.weights + panel * p.panel_stride + part * kCount;
      for (int64_t block = 0; block < blocks; ++block) {  // of nearly equal height
        const int64_t from = rows * block / blocks, to = rows * (block + 1) / blocks;
        tiles<T, kTileRows>(p, from, to - from, output, weights);
      }
    }
  }
}

}  // namespace pixelcnn
}  // namespace
}  // namespace vqkernels
