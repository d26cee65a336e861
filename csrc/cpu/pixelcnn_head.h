// What stands between the matrix products of a PixelCNN's head in training: bias and ReLU, and the way from rows
// (grid, position) of codes to planes (grid, code, position) and back.
//
// One pass over the activations for each: a bias is added where they are read anyway, and the sums that are its gradient
// are made on the way, for each grid in order, so that no bit depends on the threads.
#pragma once
#include <stdint.h>

namespace vqkernels {

template <class T> struct PixelCNNHead {
  int64_t grids, size, channels;  // positions in a grid; hidden channels, or codes
  const T* from;                  // rows (B size, channels), or planes (B, channels, size)
  const T* bias;                  // (channels)
  const T* hidden;                // (B size, channels), what the ReLU gave: backward alone
  T* to;
  T* sums;  // (B, channels), backward alone
};

// Grids [first, last).
#define VQKERNELS_PIXELCNN_HEAD(level, T)                                                               \
  void pixelcnn_rectify_##level(const PixelCNNHead<T>& x, int64_t first, int64_t last);                 \
  void pixelcnn_rectify_backward_##level(const PixelCNNHead<T>& x, int64_t first, int64_t last);        \
  void pixelcnn_planes_##level(const PixelCNNHead<T>& x, int64_t first, int64_t last);                  \
  void pixelcnn_planes_backward_##level(const PixelCNNHead<T>& x, int64_t first, int64_t last);

VQKERNELS_PIXELCNN_HEAD(baseline, float)
VQKERNELS_PIXELCNN_HEAD(baseline, double)
#if defined(__x86_64__)
VQKERNELS_PIXELCNN_HEAD(avx2, float)
VQKERNELS_PIXELCNN_HEAD(avx2, double)
VQKERNELS_PIXELCNN_HEAD(avx512, float)
VQKERNELS_PIXELCNN_HEAD(avx512, double)
#endif

}  // namespace vqkernels
