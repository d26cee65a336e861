// The passes of a PixelCNN layer on the CPU: shapes, new tensors, grids shared out over threads, SIMD level.
#include <tuple>

#include "passes.h"

namespace vqkernels {
namespace {

PixelCNNGrids grids_of(const std::vector<int64_t>& grid, int64_t channels) {
  STD_TORCH_CHECK(grid.size() == 3 && grid[0] >= 0 && grid[1] >= 1 && grid[2] >= 1, "grid must be (B, H, W)");
  return {grid[0], grid[1], grid[2], channels, false};
}

int64_t positions(const PixelCNNGrids& g) { return g.count * g.size(); }
int64_t tile_rows(const PixelCNNGrids& g) { return g.count * g.height * g.tiles(); }

void set_shift(PixelCNNGrids& g, const Tensor& shift, const Tensor& like) {
  STD_TORCH_CHECK(shift.dim() == 2 && (shift.size(0) == g.count || shift.size(0) == positions(g)),
                  "shift must have a row for each grid or for each position");
  g.shift_per_position = shift.size(0) != g.count;
  check_size(shift, like, shift.size(0) * 2 * g.channels, "shift");
}

}  // namespace

// -> above (B H W, 2C) of the products (6, B H T, 2C), and the tiles (6, B H T, 2C) of the gated features, empty for
// the last layer. Not transformed: x is `above` itself, and the first result is empty.
std::tuple<Tensor, Tensor> pixelcnn_vertical_cpu(const Tensor& x, const Tensor& shift, std::vector<int64_t> grid,
                                                 bool transformed, bool last) {
  STD_TORCH_CHECK(x.dim() == (transformed ? 3 : 2), "x has a wrong number of dimensions");
  PixelCNNGrids g = grids_of(grid, x.size(x.dim() - 1) / 2);
  set_shift(g, shift, x);
  const int64_t twice = 2 * g.channels;
  check_size(x, x, transformed ? 6 * tile_rows(g) * twice : positions(g) * twice, "x");
  Tensor above = rows_like(x, {transformed ? positions(g) : 0, twice});
  Tensor tiles = rows_like(x, {6, last ? 0 : tile_rows(g), twice});
  with_float(x, [&](auto* type) {
    using T = Element<decltype(type)>;
    const PixelCNNVertical<T> pass{g, transformed ? read<T>(x) : nullptr,
                                   transformed ? written<T>(above) : const_cast<T*>(read<T>(x)), read<T>(shift),
                                   last ? nullptr : written<T>(tiles)};
    run_pass(active().pixelcnn<T>().vertical, pass, g.count, g.size() * twice);
  });
  return {above, tiles};
}

// -> the gradients of x and of the shift. grad_tiles is empty for the last layer.
std::tuple<Tensor, Tensor> pixelcnn_vertical_backward_cpu(const Tensor& grad_above, const Tensor& grad_tiles,
                                                          const Tensor& above, const Tensor& shift,
                                                          std::vector<int64_t> grid, bool transformed) {
  STD_TORCH_CHECK(above.dim() == 2, "above must be (B H W, 2C)");
  PixelCNNGrids g = grids_of(grid, above.size(1) / 2);
  set_shift(g, shift, above);
  const int64_t twice = 2 * g.channels;
  check_size(above, above, positions(g) * twice, "above");
  check_size(grad_above, above, positions(g) * twice, "grad_above");
  const bool last = grad_tiles.numel() == 0;
  if (!last) check_size(grad_tiles, above, 6 * tile_rows(g) * twice, "grad_tiles");
  Tensor grad = transformed ? rows_like(above, {6, tile_rows(g), twice}) : rows_like(above, {positions(g), twice});
  Tensor grad_shift = rows_like(above, {shift.size(0), twice});
  with_float(above, [&](auto* type) {
    using T = Element<decltype(type)>;
    const PixelCNNVerticalBackward<T> pass{g,
                                           last ? nullptr : read<T>(grad_tiles),
                                           read<T>(grad_above),
                                           read<T>(above),
                                           read<T>(shift),
                                           transformed ? written<T>(grad) : nullptr,
                                           transformed ? nullptr : written<T>(grad),
                                           written<T>(grad_shift)};
    run_pass(active().pixelcnn<T>().vertical_backward, pass, g.count, g.size() * twice);
  });
  return {grad, grad_shift};
}

// -> tanh(a) sigmoid(b) of left (B H W, 2C) + shift, times scale (B H W, C).
Tensor pixelcnn_gate_cpu(const Tensor& left, const Tensor& shift, std::optional<Tensor> scale,
                         std::vector<int64_t> grid) {
  STD_TORCH_CHECK(left.dim() == 2, "left must be (B H W, 2C)");
  PixelCNNGrids g = grids_of(grid, left.size(1) / 2);
  set_shift(g, shift, left);
  check_size(left, left, positions(g) * 2 * g.channels, "left");
  if (scale) check_size(*scale, left, positions(g) * g.channels, "scale");
  Tensor gated = rows_like(left, {positions(g), g.channels});
  with_float(left, [&](auto* type) {
    using T = Element<decltype(type)>;
    const PixelCNNGate<T> pass{g,       read<T>(left),     read<T>(shift), scale ? read<T>(*scale) : nullptr,
                               nullptr, written<T>(gated), nullptr,        nullptr};
    run_pass(active().pixelcnn<T>().gate, pass, g.count, g.size() * 2 * g.channels);
  });
  return gated;
}

// -> the gradients of left and shift, and the gated features again.
std::tuple<Tensor, Tensor, Tensor> pixelcnn_gate_backward_cpu(const Tensor& grad, const Tensor& left,
                                                              const Tensor& shift, std::optional<Tensor> scale,
                                                              std::vector<int64_t> grid) {
  STD_TORCH_CHECK(left.dim() == 2, "left must be (B H W, 2C)");
  PixelCNNGrids g = grids_of(grid, left.size(1) / 2);
  set_shift(g, shift, left);
  check_size(left, left, positions(g) * 2 * g.channels, "left");
  check_size(grad, left, positions(g) * g.channels, "grad");
  if (scale) check_size(*scale, left, positions(g) * g.channels, "scale");
  Tensor grad_left = rows_like(left, {positions(g), 2 * g.channels});
  Tensor grad_shift = rows_like(left, {shift.size(0), 2 * g.channels});
  Tensor gated = rows_like(left, {positions(g), g.channels});
  with_float(left, [&](auto* type) {
    using T = Element<decltype(type)>;
    const PixelCNNGate<T> pass{g,
                               read<T>(left),
                               read<T>(shift),
                               scale ? read<T>(*scale) : nullptr,
                               read<T>(grad),
                               written<T>(gated),
                               written<T>(grad_left),
                               written<T>(grad_shift)};
    run_pass(active().pixelcnn<T>().gate_backward, pass, g.count, g.size() * 2 * g.channels);
  });
  return {grad_left, grad_shift, gated};
}

// -> pairs (B H W, 2C), empty for the last layer, and features (B H W, C) = update + bias + residual.
std::tuple<Tensor, Tensor> pixelcnn_join_cpu(const Tensor& update, const Tensor& bias, std::optional<Tensor> residual,
                                             std::vector<int64_t> grid, bool last) {
  STD_TORCH_CHECK(update.dim() == 2, "update must be (B H W, C)");
  const PixelCNNGrids g = grids_of(grid, update.size(1));
  check_size(update, update, positions(g) * g.channels, "update");
  check_size(bias, update, g.channels, "bias");
  if (residual) check_size(*residual, update, positions(g) * g.channels, "residual");
  Tensor pairs = rows_like(update, {last ? 0 : positions(g), 2 * g.channels});
  Tensor features = rows_like(update, {positions(g), g.channels});
  with_float(update, [&](auto* type) {
    using T = Element<decltype(type)>;
    const PixelCNNJoin<T> pass{g,
                               read<T>(update),
                               read<T>(bias),
                               residual ? read<T>(*residual) : nullptr,
                               last ? nullptr : written<T>(pairs),
                               written<T>(features)};
    run_pass(active().pixelcnn<T>().join, pass, g.count, g.size() * 2 * g.channels);
  });
  return {pairs, features};
}

// -> the gradient (B H W, C) of the features. grad_pairs is empty for the last layer.
Tensor pixelcnn_join_backward_cpu(const Tensor& grad_pairs, const Tensor& grad_features, std::vector<int64_t> grid) {
  STD_TORCH_CHECK(grad_features.dim() == 2, "grad_features must be (B H W, C)");
  const PixelCNNGrids g = grids_of(grid, grad_features.size(1));
  check_size(grad_features, grad_features, positions(g) * g.channels, "grad_features");
  const bool last = grad_pairs.numel() == 0;
  if (!last) check_size(grad_pairs, grad_features, positions(g) * 2 * g.channels, "grad_pairs");
  Tensor grad = rows_like(grad_features, {positions(g), g.channels});
  with_float(grad_features, [&](auto* type) {
    using T = Element<decltype(type)>;
    const PixelCNNJoinBackward<T> pass{g, last ? nullptr : read<T>(grad_pairs), read<T>(grad_features),
                                       written<T>(grad)};
    run_pass(active().pixelcnn<T>().join_backward, pass, g.count, g.size() * 2 * g.channels);
  });
  return grad;
}

// -> the factors (6, outputs, 2C) of the tiles: Winograd's transform of a weight (outputs, C, 2, 3).
Tensor pixelcnn_filters_cpu(const Tensor& weight_in) {
  const Tensor weight = torch::stable::contiguous(weight_in);
  STD_TORCH_CHECK(weight.dim() == 4 && weight.size(2) == 2 && weight.size(3) == 3, "weight must be (outputs, C, 2, 3)");
  const int64_t outputs = weight.size(0), channels = weight.size(1);
  Tensor filters = rows_like(weight, {6, outputs, 2 * channels});
  with_float(weight, [&](auto* type) {
    using T = Element<decltype(type)>;
    const PixelCNNFilters<T> pass{outputs, channels, read<T>(weight), written<T>(filters)};
    run_pass(active().pixelcnn<T>().filters, pass, outputs, 6 * channels);
  });
  return filters;
}

// -> the gradient of the weight.
Tensor pixelcnn_filters_backward_cpu(const Tensor& grad) {
  STD_TORCH_CHECK(grad.dim() == 3 && grad.size(0) == 6 && grad.size(2) % 2 == 0 && grad.is_contiguous(),
                  "grad must be contiguous (6, outputs, 2C)");
  const int64_t outputs = grad.size(1), channels = grad.size(2) / 2;
  Tensor weight = rows_like(grad, {outputs, channels, 2, 3});
  with_float(grad, [&](auto* type) {
    using T = Element<decltype(type)>;
    const PixelCNNFilters<T> pass{outputs, channels, read<T>(grad), written<T>(weight)};
    run_pass(active().pixelcnn<T>().filters_backward, pass, outputs, 6 * channels);
  });
  return weight;
}

namespace {

template <class T>
PixelCNNTaps<T> taps_of(const Tensor& codes, int64_t rows, const std::vector<int64_t>& kernel, int64_t channels) {
  STD_TORCH_CHECK(
      codes.dim() == 3 && codes.scalar_type() == ScalarType::Long && codes.is_contiguous() && kernel.size() == 4,
      "codes must be contiguous (B, H, W) int64, and kernel (height, width, up, left)");
  PixelCNNTaps<T> taps{};
  taps.count = codes.size(0), taps.height = codes.size(1), taps.width = codes.size(2), taps.channels = channels;
  taps.rows = rows, taps.codes = read<int64_t>(codes);
  taps.kernel_height = kernel[0], taps.kernel_width = kernel[1], taps.up = kernel[2], taps.left = kernel[3];
  for (int64_t i = 0; i < codes.numel(); ++i)
    STD_TORCH_CHECK(taps.codes[i] >= 0 && taps.codes[i] < rows, "codes must be in [0, ", rows - 1, "], but one is ",
                    taps.codes[i]);
  return taps;
}

}  // namespace

// -> (B H W, channels): for each position, the sum over the taps inside the grid of table (rows, taps, channels).
Tensor pixelcnn_taps_cpu(const Tensor& codes, const Tensor& table, std::vector<int64_t> kernel) {
  STD_TORCH_CHECK(
      table.dim() == 3 && kernel.size() == 4 && table.size(1) == kernel[0] * kernel[1] && table.is_contiguous(),
      "table must be contiguous (rows, taps, channels)");
  Tensor out = rows_like(table, {codes.numel(), table.size(2)});
  with_float(table, [&](auto* type) {
    using T = Element<decltype(type)>;
    PixelCNNTaps<T> pass = taps_of<T>(codes, table.size(0), kernel, table.size(2));
    pass.table = read<T>(table), pass.out = written<T>(out);
    run_pass(active().pixelcnn<T>().taps, pass, pass.count, pass.height * pass.width * table.size(1) * table.size(2));
  });
  return out;
}

// -> the gradient of the table.
Tensor pixelcnn_taps_backward_cpu(const Tensor& grad, const Tensor& codes, int64_t rows, std::vector<int64_t> kernel) {
  STD_TORCH_CHECK(grad.dim() == 2 && kernel.size() == 4, "grad must be (B H W, channels)");
  check_size(grad, grad, codes.numel() * grad.size(1), "grad");
  const int64_t taps = kernel[0] * kernel[1];
  Tensor out = rows_like(grad, {rows, taps, grad.size(1)});
  with_float(grad, [&](auto* type) {
    using T = Element<decltype(type)>;
    PixelCNNTaps<T> pass = taps_of<T>(codes, rows, kernel, grad.size(1));
    pass.grad = read<T>(grad), pass.grad_table = written<T>(out);
    run_pass(active().pixelcnn<T>().taps_backward, pass, taps, grad.numel());
  });
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(vqkernels, CPU, m) {
  m.impl("pixelcnn_vertical", TORCH_BOX(&pixelcnn_vertical_cpu));
  m.impl("pixelcnn_vertical_backward", TORCH_BOX(&pixelcnn_vertical_backward_cpu));
  m.impl("pixelcnn_gate", TORCH_BOX(&pixelcnn_gate_cpu));
  m.impl("pixelcnn_gate_backward", TORCH_BOX(&pixelcnn_gate_backward_cpu));
  m.impl("pixelcnn_join", TORCH_BOX(&pixelcnn_join_cpu));
  m.impl("pixelcnn_join_backward", TORCH_BOX(&pixelcnn_join_backward_cpu));
  m.impl("pixelcnn_filters", TORCH_BOX(&pixelcnn_filters_cpu));
  m.impl("pixelcnn_filters_backward", TORCH_BOX(&pixelcnn_filters_backward_cpu));
  m.impl("pixelcnn_taps", TORCH_BOX(&pixelcnn_taps_cpu));
  m.impl("pixelcnn_taps_backward", TORCH_BOX(&pixelcnn_taps_backward_cpu));
}

}  // namespace vqkernels
