#include "pixelcnn_step.h"

#include <math.h>

#include <algorithm>
#include <numeric>
#include <vector>

#include "kernels.h"

namespace vqkernels {
namespace {

// The memory of one thread's draws.
struct Draw {
  std::vector<double> weight;
  std::vector<int64_t> order;
};

// Puts the kept codes at the front of draw.order and returns how many they are: the rule of vqkernels/backends/drawing.py.
int64_t keep(Draw& draw, int64_t top_k, double top_p) {
  const std::vector<double>& weight = draw.weight;
  const auto later = [&](int64_t a, int64_t b) { return weight[a] < weight[b] || (weight[a] == weight[b] && a > b); };
  const auto earlier = [&](int64_t a, int64_t b) { return later(b, a); };
  std::iota(draw.order.begin(), draw.order.end(), int64_t(0));
  const auto front = draw.order.begin();
  int64_t kept = int64_t(weight.size());
  if (top_k > 0 && top_k < kept) {
    kept = top_k;
    std::nth_element(front, front + (kept - 1), draw.order.end(), earlier);
  }
  if (top_p >= 1.0) return kept;
  double total = 0.0;
  for (int64_t i = 0; i < kept; ++i) total += weight[draw.order[i]];
  // The likeliest code moves to the back of the heap, one at a time: few of them hold most of the mass.
  std::make_heap(front, front + kept, later);
  double before = 0.0;
  int64_t heap = kept;
  while (heap > 0 && (heap == kept || before < top_p * total)) {
    std::pop_heap(front, front + heap, later);
    before += weight[draw.order[--heap]];
  }
  std::rotate(front, front + heap, front + kept);
  return kept - heap;
}

// A code from logits in draw.weight: the first, in index order, whose cumulative weight exceeds uniform times the end.
int64_t draw_code(Draw& draw, double uniform, double temperature, int64_t top_k, double top_p) {
  std::vector<double>& weight = draw.weight;
  const int64_t count = int64_t(weight.size());
  double most = weight[0], poison = 0.0;
  for (double x : weight) most = x > most ? x : most;
  for (double& x : weight) {
    x = (x - most) / temperature;
    poison += x != x ? x : 0.0;
  }
  if (poison != poison) return 0;
  active().exponentials(weight.data(), count);
  int64_t kept = count;
  const bool truncated = (top_k > 0 && top_k < count) || top_p < 1.0;
  if (truncated) {
    kept = keep(draw, top_k, top_p);
    std::sort(draw.order.begin(), draw.order.begin() + kept);
  }
  const auto code = [&](int64_t i) { return truncated ? draw.order[i] : i; };
  double end = 0.0;
  for (int64_t i = 0; i < kept; ++i) end += weight[code(i)];
  const double threshold = std::min(uniform * end, nextafter(end, 0.0));
  double cumulative = 0.0;
  for (int64_t i = 0; i < kept; ++i) {
    cumulative += weight[code(i)];
    if (cumulative > threshold) return code(i);
  }
  return code(kept - 1);
}

// Row `row` of the stack's logits as a grid's, in double: under guidance from the row with the label and the one
// without.
template <class T> void read_logits(const PixelCNNStep<T>& step, int64_t grid, std::vector<double>& out) {
  const T* with_label = step.scores + grid * step.copies * step.num_codes;
  const T* without = with_label + step.num_codes;
  for (int64_t k = 0; k < step.num_codes; ++k) {
    out[k] = double(with_label[k]);
    if (step.copies == 2) out[k] = double(without[k]) + step.guidance * (double(with_label[k]) - double(without[k]));
  }
}

// The first layer's inputs of a code that was just drawn.
template <class T> void remember(const PixelCNNStep<T>& step, int64_t row, int64_t column, int64_t code) {
  constexpr int64_t kPanel = 128 / sizeof(T);
  const PixelCNNLayer<T>& layer = step.layer[0];
  T* out = layer.inputs + (row * (layer.reach + step.width) + layer.reach + column) * step.channels;
  for (int64_t c = 0; c < step.channels; ++c)
    out[c] = step.embedding[(c / kPanel * step.num_codes + code) * kPanel + c % kPanel];
}

template <class T> void advance(const PixelCNNStep<T>& step, int64_t first, int64_t last) {
  const PixelCNNKernels<T>& kernels = active().pixelcnn<T>();
  Draw draw{std::vector<double>(step.num_codes), std::vector<int64_t>(step.num_codes)};
  const int64_t first_row = first * step.copies, last_row = last * step.copies, stack_rows = step.grids * step.copies;
  for (int64_t position = step.begin; position < step.end; ++position) {
    const int64_t row = position / step.width, column = position % step.width;
    const auto place = [&](int64_t grid) { return (grid * step.height + row) * step.width + column; };
    if (column == 0) kernels.row(step, first_row, last_row, row);
    bool head = step.logits != nullptr;
    for (int64_t grid = first; grid < last; ++grid) head |= step.codes[place(grid)] < 0;
    kernels.column(step, first_row, last_row, column, head);
    if (step.logits) {
      T* out = step.logits + ((position - step.begin) * stack_rows + first_row) * step.num_codes;
      std::copy_n(step.scores + first_row * step.num_codes, (last_row - first_row) * step.num_codes, out);
    }
    for (int64_t grid = first; grid < last; ++grid) {
      int64_t& code = step.codes[place(grid)];
      if (code < 0) {
        read_logits(step, grid, draw.weight);
        code = draw_code(draw, step.noise[place(grid)], step.temperature, step.top_k, step.top_p);
      }
      for (int64_t copy = 0; copy < step.copies; ++copy) remember(step, grid * step.copies + copy, column, code);
    }
  }
}

}  // namespace

void pixelcnn_step(const PixelCNNStep<float>& step, int64_t first, int64_t last) { advance(step, first, last); }
void pixelcnn_step(const PixelCNNStep<double>& step, int64_t first, int64_t last) { advance(step, first, last); }

}  // namespace vqkernels
