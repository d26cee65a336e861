// What stands between the matrix products of a gated PixelCNN layer in training, and its gradients.
//
// Activations are rows (grid, row, column) of channels. The vertical stack's 2 x 3 convolution runs by Winograd's
// filtering F(4, 3) along the width, with the points 0, +-3/4, +-3/2 and infinity: six products of a quarter of the
// rows, half the multiply-adds of the convolution. Its inputs ("tiles") are (6, B H T, 2C), T = ceil(W / 4): the
// transform of the columns 4t - 1 to 4t + 4 of the grid row above, then of the grid row itself; zeros stand for what is
// outside.
//
// Fused: the way out of the products, the shift (bias, label, condition), the gate, and the way into the next layer's
// products; backward likewise, with the gates recomputed. A grid row is a few KB and stays in the first-level cache, so
// that every activation is read once and written once. Never built: padded, cropped or gated copies.
//
// A grid is one thread's: sums over a grid run in order, and no bit depends on the threads. SIMD levels differ in
// rounding.
#pragma once
#include <stdint.h>

namespace vqkernels {

struct PixelCNNGrids {
  int64_t count, height, width, channels;
  bool shift_per_position;  // a shift for each position, not for each grid

  int64_t tiles() const { return (width + 3) / 4; }
  int64_t size() const { return height * width; }
};

template <class T> struct PixelCNNVertical {
  PixelCNNGrids grids;
  const T* products;  // (6, B H T, 2C), or null: `above` is given
  T* above;           // (B H W, 2C)
  const T* shift;     // (B or B H W, 2C), added before the gate
  T* tiles;           // (6, B H T, 2C) of the gated features, or null
};

template <class T> struct PixelCNNVerticalBackward {
  PixelCNNGrids grids;
  const T* grad_tiles;  // null where the tiles were
  const T *grad_above, *above, *shift;
  T* grad_products;  // null where `above` was given: then the whole gradient of it goes to grad_given
  T* grad_given;
  T* grad_shift;
};

template <class T> struct PixelCNNGate {
  PixelCNNGrids grids;
  const T *left, *shift;  // (B H W, 2C), (B or B H W, 2C)
  const T* scale;         // (B H W, C), the scaled mask of a dropout, or null
  const T* grad;          // (B H W, C), backward alone
  T* gated;               // (B H W, C)
  T *grad_left, *grad_shift;
};

// The end of a layer: features = update + bias + residual, and for the next layer's 1 x 2 convolution each of them
// behind that of its left neighbour.
template <class T> struct PixelCNNJoin {
  PixelCNNGrids grids;
  const T *update, *bias, *residual;  // (B H W, C), (C), (B H W, C) or null
  T *pairs, *features;                // (B H W, 2C) or null, (B H W, C)
};

template <class T> struct PixelCNNJoinBackward {
  PixelCNNGrids grids;
  const T *grad_pairs, *grad_features;  // the former may be null
  T* grad;
};

// The factors (6, outputs, 2C) of the tiles from a convolution's weight (outputs, C, 2, 3), or the weight's gradient.
template <class T> struct PixelCNNFilters {
  int64_t outputs, channels;
  const T* from;
  T* to;
};

// The first layer: products with an embedding, one for each tap, are looked up by code and added.
template <class T> struct PixelCNNTaps {
  int64_t count, height, width, channels, rows;
  int64_t kernel_height, kernel_width, up, left;  // tap (r, c) sees (i + r - up, j + c - left)
  const int64_t* codes;                           // (B, H, W), of [0, rows)
  const T* table;                                 // (rows, taps, channels)
  T* out;                                         // (B H W, channels)
  const T* grad;
  T* grad_table;
};

}  // namespace vqkernels
