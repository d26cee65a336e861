"""Rows of `VectorQuantize` in the orders that its parts want, and its gradient along the error's direction."""

import math

import torch
from torch import Tensor

from ...nn.normalisation import unit
from ...nn.rows import RowLayout, Rows


def canonical(values: Tensor, rows: Rows, layout: RowLayout | None = None) -> Tensor:
    """Values of rows as `(h, N, D)`; given `layout`, in the order of joined indices, where heads come last."""
    values = values.movedim(rows.channel_dim, -1)
    if layout is not None and layout.heads > 1 and not rows.batched:
        values = values.movedim(layout.channel_dim, -2)
    number = rows.values.numel() // values.shape[-1] // (len(values) if rows.batched else 1)
    return values.reshape(len(values) if rows.batched else 1, number, values.shape[-1])


def as_peer_rows(quantized: Tensor, rows: Rows, layout: RowLayout) -> Tensor:
    """`(B, N, D)`; with heads `(H, B, N, D)` if separate and `(1, B H, N, D)` if shared."""
    values = quantized.movedim(rows.channel_dim, -1)
    if layout.heads == 1:
        return values.reshape(len(values), math.prod(values.shape[1:-1]), values.shape[-1])
    values = values if rows.batched else values.movedim(layout.channel_dim, 1)
    number = math.prod(values.shape[2:-1])
    if rows.batched:
        return values.reshape(*values.shape[:2], number, values.shape[-1])
    return values.reshape(1, values.shape[0] * values.shape[1], number, values.shape[-1])


def directional(x: Tensor, codes: Tensor, channel_dim: int, variance: float = 5e-3) -> Tensor:
    """x moved by the length of its error, in the error's direction with noise (DiVeQ, Vali et al. 2025).

    The direction is held constant, so that x and the codes both get the gradient of the length.
    """
    error = codes - x
    noisy = (error + math.sqrt(variance) * torch.randn_like(error)).detach()
    return x + unit(noisy, channel_dim).to(x.dtype) * torch.linalg.vector_norm(error, dim=channel_dim, keepdim=True)
