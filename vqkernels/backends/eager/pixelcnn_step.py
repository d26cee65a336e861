"""One step of the cached PixelCNN in plain PyTorch, and the flat layout of its weights and caches.

Weights are one flat tensor. A matrix (inputs, outputs) is cut into panels of `panel_width` outputs, the last one padded
with zeros: [panel][input][output of the panel]. The C++ kernel walks a panel front to back; here a batched product
reads it as it lies. The cache is one flat tensor too; a row of the stack is a grid of the batch, or, under guidance,
a grid with its label (even rows) or without it (odd rows):

    vertical[layer]    (taps, R, W + 2 reach, C)   inputs of the last rows, a ring: grid row i lies at i % taps
    horizontal[layer]  (R, reach + W, C)           inputs in the current grid row
    bias               (layers, R, W, 2C)          what the vertical stack and the label add in this grid row
    scratch            (R, 2C W + 2C + C + head + K)  of the C++ kernel

Margins of `reach` columns stay zero: they are the padding of the convolutions.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..drawing import draw_codes, guided

PANEL_BYTES = 128


class PixelCNNSizes(NamedTuple):
    """The sizes of a gated PixelCNN that its flat tensors depend on."""

    channels: int
    layers: int
    head_channels: int
    num_codes: int
    kernel_size: int
    first_kernel_size: int
    condition_channels: int

    def reach(self, layer: int) -> int:
        """Columns to either side, and rows above, that a layer sees."""
        return (self.kernel_size if layer else self.first_kernel_size) // 2

    def taps(self, layer: int) -> int:
        """Rows of the vertical kernel and columns of the horizontal one: mask A in the first layer, then mask B."""
        return self.reach(layer) + (layer > 0)

    def matrices(self) -> Iterator[tuple[str, int, int]]:
        """(name, inputs, outputs) of every matrix of the flat weights, in order; a bias has one input."""
        channels, twice = self.channels, 2 * self.channels
        for layer in range(self.layers):
            width = 2 * self.reach(layer) + 1
            yield f"{layer}.vertical", self.taps(layer) * width * channels, twice
            yield f"{layer}.vertical_bias", 1, twice
            yield f"{layer}.vertical_to_horizontal", twice, twice
            yield f"{layer}.horizontal", self.taps(layer) * channels, twice
            yield f"{layer}.output", channels, channels
            yield f"{layer}.output_bias", 1, channels
            if self.condition_channels:
                yield f"{layer}.condition_vertical", self.condition_channels, twice
                yield f"{layer}.condition_horizontal", self.condition_channels, twice
        yield "head", channels, self.head_channels
        yield "head_bias", 1, self.head_channels
        yield "logits", self.head_channels, self.num_codes
        yield "logits_bias", 1, self.num_codes
        yield "embedding", self.num_codes, channels

    def cache_elements(self, rows: int, width: int) -> int:
        """Length of the cache for `rows` rows of the stack on grids of this width."""
        per_row = self.layers * width * 2 * self.channels
        for layer in range(self.layers):
            reach = self.reach(layer)
            per_row += (self.taps(layer) * (width + 2 * reach) + reach + width) * self.channels
        scratch = (2 * width + 3) * self.channels + self.head_channels + self.num_codes
        return rows * (per_row + scratch)


def panel_width(dtype: torch.dtype) -> int:
    return PANEL_BYTES // dtype.itemsize


def pack(matrices: list[Tensor]) -> Tensor:
    """The flat weights of matrices (inputs, outputs) in the order of `PixelCNNSizes.matrices`."""
    parts = []
    for matrix in matrices:
        panel = panel_width(matrix.dtype)
        padded = F.pad(matrix, (0, -matrix.shape[1] % panel))
        parts.append(padded.unflatten(1, (-1, panel)).transpose(0, 1).reshape(-1))
    return torch.cat(parts)


def unpack(weights: Tensor, sizes: PixelCNNSizes) -> dict[str, Tensor]:
    """Views (panels, inputs, panel width) of the flat weights, by name."""
    views, start, panel = {}, 0, panel_width(weights.dtype)
    for name, inputs, outputs in sizes.matrices():
        panels = -(-outputs // panel)
        views[name] = weights[start : start + panels * inputs * panel].view(panels, inputs, panel)
        start += panels * inputs * panel
    return views


class _Cache:
    """Views of the flat cache."""

    def __init__(self, flat: Tensor, sizes: PixelCNNSizes, rows: int, width: int) -> None:
        channels, start = sizes.channels, 0

        def take(*shape: int) -> Tensor:
            nonlocal start
            count = torch.Size(shape).numel()
            start += count
            return flat[start - count : start].view(shape)

        self.vertical, self.horizontal = [], []
        for layer in range(sizes.layers):
            reach = sizes.reach(layer)
            self.vertical.append(take(sizes.taps(layer), rows, width + 2 * reach, channels))
        for layer in range(sizes.layers):
            self.horizontal.append(take(rows, sizes.reach(layer) + width, channels))
        self.bias = take(sizes.layers, rows, width, 2 * channels)


def pixelcnn_step(
    codes: Tensor,
    cache: Tensor,
    logits: Tensor,
    weights: Tensor,
    biases: Tensor,
    condition: Tensor | None,
    noise: Tensor,
    sizes: list[int],
    residual_head: bool,
    begin: int,
    end: int,
    temperature: float,
    top_k: int,
    top_p: float,
    guidance: float,
) -> None:
    """Advances by the positions [begin, end) in raster order; see `vqkernels.ops.pixelcnn_step`."""
    shape = PixelCNNSizes(*sizes)
    batch, _, width = codes.shape
    rows = biases.shape[1]
    views, matrices = _Cache(cache, shape, rows, width), unpack(weights, shape)
    for position in range(begin, end):
        row, column = divmod(position, width)
        if column == 0:
            _advance_row(codes, views, matrices, biases, condition, shape, row)
        missing = codes[:, row, column] < 0
        if len(logits) or bool(missing.any()):
            found = _advance_column(views, matrices, shape, column, residual_head, True)
            if len(logits):
                logits[position - begin] = found
            if rows != batch:
                found = guided(found, guidance)
            drawn = draw_codes(found, noise[:, row, column], temperature, top_k, top_p)
            codes[:, row, column] = torch.where(missing, drawn, codes[:, row, column])
        else:
            _advance_column(views, matrices, shape, column, residual_head, False)
        reach = shape.reach(0)
        views.horizontal[0][:, reach + column] = _embed(codes[:, row, column], matrices, shape, rows)


def _advance_row(
    codes: Tensor,
    cache: _Cache,
    matrices: dict[str, Tensor],
    biases: Tensor,
    condition: Tensor | None,
    sizes: PixelCNNSizes,
    row: int,
) -> None:
    """The vertical stack for a grid row: fills the biases of the horizontal stack."""
    rows, channels, width = biases.shape[1], sizes.channels, codes.shape[2]
    if row > 0:
        reach = sizes.reach(0)
        above = _embed(codes[:, row - 1], matrices, sizes, rows)
        cache.vertical[0][(row - 1) % sizes.taps(0)][:, reach : reach + width] = above
    for layer in range(sizes.layers):
        reach, taps, ring = sizes.reach(layer), sizes.taps(layer), cache.vertical[layer]
        seen = torch.stack([ring[(row - reach + tap) % taps] for tap in range(taps)], 1)  # [R, taps, W + 2 reach, C]
        windows = seen.unfold(2, 2 * reach + 1, 1).permute(0, 2, 1, 4, 3).flatten(2)  # [R, W, taps * k * C]
        above = _product(windows, matrices[f"{layer}.vertical"], 2 * channels)
        above = above + matrices[f"{layer}.vertical_bias"].flatten()[: 2 * channels]
        vertical_bias, horizontal_bias = biases[layer][:, None].chunk(2, dim=-1)
        bias = _product(above, matrices[f"{layer}.vertical_to_horizontal"], 2 * channels) + horizontal_bias
        above = above + vertical_bias
        if condition is not None:
            here = condition[:, row]
            above = above + _product(here, matrices[f"{layer}.condition_vertical"], 2 * channels)
            bias = bias + _product(here, matrices[f"{layer}.condition_horizontal"], 2 * channels)
        cache.bias[layer] = bias
        if layer + 1 < sizes.layers:
            reach = sizes.reach(layer + 1)
            cache.vertical[layer + 1][row % sizes.taps(layer + 1)][:, reach : reach + width] = _gate(above)


def _advance_column(
    cache: _Cache,
    matrices: dict[str, Tensor],
    sizes: PixelCNNSizes,
    column: int,
    residual_head: bool,
    head: bool = True,
) -> Tensor:
    """The horizontal stack at a column; logits (R, K) unless `head` is False."""
    channels = sizes.channels
    features = cache.bias[0, :, 0, :channels]
    for layer in range(sizes.layers):
        inputs = cache.horizontal[layer]
        reach, taps = sizes.reach(layer), sizes.taps(layer)
        if layer:
            inputs[:, reach + column] = features
        left = _product(inputs[:, column : column + taps].flatten(1), matrices[f"{layer}.horizontal"], 2 * channels)
        gated = _gate(left + cache.bias[layer, :, column])
        result = _product(gated, matrices[f"{layer}.output"], channels)
        result = result + matrices[f"{layer}.output_bias"].flatten()[:channels]
        features = features + result if layer else result
    if not head:
        return features
    hidden = _product(features.relu() if residual_head else features, matrices["head"], sizes.head_channels)
    hidden = (hidden + matrices["head_bias"].flatten()[: sizes.head_channels]).relu()
    logits = _product(hidden, matrices["logits"], sizes.num_codes)
    return logits + matrices["logits_bias"].flatten()[: sizes.num_codes]


def _embed(codes: Tensor, matrices: dict[str, Tensor], sizes: PixelCNNSizes, rows: int) -> Tensor:
    """Features (R, ..., C) of codes (B, ...); a grid has as many rows as the stack gives it."""
    found = matrices["embedding"][:, codes]  # [panels, B, ..., panel width]
    found = found.movedim(0, -2).flatten(-2)[..., : sizes.channels]
    return found.repeat_interleave(rows // len(codes), dim=0)


def _product(x: Tensor, panels: Tensor, outputs: int) -> Tensor:
    """x (..., inputs) times a matrix in panels: (..., outputs)."""
    flat = x.reshape(-1, x.shape[-1])
    product = (flat[None] @ panels).transpose(0, 1).flatten(1)
    return product[:, :outputs].view(*x.shape[:-1], outputs)


def _gate(features: Tensor) -> Tensor:
    content, gate = features.chunk(2, dim=-1)
    return torch.tanh(content) * torch.sigmoid(gate)
