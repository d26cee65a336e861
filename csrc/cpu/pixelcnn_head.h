// What stands between the matrix products of a PixelCNN's head in training: bias and ReLU, and the way from rows
// (grid, position) of codes to planes (grid, code, position) and back.
//
// One pass over the activations for each: a bias is added where they are read anyway, and the sums that are its
// gradient are made on the way, for each grid in order, so that no bit depends on the threads.
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

}  // namespace vqkernels
