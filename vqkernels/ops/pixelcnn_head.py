"""The head of a PixelCNN in training: two products of rows, a ReLU between them, and logits as planes.

Logits lie as `cross_entropy` reads them, (B, K, H, W): the way from the rows and back is one pass each, which adds the
bias and sums up its gradient. The hidden features are kept once, behind the ReLU.
"""

import torch
from torch import Tensor

from .registration import Operation

__all__ = ["logits_of_rows"]


def _fake_rectify(x: Tensor, bias: Tensor, grids: int) -> Tensor:
    return x.new_empty(x.shape)


def _fake_rectify_backward(grad: Tensor, hidden: Tensor, grids: int) -> tuple[Tensor, Tensor]:
    return grad.new_empty(grad.shape), grad.new_empty((grids, grad.shape[1]))


def _fake_planes(x: Tensor, bias: Tensor, grid: list[int]) -> Tensor:
    batch, height, width = grid
    return x.new_empty((batch, x.shape[1], height, width))


def _fake_planes_backward(grad: Tensor) -> tuple[Tensor, Tensor]:
    batch, channels, height, width = grad.shape
    return grad.new_empty((batch * height * width, channels)), grad.new_empty((batch, channels))


rectify = Operation("pixelcnn_rectify", "(Tensor x, Tensor bias, SymInt grids) -> Tensor", _fake_rectify)
rectify_backward = Operation(
    "pixelcnn_rectify_backward",
    "(Tensor grad, Tensor hidden, SymInt grids) -> (Tensor grad_x, Tensor sums)",
    _fake_rectify_backward,
)
planes = Operation("pixelcnn_planes", "(Tensor x, Tensor bias, SymInt[] grid) -> Tensor", _fake_planes)
planes_backward = Operation(
    "pixelcnn_planes_backward",
    "(Tensor grad) -> (Tensor grad_x, Tensor sums)",
    _fake_planes_backward,
)


class _Head(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, hidden_weight, hidden_bias, weight, bias, grid, backend):
        hidden = rectify(backend, torch.mm(x, hidden_weight.t()), hidden_bias, grid[0])
        ctx.save_for_backward(x, hidden_weight, hidden, weight)
        ctx.arguments = grid, backend
        return planes(backend, torch.mm(hidden, weight.t()), bias, grid)

    @staticmethod
    def backward(ctx, grad):
        grads = _HeadBackward.apply(grad, *ctx.saved_tensors, *ctx.arguments, ctx.needs_input_grad)
        return *grads, None, None


class _HeadBackward(torch.autograd.Function):
    """The gradient as a Function of its own, so that asking for a second derivative is an error, not a wrong zero."""

    @staticmethod
    def forward(ctx, grad, x, hidden_weight, hidden, weight, grid, backend, needed):
        grad, sums = planes_backward(backend, grad.contiguous())
        grad_weight = torch.mm(grad.t(), hidden) if needed[3] else None
        grad_bias = sums.sum(0) if needed[4] else None
        if not any(needed[:3]):
            return None, None, None, grad_weight, grad_bias
        grad_hidden, hidden_sums = rectify_backward(backend, torch.mm(grad, weight), hidden, grid[0])
        return (
            torch.mm(grad_hidden, hidden_weight) if needed[0] else None,
            torch.mm(grad_hidden.t(), x) if needed[1] else None,
            hidden_sums.sum(0) if needed[2] else None,
            grad_weight,
            grad_bias,
        )

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError("vqkernels does not support double backward: a PixelCNN is differentiable only once")


def logits_of_rows(
    x: Tensor,
    hidden_weight: Tensor,
    hidden_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    grid: tuple[int, int, int],
    backend: str,
) -> Tensor:
    """Logits (B, K, H, W), contiguous, of rows x (B H W, C): weight relu(hidden_weight x + hidden_bias) + bias.

    Args:
        hidden_weight, hidden_bias: (N, C) and (N,).
        weight, bias: (K, N) and (K,).
        grid: (B, H, W).
        backend: "cpu" or "eager".

    Raises:
        RuntimeError: where a second derivative is asked for.
    """
    return _Head.apply(x, hidden_weight, hidden_bias, weight, bias, list(grid), backend)
