// One step of cached ancestral sampling from a gated PixelCNN: every layer of both stacks, the head and the draw.
//
// Fused: a position of the horizontal stack (two products a layer, the gate, the residual), the head, guidance,
// temperature, truncation and the draw from a uniform number that was drawn before; where a position begins a grid row,
// the vertical stack of that row first. Never built: the activations of a position that is over, but for what a later
// one reads. A position reads every weight of the horizontal stack and the head once for all grids of a thread, and
// nothing is allocated. Weights lie in panels of 128 bytes of outputs (vqkernels/backends/eager/pixelcnn_step.py has the layout of
// weights and cache), so that a product walks them front to back with its sums in registers.
//
// Every sum runs over its inputs in order, whatever the batch, the threads and the chunks: a grid's bits depend on
// itself alone. SIMD levels differ in rounding. Ties of equal probabilities: the lowest code is kept first.
#pragma once
#include <stdint.h>

namespace vqkernels {

template <class T> struct PixelCNNLayer {
  int64_t reach, taps;
  const T *vertical, *vertical_bias, *vertical_to_horizontal, *horizontal, *output, *output_bias;
  const T *condition_vertical, *condition_horizontal;  // null without a condition
  const T* label_bias;  // (R, 4C): vertical gate, then all constants of the horizontal gate
  T* ring;              // (taps, R, W + 2 reach, C)
  T* inputs;            // (R, reach + W, C)
  T* bias;              // (R, W, 2C)
};

template <class T> struct PixelCNNStep {
  int64_t channels, layers, head_channels, num_codes, condition_channels;
  int64_t grids, copies, height, width;  // R = grids * copies rows of the stack; copies is 2 under guidance
  const PixelCNNLayer<T>* layer;
  const T *head, *head_bias, *output, *output_bias, *embedding;
  const T* condition;                         // (R, H, W, condition channels)
  T *above, *left, *gated, *hidden, *scores;  // (R, W, 2C), (R, 2C), (R, C), (R, head), (R, K)
  T* logits;                                  // (end - begin, R, K), or null
  int64_t* codes;                             // (B, H, W)
  const double* noise;
  bool residual_head;
  int64_t begin, end, top_k;
  double temperature, top_p, guidance;
};

// Grids [first, last) through the positions [begin, end).
void pixelcnn_step(const PixelCNNStep<float>& step, int64_t first, int64_t last);
void pixelcnn_step(const PixelCNNStep<double>& step, int64_t first, int64_t last);

}  // namespace vqkernels
