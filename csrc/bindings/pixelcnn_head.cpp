// The passes of a PixelCNN's head on the CPU: shapes, new tensors, grids shared out over threads.
#include <tuple>

#include "passes.h"

namespace vqkernels {
namespace {

// The grids of rows (B size, channels).
template <class T> PixelCNNHead<T> rows_of_grids(const Tensor& rows, int64_t grids) {
  STD_TORCH_CHECK(rows.dim() == 2 && grids >= 0 && (grids == 0 ? rows.size(0) == 0 : rows.size(0) % grids == 0),
                  "x must be rows of whole grids");
  PixelCNNHead<T> head{};
  head.grids = grids, head.size = grids == 0 ? 0 : rows.size(0) / grids, head.channels = rows.size(1);
  return head;
}

}  // namespace

// -> relu(x + bias) of rows (B size, channels).
Tensor pixelcnn_rectify_cpu(const Tensor& x, const Tensor& bias, int64_t grids) {
  check_size(x, x, x.numel(), "x");
  Tensor out = rows_like(x, {x.size(0), x.size(1)});
  with_float(x, [&](auto* type) {
    using T = Element<decltype(type)>;
    PixelCNNHead<T> pass = rows_of_grids<T>(x, grids);
    check_size(bias, x, pass.channels, "bias");
    pass.from = read<T>(x), pass.bias = read<T>(bias), pass.to = written<T>(out);
    run_pass(active().pixelcnn<T>().rectify, pass, grids, pass.size * pass.channels);
  });
  return out;
}

// -> the gradient of x, and its sums over each grid (B, channels).
std::tuple<Tensor, Tensor> pixelcnn_rectify_backward_cpu(const Tensor& grad, const Tensor& hidden, int64_t grids) {
  check_size(grad, grad, grad.numel(), "grad");
  check_size(hidden, grad, grad.numel(), "hidden");
  Tensor out = rows_like(grad, {grad.size(0), grad.size(1)}), sums = rows_like(grad, {grids, grad.size(1)});
  with_float(grad, [&](auto* type) {
    using T = Element<decltype(type)>;
    PixelCNNHead<T> pass = rows_of_grids<T>(grad, grids);
    pass.from = read<T>(grad), pass.hidden = read<T>(hidden), pass.to = written<T>(out), pass.sums = written<T>(sums);
    run_pass(active().pixelcnn<T>().rectify_backward, pass, grids, pass.size * pass.channels);
  });
  return {out, sums};
}

// -> planes (B, channels, H, W) of rows (B H W, channels) + bias.
Tensor pixelcnn_planes_cpu(const Tensor& x, const Tensor& bias, std::vector<int64_t> grid) {
  STD_TORCH_CHECK(grid.size() == 3 && x.dim() == 2, "x must be rows, and grid (B, H, W)");
  check_size(x, x, grid[0] * grid[1] * grid[2] * x.size(1), "x");
  check_size(bias, x, x.size(1), "bias");
  Tensor out = rows_like(x, {grid[0], x.size(1), grid[1], grid[2]});
  with_float(x, [&](auto* type) {
    using T = Element<decltype(type)>;
    PixelCNNHead<T> pass{};
    pass.size = grid[1] * grid[2], pass.channels = x.size(1);
    pass.from = read<T>(x), pass.bias = read<T>(bias), pass.to = written<T>(out);
    run_pass(active().pixelcnn<T>().planes, pass, grid[0], pass.size * pass.channels);
  });
  return out;
}

// -> the gradient of the rows, and its sums over each grid (B, channels).
std::tuple<Tensor, Tensor> pixelcnn_planes_backward_cpu(const Tensor& grad) {
  STD_TORCH_CHECK(grad.dim() == 4 && grad.is_contiguous(), "grad must be contiguous (B, channels, H, W)");
  const int64_t grids = grad.size(0), size = grad.size(2) * grad.size(3);
  Tensor out = rows_like(grad, {grids * size, grad.size(1)}), sums = rows_like(grad, {grids, grad.size(1)});
  with_float(grad, [&](auto* type) {
    using T = Element<decltype(type)>;
    PixelCNNHead<T> pass{};
    pass.size = size, pass.channels = grad.size(1);
    pass.from = read<T>(grad), pass.to = written<T>(out), pass.sums = written<T>(sums);
    run_pass(active().pixelcnn<T>().planes_backward, pass, grids, pass.size * pass.channels);
  });
  return {out, sums};
}

STABLE_TORCH_LIBRARY_IMPL(vqkernels, CPU, m) {
  m.impl("pixelcnn_rectify", TORCH_BOX(&pixelcnn_rectify_cpu));
  m.impl("pixelcnn_rectify_backward", TORCH_BOX(&pixelcnn_rectify_backward_cpu));
  m.impl("pixelcnn_planes", TORCH_BOX(&pixelcnn_planes_cpu));
  m.impl("pixelcnn_planes_backward", TORCH_BOX(&pixelcnn_planes_backward_cpu));
}

}  // namespace vqkernels
