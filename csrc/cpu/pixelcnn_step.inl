// The walk through the stacks for one SIMD level: see pixelcnn_step.h.
#include "pixelcnn_step.h"
#include "products.inl"

namespace vqkernels {
namespace {
namespace pixelcnn {

// Whole panels of `outputs` outputs, in elements of one input.
template <class T> inline int64_t padded(int64_t outputs) {
  constexpr int64_t kPanel = kPanelVectors * Lanes<T>::kCount;
  return (outputs + kPanel - 1) / kPanel * kPanel;
}

template <class T> inline int64_t panel_stride(int64_t inputs) { return inputs * kPanelVectors * Lanes<T>::kCount; }

// The features of a code: gathered from the panels of the embedding.
template <class T> inline void embed(const PixelCNNStep<T>& step, int64_t code, T* out) {
  constexpr int64_t kPanel = kPanelVectors * Lanes<T>::kCount;
  for (int64_t c = 0; c < step.channels; c += kPanel) {
    const int64_t count = step.channels - c < kPanel ? step.channels - c : kPanel;
    memcpy(out + c, step.embedding + (c / kPanel * step.num_codes + code) * kPanel, count * sizeof(T));
  }
}

// The vertical stack for a grid row: leaves in layer.bias what it and the label add to the horizontal stack.
template <class T> inline void advance_row(const PixelCNNStep<T>& step, int64_t first, int64_t last, int64_t row) {
  const int64_t channels = step.channels, twice = 2 * channels, width = step.width;
  const int64_t stack_rows = step.grids * step.copies;
  for (int64_t r = first; r < last; ++r) {
    if (row > 0) {
      const PixelCNNLayer<T>& layer = step.layer[0];
      const int64_t* codes = step.codes + (r / step.copies * step.height + row - 1) * width;
      T* inputs = layer.ring + ((row - 1) % layer.taps * stack_rows + r) * (width + 2 * layer.reach) * channels;
      for (int64_t w = 0; w < width; ++w) embed(step, codes[w], inputs + (layer.reach + w) * channels);
    }
    T* above = step.above + r * width * twice;
    for (int64_t l = 0; l < step.layers; ++l) {
      const PixelCNNLayer<T>& layer = step.layer[l];
      const int64_t window = (2 * layer.reach + 1) * channels, padded_width = width + 2 * layer.reach;
      for (int64_t tap = 0; tap < layer.taps; ++tap) {
        const int64_t seen = row - layer.reach + tap;  // a row above the grid: its slot is still zero
        const int64_t slot = (seen % layer.taps + layer.taps) % layer.taps;
        const T* inputs = layer.ring + (slot * stack_rows + r) * padded_width * channels;
        multiply<T>({inputs, channels, window, layer.vertical + panel_stride<T>(tap * window),
                     panel_stride<T>(layer.taps * window), twice, tap ? nullptr : layer.vertical_bias,
                     tap ? above : nullptr, twice, above, twice},
                    width);
      }
      const T* label = layer.label_bias + r * 2 * twice;
      T* bias = layer.bias + r * width * twice;
      multiply<T>({above, twice, twice, layer.vertical_to_horizontal, panel_stride<T>(twice), twice, nullptr,
                   label + twice, 0, bias, twice},
                  width);
      if (step.condition) {
        const int64_t count = step.condition_channels;
        const T* condition = step.condition + (r * step.height + row) * width * count;
        multiply<T>({condition, count, count, layer.condition_vertical, panel_stride<T>(count), twice, nullptr, above,
                     twice, above, twice},
                    width);
        multiply<T>({condition, count, count, layer.condition_horizontal, panel_stride<T>(count), twice, nullptr, bias,
                     twice, bias, twice},
                    width);
      }
      if (l + 1 == step.layers) continue;
      const PixelCNNLayer<T>& next = step.layer[l + 1];
      T* out = next.ring + (row % next.taps * stack_rows + r) * (width + 2 * next.reach) * channels;
      for (int64_t w = 0; w < width; ++w)
        gate_row(above + w * twice, label, channels, out + (next.reach + w) * channels);
    }
  }
}

template <class T> inline void rectify_rows(T* x, int64_t stride, int64_t count, int64_t rows) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = 0; i < count; ++i) x[r * stride + i] = x[r * stride + i] < T(0) ? T(0) : x[r * stride + i];
}

// The horizontal stack at a column, and the head where it is wanted: leaves the logits in step.scores.
template <class T>
inline void advance_column(const PixelCNNStep<T>& step, int64_t first, int64_t last, int64_t column, bool head) {
  const int64_t channels = step.channels, twice = 2 * channels, rows = last - first;
  T *left = step.left + first * twice, *gated = step.gated + first * channels;
  for (int64_t l = 0; l < step.layers; ++l) {
    const PixelCNNLayer<T>& layer = step.layer[l];
    const int64_t stride = (layer.reach + step.width) * channels, seen = layer.taps * channels;
    const T* inputs = layer.inputs + first * stride;
    multiply<T>({inputs + column * channels, stride, seen, layer.horizontal, panel_stride<T>(seen), twice, nullptr,
                 layer.bias + (first * step.width + column) * twice, step.width * twice, left, twice},
                rows);
    for (int64_t r = 0; r < rows; ++r) gate_row<T>(left + r * twice, nullptr, channels, gated + r * channels);
    T* out = left;  // features of the last layer
    int64_t out_stride = twice;
    if (l + 1 < step.layers) {
      const PixelCNNLayer<T>& next = step.layer[l + 1];
      out_stride = (next.reach + step.width) * channels;
      out = next.inputs + first * out_stride + (next.reach + column) * channels;
    }
    multiply<T>({gated, channels, channels, layer.output, panel_stride<T>(channels), channels, layer.output_bias,
                 l > 0 ? inputs + (layer.reach + column) * channels : nullptr, stride, out, out_stride},
                rows);
  }
  if (!head) return;
  T *hidden = step.hidden + first * step.head_channels, *scores = step.scores + first * step.num_codes;
  if (step.residual_head) rectify_rows(left, twice, channels, rows);
  multiply<T>({left, twice, channels, step.head, panel_stride<T>(channels), step.head_channels, step.head_bias, nullptr,
               0, hidden, step.head_channels},
              rows);
  rectify_rows(hidden, step.head_channels, step.head_channels, rows);
  multiply<T>({hidden, step.head_channels, step.head_channels, step.output, panel_stride<T>(step.head_channels),
               step.num_codes, step.output_bias, nullptr, 0, scores, step.num_codes},
              rows);
}

// x = exp(x) for x <= 0; 0 below the range of normal numbers.
inline void exponentials(double* x, int64_t count) {
  constexpr int kCount = Lanes<double>::kCount;
  const Doubles lowest = splat(Lanes<double>::kLowest);
  for (int64_t i = 0; i < count; i += kCount) {
    const Doubles value = load_some(x + i, count - i);
    const Exponential<double> e = exponential<double>(value < lowest ? lowest : value);
    store_some(x + i, value < lowest ? splat(0.0) : fma(e.scale, e.rest, e.scale), count - i);
  }
}

}  // namespace pixelcnn
}  // namespace
}  // namespace vqkernels
