"""How the launchers describe z and its mask to the kernels: four strides, no copies."""

from __future__ import annotations

import torch

KEY_ROWS = 16


def bytes_of(mask: torch.Tensor | None) -> torch.Tensor | None:
    """A bool mask as bytes; same strides, no copy."""
    return None if mask is None else mask.view(torch.uint8)


def mask_strides(mask: torch.Tensor | None) -> tuple[int, ...]:
    """Strides of a (B, H, P) mask, zeros if there is none."""
    return (0, 0, 0) if mask is None else tuple(mask.stride())


def slab(dim: int) -> int:
    """How many channels an elementwise kernel takes at a time; 64 of KEY_ROWS rows fit the registers as float64 too."""
    return min(64, max(16, 1 << (dim - 1).bit_length()))


def wide(tensor: torch.Tensor) -> bool:
    """Whether arithmetic on this tensor is done in float64."""
    return tensor.dtype == torch.float64
