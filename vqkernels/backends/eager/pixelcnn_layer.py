"""The passes of a gated PixelCNN layer in plain PyTorch, and Winograd's transforms of its 2 x 3 convolution.

A 3-tap filter along the width runs as F(4, 3) (Winograd 1980; Lavin and Gray 2016): four outputs by six products, from
polynomials evaluated at 0, +-p, +-q and infinity. With p = 3/4 and q = 3/2 every coefficient of the transforms of the
activations is exact, and float32 results are about as near as direct sums (rms 1.4 times theirs, where the usual points
1 and 2 give 2 times). Shapes stand in csrc/cpu/pixelcnn_layer.h.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

P, Q = 3 / 4, 3 / 2
OUTPUTS, ELEMENTS = 4, 6

Place = tuple[slice, slice, slice]


def _matrices() -> tuple[Tensor, Tensor, Tensor]:
    """Of the inputs (6, 6), the filter (6, 3) and the products (4, 6)."""
    product, total = P * P * Q * Q, P * P + Q * Q
    inputs = [
        [product, 0, -total, 0, 1, 0],
        [0, -P * Q * Q, -Q * Q, P, 1, 0],
        [0, P * Q * Q, -Q * Q, -P, 1, 0],
        [0, -Q * P * P, -P * P, Q, 1, 0],
        [0, Q * P * P, -P * P, -Q, 1, 0],
        [0, product, 0, -total, 0, 1],
    ]
    points = (P, -P, Q, -Q)
    norms = [2 * P * P * (P * P - Q * Q)] * 2 + [2 * Q * Q * (Q * Q - P * P)] * 2
    filters = [[1 / product, 0, 0]]
    filters += [[1 / norm, x / norm, x * x / norm] for x, norm in zip(points, norms, strict=True)]
    filters += [[0, 0, 1]]
    outputs = [[float(k == 0)] + [x**k for x in points] + [float(k == 3)] for k in range(OUTPUTS)]
    first, second, third = (torch.tensor(matrix, dtype=torch.float64) for matrix in (inputs, filters, outputs))
    return first, second, third


_INPUTS, _FILTERS, _PRODUCTS = _matrices()


def tiles_of(width: int) -> int:
    return (width + OUTPUTS - 1) // OUTPUTS


def filters(weight: Tensor) -> Tensor:
    """(6, outputs, 2C) of a convolution's weight (outputs, C, 2, 3): the factors of the tiles."""
    return torch.einsum("ek,ncrk->enrc", _FILTERS.to(weight), weight).flatten(2).contiguous()


def filters_backward(grad: Tensor) -> Tensor:
    parts = grad.unflatten(2, (2, grad.shape[2] // 2))
    return torch.einsum("ek,enrc->ncrk", _FILTERS.to(grad), parts).contiguous()


def vertical(x: Tensor, shift: Tensor, grid: list[int], transformed: bool, last: bool) -> tuple[Tensor, Tensor]:
    """Features before the gate (empty unless `transformed`), and the tiles of the gated ones (empty where `last`)."""
    above = _from_products(x, grid) if transformed else x
    tiles = x.new_empty(ELEMENTS, 0, x.shape[-1]) if last else _tiles(_gated(above, shift, grid), grid)
    return above if transformed else x.new_empty(0, x.shape[-1]), tiles


def vertical_backward(
    grad_above: Tensor, grad_tiles: Tensor, above: Tensor, shift: Tensor, grid: list[int], transformed: bool
) -> tuple[Tensor, Tensor]:
    grad, grad_shift = grad_above, torch.zeros_like(shift)
    if grad_tiles.numel():
        from_gate, grad_shift = _gate_gradient(_from_tiles(grad_tiles, grid), above, shift, grid)
        grad = grad + from_gate
    if not transformed:
        return grad.clone() if grad is grad_above else grad, grad_shift
    batch, height, width = grid
    outputs = _PRODUCTS.to(above)
    padded = F.pad(grad.view(batch, height, width, grad.shape[-1]), (0, 0, 0, -width % OUTPUTS))
    parts = padded.unflatten(2, (-1, OUTPUTS))  # [B, H, T, 4, 2C]
    return torch.einsum("ke,bhtkn->ebhtn", outputs, parts).flatten(1, 3).contiguous(), grad_shift


def gate(left: Tensor, shift: Tensor, scale: Tensor | None, grid: list[int]) -> Tensor:
    gated = _gated(left, shift, grid)
    return gated if scale is None else gated * scale


def gate_backward(
    grad: Tensor, left: Tensor, shift: Tensor, scale: Tensor | None, grid: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of left and shift, and the gated features."""
    grad_left, grad_shift = _gate_gradient(grad if scale is None else grad * scale, left, shift, grid)
    return grad_left, grad_shift, gate(left, shift, scale, grid)


def join(update: Tensor, bias: Tensor, residual: Tensor | None, grid: list[int], last: bool) -> tuple[Tensor, Tensor]:
    """Pairs (B H W, 2C), a feature behind that of its left neighbour (none where `last`), and features (B H W, C)."""
    batch, height, width = grid
    features = update + bias
    if residual is not None:
        features = features + residual
    if last:
        return features.new_empty(0, 2 * features.shape[1]), features
    lines = features.view(batch * height, width, features.shape[-1])
    before = F.pad(lines, (0, 0, 1, 0))[:, :width]
    return torch.cat([before, lines], -1).flatten(0, 1), features


def join_backward(grad_pairs: Tensor, grad_features: Tensor, grid: list[int]) -> Tensor:
    """The gradient of the features as a whole."""
    if not grad_pairs.numel():
        return grad_features.clone()
    batch, height, width = grid
    before, own = grad_pairs.view(batch * height, width, grad_pairs.shape[-1]).chunk(2, dim=-1)
    return grad_features + (own + F.pad(before, (0, 0, 0, 1))[:, 1:]).flatten(0, 1)


def taps(codes: Tensor, table: Tensor, kernel: list[int]) -> Tensor:
    """Sums of table (rows, taps, channels) over the taps of a kernel (height, width, up, left) inside the grid."""
    out = table.new_zeros(*codes.shape, table.shape[2])
    for tap, (here, there) in enumerate(_moves(codes.shape, kernel)):
        out[here] += table[codes[there], tap]
    return out.flatten(0, 2)


def taps_backward(grad: Tensor, codes: Tensor, rows: int, kernel: list[int]) -> Tensor:
    grads, moves = grad.view(*codes.shape, grad.shape[1]), _moves(codes.shape, kernel)
    out = grad.new_zeros(len(moves), rows, grad.shape[1])
    for tap, (here, there) in enumerate(moves):
        out[tap].index_add_(0, codes[there].flatten(), grads[here].flatten(0, 2))
    return out.transpose(0, 1).contiguous()


def _moves(shape: torch.Size, kernel: list[int]) -> list[tuple[Place, Place]]:
    """For each tap the positions that see it inside the grid, and where it lies."""
    height, width, up, left = kernel

    def part(size: int, move: int) -> tuple[slice, slice]:
        start, end = max(0, -move), max(max(0, -move), min(size, size - move))
        return slice(start, end), slice(start + move, end + move)

    found = []
    for row in range(height):
        for column in range(width):
            rows, columns = part(shape[1], row - up), part(shape[2], column - left)
            found.append(((slice(None), rows[0], columns[0]), (slice(None), rows[1], columns[1])))
    return found


def _from_products(products: Tensor, grid: list[int]) -> Tensor:
    batch, height, width = grid
    parts = products.unflatten(1, (batch, height, tiles_of(width)))
    lines = torch.einsum("ke,ebhtn->bhtkn", _PRODUCTS.to(products), parts).flatten(2, 3)
    return lines[:, :, :width].flatten(0, 2).contiguous()


def _tiles(features: Tensor, grid: list[int]) -> Tensor:
    """(6, B H T, 2C) of features (B H W, C)."""
    batch, height, width = grid
    lines = features.view(batch, height, width, features.shape[-1])
    seen = F.pad(lines, (0, 0, 1, 1 + -width % OUTPUTS, 1, 0))  # [B, H + 1, 4T + 2, C]
    windows = seen.unfold(2, ELEMENTS, OUTPUTS)  # [B, H + 1, T, C, 6]
    tiles = torch.einsum("ek,bhtck->ebhtc", _INPUTS.to(features), windows)
    return torch.cat([tiles[:, :, :height], tiles[:, :, 1:]], -1).flatten(1, 3).contiguous()


def _from_tiles(grad_tiles: Tensor, grid: list[int]) -> Tensor:
    """The transpose of `_tiles`."""
    batch, height, width = grid
    count = tiles_of(width)
    above, own = grad_tiles.unflatten(1, (batch, height, count)).chunk(2, dim=-1)
    tiles = own + F.pad(above, (0, 0, 0, 0, 0, 1))[:, :, 1:]
    windows = torch.einsum("ek,ebhtc->kbhtc", _INPUTS.to(grad_tiles), tiles)
    lines = grad_tiles.new_zeros(batch, height, OUTPUTS * count + 2, own.shape[-1])
    for k in range(ELEMENTS):
        lines[:, :, k : k + OUTPUTS * (count - 1) + 1 : OUTPUTS] += windows[k]
    return lines[:, :, 1 : width + 1].flatten(0, 2).contiguous()


def _expanded(shift: Tensor, grid: list[int]) -> Tensor:
    """A shift for each position."""
    batch, height, width = grid
    if len(shift) == batch * height * width:
        return shift
    return shift[:, None].expand(-1, height * width, -1).flatten(0, 1)


def _gated(features: Tensor, shift: Tensor, grid: list[int]) -> Tensor:
    content, share = (features + _expanded(shift, grid)).chunk(2, dim=-1)
    return torch.tanh(content) * torch.sigmoid(share)


def _gate_gradient(grad: Tensor, features: Tensor, shift: Tensor, grid: list[int]) -> tuple[Tensor, Tensor]:
    content, share = (features + _expanded(shift, grid)).chunk(2, dim=-1)
    content, share = torch.tanh(content), torch.sigmoid(share)
    found = torch.cat([grad * share * (1 - content**2), grad * content * share * (1 - share)], -1)
    if len(shift) == len(features):
        return found, found.clone()
    batch, height, width = grid
    return found, found.view(batch, height * width, found.shape[-1]).sum(1)
