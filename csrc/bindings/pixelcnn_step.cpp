// vqkernels::pixelcnn_step on the CPU: finds every matrix and cache in its flat tensor; grids shared out over threads.
#include "../cpu/pixelcnn_step.h"

#include "views.h"

namespace vqkernels {
namespace {

constexpr int64_t kGridsPerThread = 4;  // a thread reads all weights at every position, however few grids it has

// Consecutive pieces of a flat tensor.
template <class T> struct Pieces {
  T* at;
  T* end;

  T* take(int64_t count) {
    T* piece = at;
    STD_TORCH_CHECK(count <= end - at, "weights or cache are shorter than sizes say");
    at += count;
    return piece;
  }
  // A matrix in panels of 128 bytes of outputs.
  T* matrix(int64_t inputs, int64_t outputs) {
    constexpr int64_t kPanel = 128 / sizeof(T);
    return take(inputs * ((outputs + kPanel - 1) / kPanel * kPanel));
  }
};

void check_codes(const int64_t* codes, int64_t grids, int64_t size, int64_t begin, int64_t width, int64_t num_codes) {
  const int64_t seen = std::max<int64_t>(begin / width - 1, 0) * width;  // the earliest position whose code is read
  for (int64_t grid = 0; grid < grids; ++grid)
    for (int64_t i = seen; i < size; ++i) {
      const int64_t code = codes[grid * size + i];
      STD_TORCH_CHECK(code < num_codes, "codes must be below ", num_codes, ", but one is ", code);
      STD_TORCH_CHECK(code >= 0 || i >= begin, "codes before position ", begin, " must be known");
    }
}

template <class T>
void run(PixelCNNStep<T>& step, const std::vector<int64_t>& sizes, const Tensor& cache, const Tensor& logits,
         const Tensor& weights, const Tensor& biases, const std::optional<Tensor>& condition) {
  const int64_t channels = step.channels, rows = step.grids * step.copies, width = step.width, twice = 2 * channels;
  const auto data = [](const Tensor& x) { return static_cast<T*>(x.mutable_data_ptr()); };
  Pieces<const T> pieces{data(weights), data(weights) + weights.numel()};
  Pieces<T> caches{data(cache), data(cache) + cache.numel()};
  std::vector<PixelCNNLayer<T>> layers(step.layers);
  for (int64_t l = 0; l < step.layers; ++l) {
    PixelCNNLayer<T>& layer = layers[l];
    layer.reach = (l > 0 ? sizes[4] : sizes[5]) / 2;
    layer.taps = layer.reach + (l > 0);
    layer.vertical = pieces.matrix(layer.taps * (2 * layer.reach + 1) * channels, twice);
    layer.vertical_bias = pieces.matrix(1, twice);
    layer.vertical_to_horizontal = pieces.matrix(twice, twice);
    layer.horizontal = pieces.matrix(layer.taps * channels, twice);
    layer.output = pieces.matrix(channels, channels);
    layer.output_bias = pieces.matrix(1, channels);
    layer.condition_vertical = condition ? pieces.matrix(step.condition_channels, twice) : nullptr;
    layer.condition_horizontal = condition ? pieces.matrix(step.condition_channels, twice) : nullptr;
    layer.label_bias = data(biases) + l * rows * 2 * twice;
    layer.ring = caches.take(layer.taps * rows * (width + 2 * layer.reach) * channels);
  }
  for (PixelCNNLayer<T>& layer : layers) layer.inputs = caches.take(rows * (layer.reach + width) * channels);
  for (PixelCNNLayer<T>& layer : layers) layer.bias = caches.take(rows * width * twice);
  step.layer = layers.data();
  step.head = pieces.matrix(channels, step.head_channels);
  step.head_bias = pieces.matrix(1, step.head_channels);
  step.output = pieces.matrix(step.head_channels, step.num_codes);
  step.output_bias = pieces.matrix(1, step.num_codes);
  step.embedding = pieces.matrix(step.num_codes, channels);
  step.above = caches.take(rows * width * twice);
  step.left = caches.take(rows * twice);
  step.gated = caches.take(rows * channels);
  step.hidden = caches.take(rows * step.head_channels);
  step.scores = caches.take(rows * step.num_codes);
  step.logits = logits.numel() > 0 ? data(logits) : nullptr;
  step.condition = condition ? data(*condition) : nullptr;
  parallel_for(step.grids, kGridsPerThread, [&](int64_t first, int64_t last) { pixelcnn_step(step, first, last); });
}

template <class T>
PixelCNNStep<T> step_of(const Tensor& codes, const Tensor& biases, const Tensor& noise, const std::vector<int64_t>& s) {
  PixelCNNStep<T> step{};
  step.channels = s[0], step.layers = s[1], step.head_channels = s[2], step.num_codes = s[3];
  step.condition_channels = s[6];
  step.grids = codes.size(0), step.height = codes.size(1), step.width = codes.size(2);
  step.copies = biases.size(1) / step.grids;
  step.codes = static_cast<int64_t*>(codes.mutable_data_ptr());
  step.noise = static_cast<const double*>(noise.const_data_ptr());
  return step;
}

}  // namespace

// Writes codes (B, H, W) int64 where they are negative at the positions [begin, end), the cache, and logits (end -
// begin, R, K) unless empty. `vqkernels/ops/pixelcnn_step.py` checks and explains the arguments; sizes are its
// PixelCNNSizes.
void pixelcnn_step_cpu(const Tensor& codes, const Tensor& cache, const Tensor& logits, const Tensor& weights,
                       const Tensor& biases, std::optional<Tensor> condition, const Tensor& noise,
                       std::vector<int64_t> sizes, bool residual_head, int64_t begin, int64_t end, double temperature,
                       int64_t top_k, double top_p, double guidance) {
  STD_TORCH_CHECK(sizes.size() == 7 && codes.dim() == 3 && biases.dim() == 3, "sizes, codes or biases are malformed");
  STD_TORCH_CHECK(codes.scalar_type() == ScalarType::Long && noise.scalar_type() == ScalarType::Double,
                  "codes must be int64 and noise float64");
  const int64_t grids = codes.size(0), size = codes.size(1) * codes.size(2);
  STD_TORCH_CHECK(0 <= begin && begin <= end && end <= size && noise.numel() == grids * size,
                  "begin, end or noise do not fit the codes");
  if (grids == 0 || begin == end) return;
  const int64_t rows = biases.size(1);
  STD_TORCH_CHECK((rows == grids || rows == 2 * grids) && biases.size(0) == sizes[1] && biases.size(2) == 4 * sizes[0],
                  "biases must be (layers, B or 2 B, 4 channels)");
  STD_TORCH_CHECK(logits.numel() == 0 || logits.numel() == (end - begin) * rows * sizes[3], "logits have a wrong size");
  STD_TORCH_CHECK(
      condition.has_value() == (sizes[6] > 0) && (!condition || condition->numel() == rows * size * sizes[6]),
      "condition does not fit sizes");
  for (const Tensor* x : {&cache, &logits, &weights, &biases})
    STD_TORCH_CHECK(x->scalar_type() == weights.scalar_type(), "cache, logits, weights and biases differ in dtype");
  STD_TORCH_CHECK(!condition || condition->scalar_type() == weights.scalar_type(), "condition differs in dtype");
  for (const Tensor* x : {&codes, &cache, &logits, &weights, &biases, &noise})
    STD_TORCH_CHECK(x->is_contiguous(), "every tensor must be contiguous");
  STD_TORCH_CHECK(!condition || condition->is_contiguous(), "condition must be contiguous");
  check_codes(static_cast<const int64_t*>(codes.const_data_ptr()), grids, size, begin, codes.size(2), sizes[3]);
  const auto with = [&](auto step) {
    step.residual_head = residual_head, step.begin = begin, step.end = end, step.temperature = temperature;
    step.top_k = top_k, step.top_p = top_p, step.guidance = guidance;
    run(step, sizes, cache, logits, weights, biases, condition);
  };
  if (weights.scalar_type() == ScalarType::Double) return with(step_of<double>(codes, biases, noise, sizes));
  STD_TORCH_CHECK(weights.scalar_type() == ScalarType::Float, "weights must be float32 or float64");
  with(step_of<float>(codes, biases, noise, sizes));
}

STABLE_TORCH_LIBRARY_IMPL(vqkernels, CPU, m) { m.impl("pixelcnn_step", TORCH_BOX(&pixelcnn_step_cpu)); }

}  // namespace vqkernels
