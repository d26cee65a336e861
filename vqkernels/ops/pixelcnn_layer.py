"""A gated PixelCNN layer in training: matrix products, and one fused pass between each two of them.

The features of both stacks are rows (grid, row, column). The vertical stack passes from layer to layer as the tiles of
Winograd's filtering F(4, 3), so that its 2 x 3 convolution is six products with half the multiply-adds; the horizontal
stack passes as pairs [left neighbour, own feature], so that its 1 x 2 convolution is one product. The first layer's
products with the embedding, one for each tap, are made for each code, looked up and added. The backward pass computes
the gates again from what came before them. What each pass computes is in vqkernels/backends/eager/pixelcnn_layer.py.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends.eager.pixelcnn_layer import ELEMENTS, tiles_of
from .registration import Operation

__all__ = ["gated_layer", "look_up_taps", "start_layer"]


def _tile_shape(grid: list[int], channels: int) -> tuple[int, int, int]:
    batch, height, width = grid
    return ELEMENTS, batch * height * tiles_of(width), 2 * channels


def _fake_vertical(x: Tensor, shift: Tensor, grid: list[int], transformed: bool, last: bool) -> tuple[Tensor, Tensor]:
    batch, height, width = grid
    twice = x.shape[-1]
    above = x.new_empty((batch * height * width if transformed else 0, twice))
    return above, x.new_empty((ELEMENTS, 0, twice) if last else _tile_shape(grid, twice // 2))


def _fake_vertical_backward(
    grad_above: Tensor, grad_tiles: Tensor, above: Tensor, shift: Tensor, grid: list[int], transformed: bool
) -> tuple[Tensor, Tensor]:
    shape = _tile_shape(grid, above.shape[1] // 2) if transformed else above.shape
    return above.new_empty(shape), shift.new_empty(shift.shape)


def _fake_gate(left: Tensor, shift: Tensor, scale: Tensor | None, grid: list[int]) -> Tensor:
    return left.new_empty((left.shape[0], left.shape[1] // 2))


def _fake_gate_backward(
    grad: Tensor, left: Tensor, shift: Tensor, scale: Tensor | None, grid: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    return left.new_empty(left.shape), shift.new_empty(shift.shape), grad.new_empty(grad.shape)


def _fake_join(
    update: Tensor, bias: Tensor, residual: Tensor | None, grid: list[int], last: bool
) -> tuple[Tensor, Tensor]:
    rows, channels = update.shape
    return update.new_empty((0 if last else rows, 2 * channels)), update.new_empty(update.shape)


def _fake_join_backward(grad_pairs: Tensor, grad_features: Tensor, grid: list[int]) -> Tensor:
    return grad_features.new_empty(grad_features.shape)


def _fake_filters(weight: Tensor) -> Tensor:
    return weight.new_empty((ELEMENTS, weight.shape[0], 2 * weight.shape[1]))


def _fake_filters_backward(grad: Tensor) -> Tensor:
    return grad.new_empty((grad.shape[1], grad.shape[2] // 2, 2, 3))


def _fake_taps(codes: Tensor, table: Tensor, kernel: list[int]) -> Tensor:
    batch, height, width = codes.shape
    return table.new_empty((batch * height * width, table.shape[2]))


def _fake_taps_backward(grad: Tensor, codes: Tensor, rows: int, kernel: list[int]) -> Tensor:
    return grad.new_empty((rows, kernel[0] * kernel[1], grad.shape[1]))


vertical = Operation(
    "pixelcnn_vertical",
    "(Tensor x, Tensor shift, SymInt[] grid, bool transformed, bool last) -> (Tensor above, Tensor tiles)",
    _fake_vertical,
)
vertical_backward = Operation(
    "pixelcnn_vertical_backward",
    "(Tensor grad_above, Tensor grad_tiles, Tensor above, Tensor shift, SymInt[] grid, bool transformed)"
    " -> (Tensor grad_x, Tensor grad_shift)",
    _fake_vertical_backward,
)
gate = Operation("pixelcnn_gate", "(Tensor left, Tensor shift, Tensor? scale, SymInt[] grid) -> Tensor", _fake_gate)
gate_backward = Operation(
    "pixelcnn_gate_backward",
    "(Tensor grad, Tensor left, Tensor shift, Tensor? scale, SymInt[] grid)"
    " -> (Tensor grad_left, Tensor grad_shift, Tensor gated)",
    _fake_gate_backward,
)
join = Operation(
    "pixelcnn_join",
    "(Tensor update, Tensor bias, Tensor? residual, SymInt[] grid, bool last) -> (Tensor pairs, Tensor features)",
    _fake_join,
)
join_backward = Operation(
    "pixelcnn_join_backward",
    "(Tensor grad_pairs, Tensor grad_features, SymInt[] grid) -> Tensor",
    _fake_join_backward,
)
filters = Operation("pixelcnn_filters", "(Tensor weight) -> Tensor", _fake_filters)
filters_backward = Operation("pixelcnn_filters_backward", "(Tensor grad) -> Tensor", _fake_filters_backward)
taps = Operation("pixelcnn_taps", "(Tensor codes, Tensor table, int[] kernel) -> Tensor", _fake_taps)
taps_backward = Operation(
    "pixelcnn_taps_backward",
    "(Tensor grad, Tensor codes, SymInt rows, int[] kernel) -> Tensor",
    _fake_taps_backward,
)


class _Inputs(NamedTuple):
    """The tensors of `gated_layer`, or one thing about each of them. The first layer has those from `above` on."""

    tiles: Any
    pairs: Any
    features: Any
    weight: Any
    beside: Any
    above: Any  # of the first layer, with `left`: what its convolutions make
    left: Any
    shift_v: Any
    shift_h: Any
    across: Any
    output: Any
    bias: Any
    scale: Any


class _Kept(NamedTuple):
    """What the backward pass reads: inputs, the filters' factors, and both stacks' features before their gates."""

    tiles: Any  # None of the first layer, like the three that follow
    pairs: Any
    factors: Any
    beside: Any
    above: Tensor
    left: Tensor
    shift_v: Tensor
    shift_h: Tensor
    across: Tensor
    output: Tensor
    scale: Tensor | None


class _Layer(torch.autograd.Function):
    """A layer: `*_Inputs`, of which the first layer has no `tiles` and every other one no `above`; grid, last, backend.

    Saves its inputs, and both stacks' features before their gates.
    """

    @staticmethod
    def forward(ctx, *arguments):
        x, (grid, last, backend) = _Inputs(*arguments[:-3]), arguments[-3:]
        if x.tiles is None:
            factors, products = None, x.above
        else:
            factors = filters(backend, x.weight)
            products = torch.bmm(x.tiles, factors.mT)
        transformed, next_tiles = vertical(backend, products, x.shift_v, grid, factors is not None, last)
        if x.tiles is None:
            above, left = x.above, torch.addmm(x.left, x.above, x.across)
        else:
            above, left = transformed, torch.mm(transformed, x.across).addmm_(x.pairs, x.beside)
        update = torch.mm(gate(backend, left, x.shift_h, x.scale, grid), x.output)
        shifts = (x.shift_v, x.shift_h)
        kept = _Kept(x.tiles, x.pairs, factors, x.beside, above, left, *shifts, x.across, x.output, x.scale)
        ctx.save_for_backward(*kept)
        ctx.arguments = grid, backend
        return next_tiles, *join(backend, update, x.bias, x.features, grid, last)

    @staticmethod
    def backward(ctx, *grads):
        needed = _Inputs(*ctx.needs_input_grad[:-3])
        return *_LayerBackward.apply(*grads, *ctx.saved_tensors, *ctx.arguments, needed), None, None, None


class _LayerBackward(torch.autograd.Function):
    """The gradient as a Function, so that asking for a second derivative is an error, not a wrong zero."""

    @staticmethod
    def forward(ctx, grad_tiles, grad_pairs, grad_features, *rest):
        kept, (grid, backend, needed) = _Kept(*rest[:-3]), rest[-3:]
        grad = join_backward(backend, grad_pairs.contiguous(), grad_features.contiguous(), grid)
        grad_gated = grad @ kept.output.t()
        grad_left, grad_shift_h, gated = gate_backward(backend, grad_gated, kept.left, kept.shift_h, kept.scale, grid)
        grad_above = grad_left @ kept.across.t()
        operands = (grad_tiles.contiguous(), kept.above, kept.shift_v, grid, kept.factors is not None)
        grad_products, grad_shift_v = vertical_backward(backend, grad_above, *operands)
        return _Inputs(
            tiles=torch.bmm(grad_products, kept.factors) if needed.tiles else None,
            pairs=grad_left @ kept.beside.t() if needed.pairs else None,
            features=grad if needed.features else None,
            weight=filters_backward(backend, torch.bmm(grad_products.mT, kept.tiles)) if needed.weight else None,
            beside=kept.pairs.t() @ grad_left if needed.beside else None,
            above=grad_products if needed.above else None,
            left=grad_left if needed.left else None,
            shift_v=grad_shift_v if needed.shift_v else None,
            shift_h=grad_shift_h if needed.shift_h else None,
            across=kept.above.t() @ grad_left if needed.across else None,
            output=gated.t() @ grad if needed.output else None,
            bias=grad.sum(0) if needed.bias else None,
            scale=None,
        )

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(_TWICE)


_TWICE = "vqkernels does not support double backward: a PixelCNN is differentiable only once"


class _Taps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, codes: Tensor, table: Tensor, kernel: list[int], backend: str) -> Tensor:
        ctx.save_for_backward(codes)
        ctx.arguments = table.shape[0], kernel, backend
        return taps(backend, codes, table, kernel)

    @staticmethod
    def backward(ctx, grad):
        return None, _TapsBackward.apply(grad, *ctx.saved_tensors, *ctx.arguments), None, None


class _TapsBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, grad, codes, rows, kernel, backend):
        return taps_backward(backend, grad.contiguous(), codes, rows, kernel)

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(_TWICE)


def look_up_taps(codes: Tensor, table: Tensor, kernel: tuple[int, int, int, int], backend: str) -> Tensor:
    """A convolution of embedded codes, (B H W, outputs): the sum over the taps of what the tap makes of a code.

    Args:
        codes: (B, H, W) int64, contiguous, of [0, rows).
        table: (rows, taps, outputs), the product of every code's embedding with every tap, contiguous.
        kernel: (height, width, up, left): tap (r, c), in row-major order, sees position (i + r - up, j + c - left), and
            nothing where that is outside the grid.
        backend: "cpu" or "eager".
    """
    return _Taps.apply(codes, table, list(kernel), backend)


def start_layer(
    above: Tensor,
    beside: Tensor,
    shifts: tuple[Tensor, Tensor],
    across: Tensor,
    output: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    grid: tuple[int, int, int],
    *,
    last: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The first layer from its convolutions on: tiles, pairs and features for `gated_layer`.

    Args:
        above, beside: (B H W, 2C), what the vertical and the horizontal convolution make, without a bias.
        shifts, across, output, bias, scale, grid, last, backend: as in `gated_layer`.
    """
    inputs = _Inputs(None, None, None, None, None, above, beside, *shifts, across, output, bias, scale)
    return _Layer.apply(*inputs, list(grid), last, backend)


def gated_layer(
    tiles: Tensor,
    pairs: Tensor,
    features: Tensor,
    shifts: tuple[Tensor, Tensor],
    weight: Tensor,
    across: Tensor,
    beside: Tensor,
    output: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    grid: tuple[int, int, int],
    *,
    last: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """A layer with mask B and kernels of 2 x 3 and 1 x 2: tiles, pairs and features for the next.

    Args:
        tiles: (6, B H T, 2C), T = ceil(W / 4), the vertical stack, from the layer before.
        pairs: (B H W, 2C), the horizontal stack, each feature behind that of its left neighbour.
        features: (B H W, C), the horizontal stack, for the residual connection.
        shifts: of the vertical and of the horizontal gate, (B, 2C) or (B H W, 2C): all biases, label and condition.
        weight: (2C, C, 2, 3), of the vertical convolution.
        across: (2C, 2C), from the vertical to the horizontal stack.
        beside: (2C, 2C), the horizontal convolution; the left neighbour's C rows first.
        output, bias: (C, C) and (C,), behind the horizontal gate.
        scale: (B H W, C), a dropout's mask divided by what it keeps; None for none.
        grid: (B, H, W).
        last: tiles and pairs for a next layer are not wanted; they are empty.
        backend: "cpu" or "eager".

    Raises:
        RuntimeError: where a second derivative is asked for.
    """
    inputs = _Inputs(tiles, pairs, features, weight, beside, None, None, *shifts, across, output, bias, scale)
    return _Layer.apply(*inputs, list(grid), last, backend)
