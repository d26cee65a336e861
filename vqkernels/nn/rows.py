"""The rows of z: where its channels are, which rows count, and how heads split them. A forward finds this once.

With one codebook for all heads, the heads become rows: z `(..., H d, ...)` is viewed as `(..., H, d, ...)`. With one
codebook per head, axis 0 is the head, as the batched operators need it: `(H, ..., d, ...)`. No permuted copy is made.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops.checks import refuse_nested


class Rows(NamedTuple):
    """What the operators quantize."""

    values: Tensor
    mask: Tensor | None  # of values' shape without channels
    channel_dim: int  # not negative
    batched: bool  # axis 0 of values and mask is the head; each head has its codebook, and all have the same mask

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the row axes of one codebook: `values` without channels, and without heads where batched."""
        return _without(self.values.shape, self.channel_dim)[int(self.batched) :]

    @property
    def number(self) -> int:
        """How many rows each codebook gets, masked ones included."""
        return math.prod(self.shape)


class RowLayout(NamedTuple):
    """How the rows lie in z."""

    channel_dim: int  # not negative
    shape: tuple[int, ...]  # z's without channels
    mask: Tensor | None  # bool, of that shape: True where a row counts; None: every row counts
    heads: int
    separate: bool  # one codebook per head; never True for a single head

    @classmethod
    def of(
        cls,
        z: Any,
        dim: int,
        channel_dim: int,
        *,
        mask: Any = None,
        lengths: Any = None,
        heads: int = 1,
        separate: bool = False,
    ) -> "RowLayout":
        """Checks that z has `dim` channels at `channel_dim`, and finds its rows.

        Args:
            mask: bool, True where a row counts; or integers, non-zero where it counts, as attention masks are.
            lengths: int `(B,)`; element b of the batch keeps its first `lengths[b]` positions, along the axis after it.
                Nothing is read back to the host: a length beyond the axis keeps it whole, a negative one keeps nothing.

        Raises:
            TypeError, ValueError: z, mask or lengths are of the wrong type or shape.
        """
        if not isinstance(z, Tensor):
            raise TypeError(f"z must be a tensor, got {type(z).__name__}")
        if not z.is_floating_point():
            raise TypeError(f"z must be float32, bfloat16, float16 or float64, got {z.dtype}")
        refuse_nested("z", z)
        inside = -z.dim() <= channel_dim < z.dim()
        if not inside or (not torch.jit.is_tracing() and z.shape[channel_dim] != dim):
            raise ValueError(f"z must have {dim} channels at channel_dim={channel_dim}, got {list(z.shape)}")
        channel_dim = channel_dim % z.dim()
        shape = _without(z.shape, channel_dim)
        if lengths is not None:
            if mask is not None:
                raise ValueError("mask and lengths say the same thing: give one of them")
            if len(shape) < 2:
                raise ValueError(
                    f"lengths need a z with a batch and a position axis beside the channels, got {list(z.shape)}"
                )
            mask = _mask_of_lengths(lengths, shape, z.device)
        elif mask is not None:
            mask = _bool_mask(mask, shape)
        return cls(channel_dim, shape, mask, heads, separate and heads > 1)

    def split(self, z: Tensor) -> Rows:
        """z, or another tensor of its axes, as rows for the operators."""
        if self.heads == 1:
            return Rows(z, self.mask, self.channel_dim, False)
        sizes = z.shape  # a view of these, and no unflatten: torch.onnx.export(dynamo=False) fixes what that gives
        channels = sizes[self.channel_dim] // self.heads
        z = z.view(*sizes[: self.channel_dim], self.heads, channels, *sizes[self.channel_dim + 1 :])
        axis = 0 if self.separate else self.channel_dim
        mask = self.mask
        if mask is not None:
            mask = mask.unsqueeze(axis)
            mask = mask.expand(*mask.shape[:axis], self.heads, *mask.shape[axis + 1 :])
        return Rows(z.movedim(self.channel_dim, axis), mask, self.channel_dim + 1, self.separate)

    def join(self, values: Tensor) -> Tensor:
        """Values of split rows -> z's shape."""
        if self.heads == 1:
            return values
        values = values.movedim(0, self.channel_dim) if self.separate else values
        return values.flatten(self.channel_dim, self.channel_dim + 1)

    def join_indices(self, indices: Tensor) -> Tensor:
        """Indices of the split rows -> z's shape without channels, then one axis H."""
        if self.heads == 1:
            return indices
        return indices.movedim(0 if self.separate else self.channel_dim, -1).contiguous()

    def zero_masked(self, x: Tensor) -> Tensor:
        """x, laid out like z, with zeros for the rows that do not count; their gradient is exactly 0."""
        return zero_masked(x, self.mask, self.channel_dim)

    def levels(self, levels: Any, most: int, device: torch.device) -> Tensor | None:
        """How many levels each row passes, int64 of z's shape without channels; None where every row passes all.

        Args:
            levels: an int in [1, most], or int64 `(B,)` for the elements of z's first axis, whose values are not read.

        Raises:
            TypeError, ValueError: levels are of the wrong type, shape or range.
        """
        if levels is None:
            return None
        shape = self.shape
        if isinstance(levels, Tensor):
            if levels.dtype != torch.int64:
                raise TypeError(f"levels must be an int or an int64 tensor, got {levels.dtype}")
            first = shape[0] if shape else 1
            if not torch.jit.is_tracing() and levels.shape != (first,):
                raise ValueError(f"levels must be ({first},), one per element, got {list(levels.shape)}")
            return levels.to(device).view(-1, *[1] * (len(shape) - 1)).expand(shape) if shape else levels[0]
        if not isinstance(levels, int) or isinstance(levels, bool) or not 1 <= levels <= most:
            raise ValueError(f"levels must be an int from 1 to {most}, got {levels!r}")
        return None if levels == most else torch.full(shape, levels, dtype=torch.int64, device=device)


def _without(sizes: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return (*sizes[:axis], *sizes[axis + 1 :])


def zero_masked(x: Tensor, mask: Tensor | None, channel_dim: int) -> Tensor:
    """x with zeros for the rows that do not count, whatever they hold, and a gradient of exactly 0 there."""
    return x if mask is None else x.masked_fill(~mask.unsqueeze(channel_dim), 0)


def _mask_of_lengths(lengths: Any, shape: tuple[int, ...], device: torch.device) -> Tensor:
    if not isinstance(lengths, Tensor) or lengths.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"lengths must be an int64 or int32 tensor, got {getattr(lengths, 'dtype', type(lengths))}")
    if not torch.jit.is_tracing() and lengths.shape != shape[:1]:
        raise ValueError(f"lengths must be ({shape[0]},), one per batch element, got {list(lengths.shape)}")
    kept = torch.arange(shape[1], device=device) < lengths.to(device).unsqueeze(1)
    return kept.view(*kept.shape, *[1] * (len(shape) - 2)).expand(shape)


def _bool_mask(mask: Any, shape: tuple[int, ...]) -> Tensor:
    if not isinstance(mask, Tensor) or mask.is_floating_point() or mask.is_complex():
        raise TypeError(
            "mask must be bool (True: the row counts) or integers (non-zero: it counts), got "
            f"{getattr(mask, 'dtype', type(mask))}: of a mask of ones and zeros give mask.bool(), of one that is added "
            "to scores, where 0 keeps a row, mask == 0"
        )
    if not torch.jit.is_tracing() and mask.shape != shape:
        raise ValueError(f"mask must have z's shape without channels, {list(shape)}, got {list(mask.shape)}")
    return mask if mask.dtype == torch.bool else mask != 0
