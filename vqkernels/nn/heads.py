"""Splits the channels of z among heads by views, and joins what comes back.

With one codebook for all heads, the heads become rows: z `(..., H d, ...)` is viewed as `(..., H, d, ...)`. With one
codebook per head, axis 0 is the head, as the batched operators want it: `(H, ..., d, ...)`. No permuted copy is made.
"""

import math
from typing import NamedTuple

from torch import Tensor


class Rows(NamedTuple):
    """What the operators quantize."""

    values: Tensor
    mask: Tensor | None  # of values' shape without channels
    channel_dim: int  # not negative
    batched: bool  # axis 0 of values and mask is the head, with a codebook of its own and the mask of every other head

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the row axes of one codebook: `values` without channels, and without heads where batched."""
        sizes = [*self.values.shape[: self.channel_dim], *self.values.shape[self.channel_dim + 1 :]]
        return tuple(sizes[1:] if self.batched else sizes)

    @property
    def number(self) -> int:
        """How many rows each codebook gets, masked ones among them."""
        return math.prod(self.shape)


class Heads(NamedTuple):
    """How a z with `channel_dim` (not negative) is split."""

    number: int
    separate: bool  # one codebook per head; never True for a single head
    channel_dim: int

    def split(self, z: Tensor, mask: Tensor | None) -> Rows:
        """z, and a mask of its shape without channels, as rows for the operators."""
        if self.number == 1:
            return Rows(z, mask, self.channel_dim, False)
        sizes = z.shape  # a view of these, and no unflatten: torch.onnx.export(dynamo=False) fixes what that gives
        channels = sizes[self.channel_dim] // self.number
        z = z.view(*sizes[: self.channel_dim], self.number, channels, *sizes[self.channel_dim + 1 :])
        axis = 0 if self.separate else self.channel_dim
        if mask is not None:
            mask = mask.unsqueeze(axis)
            mask = mask.expand(*mask.shape[:axis], self.number, *mask.shape[axis + 1 :])
        return Rows(z.movedim(self.channel_dim, axis), mask, self.channel_dim + 1, self.separate)

    def join(self, values: Tensor) -> Tensor:
        """Values of split rows -> z's shape."""
        if self.number == 1:
            return values
        values = values.movedim(0, self.channel_dim) if self.separate else values
        return values.flatten(self.channel_dim, self.channel_dim + 1)

    def join_indices(self, indices: Tensor) -> Tensor:
        """Indices of the split rows -> z's shape without channels, then one axis H."""
        if self.number == 1:
            return indices
        return indices.movedim(0 if self.separate else self.channel_dim, -1).contiguous()
