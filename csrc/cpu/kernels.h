// The kernels that are compiled once per SIMD level, as one table of function pointers for each level.
//
// level_<name>.cpp makes the table of its level: it includes every body (kernels.inl) and is compiled with the flags
// that setup.py gives its name. level.cpp lists the levels and knows which of them a CPU has. A new level is a row
// there, a level_<name>.cpp, its flags, and a section of simd.h where it has vectors of its own.
#pragma once
#include <stdint.h>

#include <type_traits>
#include <vector>

#include "entropy.h"
#include "pixelcnn_head.h"
#include "pixelcnn_layer.h"
#include "pixelcnn_step.h"
#include "sample.h"
#include "sweep.h"

namespace vqkernels {

// Runs the part [first, last) of what `x` describes.
template <class X> using Pass = void (*)(const X& x, int64_t first, int64_t last);

template <class T> struct PixelCNNKernels {
  // Of a step: rows [first, last) of the stack. `head`: leaves the logits in step.scores.
  void (*row)(const PixelCNNStep<T>& step, int64_t first, int64_t last, int64_t row);
  void (*column)(const PixelCNNStep<T>& step, int64_t first, int64_t last, int64_t column, bool head);

  // Of a layer: grids; of filters, outputs; of the gradient of a table, taps.
  Pass<PixelCNNVertical<T>> vertical;
  Pass<PixelCNNVerticalBackward<T>> vertical_backward;
  Pass<PixelCNNGate<T>> gate, gate_backward;
  Pass<PixelCNNJoin<T>> join;
  Pass<PixelCNNJoinBackward<T>> join_backward;
  Pass<PixelCNNFilters<T>> filters, filters_backward;
  Pass<PixelCNNTaps<T>> taps, taps_backward;

  // Of the head: grids.
  Pass<PixelCNNHead<T>> rectify, rectify_backward, planes, planes_backward;
};

struct Kernels {
  Sweep sweep;
  EntropyKernels<float> entropy;
  void (*sample_panel)(const SamplePanel& panel);
  void (*exponentials)(double* x, int64_t count);  // x <- exp(x) for x <= 0; 0 below the range of normal numbers
  PixelCNNKernels<float> pixelcnn_float;
  PixelCNNKernels<double> pixelcnn_double;

  template <class T> const PixelCNNKernels<T>& pixelcnn() const {
    if constexpr (std::is_same_v<T, double>) return pixelcnn_double;
    else return pixelcnn_float;
  }
};

struct Level {
  const char* name;
  bool (*supported)();  // by this CPU, which has every level before it
  const Kernels& (*kernels)();
};

// The levels that this CPU has, lowest first.
const std::vector<Level>& levels();

// The kernels of the level in force: the highest that this CPU has, or the one that VQKERNELS_SIMD names.
// Throws std::runtime_error where the named level is unknown or absent. Read at every call, so that tests can switch.
const Kernels& active();

}  // namespace vqkernels
