"""Layouts of z that a kernel must read without a copy. Each yields z, its channel axis, a codebook and a mask."""

from collections.abc import Callable

import torch
from torch import Tensor

CODES, DIM = 37, 12
Input = tuple[Tensor, int, Tensor, Tensor | None]


def _layout(
    shape: tuple[int, ...],
    channel_dim: int,
    heads: int | None = None,
    view: Callable[[Tensor], Tensor] = lambda x: x,
) -> Callable[[bool, torch.device], Input]:
    """Inputs of one layout. With a mask, a third of the rows hold NaN and are masked."""

    def make(masked: bool, device: torch.device) -> Input:
        z = view(torch.randn(shape))
        codebook = torch.randn(CODES, DIM) if heads is None else torch.randn(heads, CODES, DIM)
        rows = [size for axis, size in enumerate(z.shape) if axis != channel_dim]
        mask = torch.rand(rows) < 0.7 if masked else None
        if mask is not None:
            z.masked_fill_(~mask.unsqueeze(channel_dim), torch.nan)
        # a view of the same strides on the device
        moved = torch.empty_strided(z.shape, z.stride(), dtype=z.dtype, device=device).copy_(z)
        return moved, channel_dim, codebook.to(device), None if mask is None else mask.to(device)

    return make


LAYOUTS = {
    "rows": _layout((70, DIM), 1),
    "images, channels first": _layout((3, DIM, 5, 7), 1),
    "images, channels last": _layout((3, 5, 7, DIM), 3),
    "images in channels-last memory": _layout(
        (3, DIM, 5, 7), 1, None, lambda x: x.to(memory_format=torch.channels_last)
    ),
    "sequences, channels first": _layout((4, DIM, 19), 1),
    "heads": _layout((3, 23, DIM), 2, 3),
    "heads, channels first": _layout((3, 2, DIM, 11), 2, 3),
    "every second row": _layout((140, DIM), 1, None, lambda x: x[::2]),
    "every second channel": _layout((3, 2 * DIM, 11), 1, None, lambda x: x[:, ::2]),
    "axes that cannot be merged": _layout((4, 3, 5, DIM), 3, None, lambda x: x.permute(2, 1, 0, 3)),
    "one row": _layout((DIM,), 0),
    "no rows": _layout((0, DIM, 3), 1),
}


def flat(x: Tensor, channel_dim: int, batched: bool) -> Tensor:
    """z or anything of its shape as (N, D), or (H, N, D)."""
    x = x.movedim(channel_dim, -1)
    return x.reshape(x.shape[0], x[0].numel() // x.shape[-1], -1) if batched else x.reshape(-1, x.shape[-1])


def flat_rows(x: Tensor, batched: bool) -> Tensor:
    """A mask or indices as (N,), or (H, N)."""
    return x.reshape(x.shape[0], -1) if batched else x.reshape(-1)
