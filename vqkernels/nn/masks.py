"""Which rows of z count: a mask, or the lengths of padded sequences."""

import torch
from torch import Tensor


def row_mask(z: Tensor, channel_dim: int, mask: Tensor | None, lengths: Tensor | None) -> Tensor | None:
    """The mask of z's rows, bool of z's shape without channels, or None where every row counts.

    Args:
        channel_dim: not negative.
        mask: bool, True where a row counts; or integers, non-zero where it counts, as attention masks are.
        lengths: int `(B,)`; element b of the batch keeps its first `lengths[b]` positions, along the axis after it.
            Nothing is read back to the host: a length beyond the axis keeps it whole, a negative one keeps nothing.
    """
    if lengths is None:
        return None if mask is None else _bool_mask(z, channel_dim, mask)
    if mask is not None:
        raise ValueError("mask and lengths say the same thing: give one of them")
    shape = z.shape[:channel_dim] + z.shape[channel_dim + 1 :]
    if len(shape) < 2:
        raise ValueError(f"lengths need a z with a batch and a position axis beside the channels, got {list(z.shape)}")
    if not isinstance(lengths, Tensor) or lengths.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"lengths must be an int64 or int32 tensor, got {getattr(lengths, 'dtype', type(lengths))}")
    if not torch.jit.is_tracing() and lengths.shape != shape[:1]:
        raise ValueError(f"lengths must be ({shape[0]},), one per batch element, got {list(lengths.shape)}")
    kept = torch.arange(shape[1], device=z.device) < lengths.to(z.device).unsqueeze(1)
    return kept.view(*kept.shape, *[1] * (len(shape) - 2)).expand(shape)


def _bool_mask(z: Tensor, channel_dim: int, mask: Tensor) -> Tensor:
    if not isinstance(mask, Tensor) or mask.is_floating_point() or mask.is_complex():
        raise TypeError(
            "mask must be bool (True: the row counts) or integers (non-zero: it counts), got "
            f"{getattr(mask, 'dtype', type(mask))}: of a mask of ones and zeros give mask.bool(), of one that is added "
            "to scores, where 0 keeps a row, mask == 0"
        )
    shape = z.shape[:channel_dim] + z.shape[channel_dim + 1 :]
    if not torch.jit.is_tracing() and mask.shape != shape:
        raise ValueError(f"mask must have z's shape without channels, {list(shape)}, got {list(mask.shape)}")
    return mask if mask.dtype == torch.bool else mask != 0


def row_levels(z: Tensor, channel_dim: int, levels: int | Tensor | None, most: int) -> Tensor | None:
    """How many levels each row passes, int64 of z's shape without channels; None where every row passes all.

    Args:
        channel_dim: not negative.
        levels: an int in [1, most], or int64 `(B,)` for the elements of z's first axis, whose values are not looked at.
    """
    if levels is None:
        return None
    shape = z.shape[:channel_dim] + z.shape[channel_dim + 1 :]
    if isinstance(levels, Tensor):
        if levels.dtype != torch.int64:
            raise TypeError(f"levels must be an int or an int64 tensor, got {levels.dtype}")
        if not torch.jit.is_tracing() and levels.shape != (shape[:1] or (1,)):
            raise ValueError(f"levels must be ({shape[0] if shape else 1},), one per element, got {list(levels.shape)}")
        return levels.to(z.device).view(-1, *[1] * (len(shape) - 1)).expand(shape) if shape else levels[0]
    if not isinstance(levels, int) or isinstance(levels, bool) or not 1 <= levels <= most:
        raise ValueError(f"levels must be an int from 1 to {most}, got {levels!r}")
    if levels == most:
        return None
    return torch.full(shape, levels, dtype=torch.int64, device=z.device)


def zero_masked(x: Tensor, mask: Tensor | None, channel_dim: int) -> Tensor:
    """x with zeros for the rows that do not count, whatever they hold, and a gradient of exactly 0 there."""
    return x if mask is None else x.masked_fill(~mask.unsqueeze(channel_dim), 0)
