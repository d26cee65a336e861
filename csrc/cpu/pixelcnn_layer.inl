// The passes of a PixelCNN layer for one SIMD level: see pixelcnn_layer.h.
#include "pixelcnn_layer.h"

#include <vector>

#include "winograd.inl"

namespace vqkernels {
namespace {
namespace pixelcnn {

// tanh(a), sigmoid(b) and their derivatives: with e = exp(-2|a|) - 1 and f = exp(-|b|), |tanh| = -e / (e + 2),
// tanh' = 4 (e + 1) / (e + 2)^2, sigmoid = 1 or f over 1 + f, sigmoid' = f / (1 + f)^2.
template <class T> struct Gate {
  typename Lanes<T>::Vector content, content_slope, share, share_slope;
};

template <class T>
inline __attribute__((always_inline)) Gate<T> gate_parts(typename Lanes<T>::Vector a, typename Lanes<T>::Vector b) {
  using L = Lanes<T>;
  using Vector = typename L::Vector;
  using Bits = typename L::Bits;
  const Vector lowest = splat(L::kLowest), one = splat(T(1)), zero = splat(T(0));
  const Vector minus_a = (Vector)((Bits)a | L::kSign), minus_b = (Vector)((Bits)b | L::kSign);
  Vector x = add(minus_a, minus_a);
  x = x < lowest ? lowest : x;
  const Exponential<T> ea = exponential<T>(x), eb = exponential<T>(minus_b < lowest ? lowest : minus_b);
  const Vector e = fma(ea.scale, ea.rest, sub(ea.scale, one)), e_one = fma(ea.scale, ea.rest, ea.scale);
  const Vector f = fma(eb.scale, eb.rest, eb.scale);
  const Vector e_two = add(e, splat(T(2))), f_one = add(one, f);
  const Vector inverse = one / mul(e_two, f_one);
  const Vector by_a = mul(inverse, f_one), by_b = mul(inverse, e_two);
  Gate<T> g;
  g.content = (Vector)((Bits)mul(sub(zero, e), by_a) ^ ((Bits)a & L::kSign));
  g.content_slope = mul(mul(splat(T(4)), e_one), mul(by_a, by_a));
  g.share = mul(b < zero ? f : one, by_b);
  g.share_slope = mul(f, mul(by_b, by_b));
  return g;
}

// One vector of channels: f(channel, how many are left).
template <class T, class F> inline __attribute__((always_inline)) void each_vector(int64_t channels, const F& f) {
  for (int64_t c = 0; c < channels; c += Lanes<T>::kCount) f(c, channels - c);
}

template <class T> inline const T* shift_of(const PixelCNNGrids& g, const T* shift, int64_t grid, int64_t position) {
  return shift + (g.shift_per_position ? grid * g.size() + position : grid) * 2 * g.channels;
}

// (4 T + 2) columns of `channels`: the columns -1 to 4 T of a grid row.
template <class T> inline std::vector<T> padded_row(const PixelCNNGrids& g) {
  return std::vector<T>((kOutputs * g.tiles() + 2) * g.channels, T(0));
}

template <class T> inline void vertical_row(const PixelCNNVertical<T>& x, int64_t grid, int64_t row, T* gated) {
  using Vector = typename Lanes<T>::Vector;
  const PixelCNNGrids& g = x.grids;
  const int64_t channels = g.channels, twice = 2 * channels, tiles = g.tiles();
  const int64_t element = g.count * g.height * tiles * twice, from = (grid * g.height + row) * tiles * twice;
  T* above = x.above + (grid * g.height + row) * g.width * twice;
  if (x.products) {
    for (int64_t t = 0; t < tiles; ++t) {
      const T* m = x.products + from + t * twice;
      const int64_t columns = g.width - kOutputs * t;
      each_vector<T>(twice, [&](int64_t c, int64_t left) {
        Vector in[6], out[4];
        for (int e = 0; e < kElements; ++e) in[e] = load_some(m + e * element + c, left);
        out_of_tile(in, out);
        for (int k = 0; k < kOutputs; ++k)
          if (k < columns) store_some(above + (kOutputs * t + k) * twice + c, out[k], left);
      });
    }
  }
  if (x.tiles == nullptr) return;
  for (int64_t w = 0; w < g.width; ++w)
    gate_row(above + w * twice, shift_of(g, x.shift, grid, row * g.width + w), channels, gated + (w + 1) * channels);
  for (int64_t t = 0; t < tiles; ++t) {
    T* tile = x.tiles + from + t * twice;
    T* below = row + 1 < g.height ? tile + tiles * twice : nullptr;
    each_vector<T>(channels, [&](int64_t c, int64_t left) {
      Vector in[6], out[6];
      for (int k = 0; k < kElements; ++k) in[k] = load_some(gated + (kOutputs * t + k) * channels + c, left);
      into_tile(in, out);
      for (int e = 0; e < kElements; ++e) {
        store_some(tile + e * element + channels + c, out[e], left);
        if (below) store_some(below + e * element + c, out[e], left);
        if (row == 0) store_some(tile + e * element + c, splat(T(0)), left);
      }
    });
  }
}

template <class T> inline void vertical(const PixelCNNVertical<T>& x, int64_t first, int64_t last) {
  std::vector<T> gated = padded_row<T>(x.grids);
  for (int64_t grid = first; grid < last; ++grid)
    for (int64_t row = 0; row < x.grids.height; ++row) vertical_row(x, grid, row, gated.data());
}

// grad_above (4 T, 2C) of a grid row, zeros behind its width; `gated` is room for the gradient of the gated features.
template <class T>
inline void gate_gradient_row(const PixelCNNVerticalBackward<T>& x, int64_t grid, int64_t row, T* gated, T* out,
                              T* sum) {
  using Vector = typename Lanes<T>::Vector;
  const PixelCNNGrids& g = x.grids;
  const int64_t channels = g.channels, twice = 2 * channels, tiles = g.tiles();
  const int64_t element = g.count * g.height * tiles * twice, from = (grid * g.height + row) * tiles * twice;
  const int64_t at = (grid * g.height + row) * g.width;
  if (x.grad_tiles == nullptr) {
    memcpy(out, x.grad_above + at * twice, g.width * twice * sizeof(T));
    if (g.shift_per_position) memset(x.grad_shift + at * twice, 0, g.width * twice * sizeof(T));
    return;
  }
  memset(gated, 0, (kOutputs * tiles + 2) * channels * sizeof(T));
  for (int64_t t = 0; t < tiles; ++t) {
    const T* tile = x.grad_tiles + from + t * twice;
    const T* below = row + 1 < g.height ? tile + tiles * twice : nullptr;
    each_vector<T>(channels, [&](int64_t c, int64_t left) {
      Vector in[6], back[6];
      for (int e = 0; e < kElements; ++e) {
        in[e] = load_some(tile + e * element + channels + c, left);
        if (below) in[e] = add(in[e], load_some(below + e * element + c, left));
      }
      into_tile_backward(in, back);
      for (int k = 0; k < kElements; ++k) {
        T* to = gated + (kOutputs * t + k) * channels + c;
        store_some(to, k < 2 ? add(load_some(to, left), back[k]) : back[k],
                   left);  // two columns are the last tile's too
      }
    });
  }
  for (int64_t w = 0; w < g.width; ++w) {
    const T* above = x.above + (at + w) * twice;
    const T* shift = shift_of(g, x.shift, grid, row * g.width + w);
    const T* grad = x.grad_above + (at + w) * twice;
    T* step = g.shift_per_position ? x.grad_shift + (at + w) * twice : sum;
    each_vector<T>(channels, [&](int64_t c, int64_t left) {
      const auto read = [&](const T* from, int64_t half) { return load_some(from + half + c, left); };
      const Gate<T> gate =
          gate_parts<T>(add(read(above, 0), read(shift, 0)), add(read(above, channels), read(shift, channels)));
      const Vector dy = load_some(gated + (w + 1) * channels + c, left);
      const Vector da = mul(dy, mul(gate.share, gate.content_slope)), db = mul(dy, mul(gate.content, gate.share_slope));
      store_some(out + w * twice + c, add(read(grad, 0), da), left);
      store_some(out + w * twice + channels + c, add(read(grad, channels), db), left);
      store_some(step + c, g.shift_per_position ? da : add(read(sum, 0), da), left);
      store_some(step + channels + c, g.shift_per_position ? db : add(read(sum, channels), db), left);
    });
  }
}

template <class T> inline void vertical_backward(const PixelCNNVerticalBackward<T>& x, int64_t first, int64_t last) {
  using Vector = typename Lanes<T>::Vector;
  const PixelCNNGrids& g = x.grids;
  const int64_t twice = 2 * g.channels, tiles = g.tiles(), element = g.count * g.height * tiles * twice;
  std::vector<T> gated = padded_row<T>(g), grad(kOutputs * tiles * twice, T(0));
  for (int64_t grid = first; grid < last; ++grid) {
    T* sum = x.grad_shift + grid * twice;
    if (!g.shift_per_position) memset(sum, 0, twice * sizeof(T));
    for (int64_t row = 0; row < g.height; ++row) {
      const int64_t line = grid * g.height + row;
      gate_gradient_row(x, grid, row, gated.data(), x.grad_given ? x.grad_given + line * g.width * twice : grad.data(),
                        sum);
      if (x.grad_given) continue;
      for (int64_t t = 0; t < tiles; ++t) {
        T* m = x.grad_products + (line * tiles + t) * twice;
        each_vector<T>(twice, [&](int64_t c, int64_t left) {
          Vector in[4], out[6];
          for (int k = 0; k < kOutputs; ++k) in[k] = load_some(grad.data() + (kOutputs * t + k) * twice + c, left);
          out_of_tile_backward(in, out);
          for (int e = 0; e < kElements; ++e) store_some(m + e * element + c, out[e], left);
        });
      }
    }
  }
}

template <class T> inline void gate_forward(const PixelCNNGate<T>& x, int64_t first, int64_t last) {
  const PixelCNNGrids& g = x.grids;
  const int64_t channels = g.channels, size = g.size();
  for (int64_t grid = first; grid < last; ++grid)
    for (int64_t i = 0; i < size; ++i) {
      const int64_t at = grid * size + i;
      T* out = x.gated + at * channels;
      gate_row(x.left + at * 2 * channels, shift_of(g, x.shift, grid, i), channels, out);
      if (x.scale == nullptr) continue;
      const T* scale = x.scale + at * channels;
      for (int64_t c = 0; c < channels; ++c) out[c] *= scale[c];
    }
}

template <class T> inline void gate_backward(const PixelCNNGate<T>& x, int64_t first, int64_t last) {
  using Vector = typename Lanes<T>::Vector;
  const PixelCNNGrids& g = x.grids;
  const int64_t channels = g.channels, twice = 2 * channels, size = g.size();
  for (int64_t grid = first; grid < last; ++grid) {
    T* sum = x.grad_shift + grid * twice;
    if (!g.shift_per_position) memset(sum, 0, twice * sizeof(T));
    for (int64_t i = 0; i < size; ++i) {
      const int64_t at = grid * size + i;
      const T *in = x.left + at * twice, *shift = shift_of(g, x.shift, grid, i);
      T* out = x.grad_left + at * twice;
      T* step = g.shift_per_position ? x.grad_shift + at * twice : sum;
      each_vector<T>(channels, [&](int64_t c, int64_t left) {
        const auto read = [&](const T* from, int64_t half) { return load_some(from + half + c, left); };
        const Gate<T> gate =
            gate_parts<T>(add(read(in, 0), read(shift, 0)), add(read(in, channels), read(shift, channels)));
        Vector dy = load_some(x.grad + at * channels + c, left), y = mul(gate.content, gate.share);
        if (x.scale) {
          const Vector scale = load_some(x.scale + at * channels + c, left);
          dy = mul(dy, scale), y = mul(y, scale);
        }
        const Vector da = mul(dy, mul(gate.share, gate.content_slope)),
                     db = mul(dy, mul(gate.content, gate.share_slope));
        store_some(x.gated + at * channels + c, y, left);
        store_some(out + c, da, left);
        store_some(out + channels + c, db, left);
        store_some(step + c, g.shift_per_position ? da : add(read(sum, 0), da), left);
        store_some(step + channels + c, g.shift_per_position ? db : add(read(sum, channels), db), left);
      });
    }
  }
}

template <class T> inline void join(const PixelCNNJoin<T>& x, int64_t first, int64_t last) {
  using Vector = typename Lanes<T>::Vector;
  const int64_t channels = x.grids.channels, twice = 2 * channels, width = x.grids.width;
  for (int64_t line = first * x.grids.height; line < last * x.grids.height; ++line) {
    T* out = x.pairs + line * width * twice;
    if (x.pairs) memset(out, 0, channels * sizeof(T));
    for (int64_t w = 0; w < width; ++w) {
      const int64_t at = (line * width + w) * channels;
      each_vector<T>(channels, [&](int64_t c, int64_t left) {
        Vector y = add(load_some(x.update + at + c, left), load_some(x.bias + c, left));
        if (x.residual) y = add(y, load_some(x.residual + at + c, left));
        store_some(x.features + at + c, y, left);
        if (x.pairs == nullptr) return;
        store_some(out + w * twice + channels + c, y, left);
        if (w + 1 < width) store_some(out + (w + 1) * twice + c, y, left);
      });
    }
  }
}

template <class T> inline void join_backward(const PixelCNNJoinBackward<T>& x, int64_t first, int64_t last) {
  const int64_t channels = x.grids.channels, twice = 2 * channels, width = x.grids.width;
  for (int64_t line = first * x.grids.height; line < last * x.grids.height; ++line)
    for (int64_t w = 0; w < width; ++w) {
      const int64_t at = line * width + w;
      each_vector<T>(channels, [&](int64_t c, int64_t left) {
        auto y = load_some(x.grad_features + at * channels + c, left);
        if (x.grad_pairs) {
          y = add(y, load_some(x.grad_pairs + at * twice + channels + c, left));
          if (w + 1 < width) y = add(y, load_some(x.grad_pairs + (at + 1) * twice + c, left));
        }
        store_some(x.grad + at * channels + c, y, left);
      });
    }
}

template <class T> inline void taps(const PixelCNNTaps<T>& x, int64_t first, int64_t last) {
  const int64_t n = x.channels, count = x.kernel_height * x.kernel_width;
  for (int64_t grid = first; grid < last; ++grid)
    for (int64_t i = 0; i < x.height; ++i)
      for (int64_t j = 0; j < x.width; ++j) {
        T* out = x.out + ((grid * x.height + i) * x.width + j) * n;
        memset(out, 0, n * sizeof(T));
        for (int64_t tap = 0; tap < count; ++tap) {
          const int64_t row = i + tap / x.kernel_width - x.up, column = j + tap % x.kernel_width - x.left;
          if (row < 0 || column < 0 || row >= x.height || column >= x.width) continue;
          const T* term = x.table + (x.codes[(grid * x.height + row) * x.width + column] * count + tap) * n;
          each_vector<T>(n, [&](int64_t c, int64_t left) {
            store_some(out + c, add(load_some(out + c, left), load_some(term + c, left)), left);
          });
        }
      }
}

template <class T> inline void taps_backward(const PixelCNNTaps<T>& x, int64_t first, int64_t last) {
  const int64_t n = x.channels, count = x.kernel_height * x.kernel_width;
  for (int64_t tap = first; tap < last; ++tap) {
    const int64_t down = tap / x.kernel_width - x.up, right = tap % x.kernel_width - x.left;
    for (int64_t row = 0; row < x.rows; ++row) memset(x.grad_table + (row * count + tap) * n, 0, n * sizeof(T));
    for (int64_t grid = 0; grid < x.count; ++grid)
      for (int64_t i = 0; i < x.height; ++i) {
        if (i + down < 0 || i + down >= x.height) continue;
        const int64_t* codes = x.codes + (grid * x.height + i + down) * x.width + right;
        for (int64_t j = 0; j < x.width; ++j) {
          if (j + right < 0 || j + right >= x.width) continue;
          T* to = x.grad_table + (codes[j] * count + tap) * n;
          const T* step = x.grad + ((grid * x.height + i) * x.width + j) * n;
          each_vector<T>(n, [&](int64_t c, int64_t left) {
            store_some(to + c, add(load_some(to + c, left), load_some(step + c, left)), left);
          });
        }
      }
  }
}

}  // namespace pixelcnn
}  // namespace
}  // namespace vqkernels
