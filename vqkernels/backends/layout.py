"""The canonical view of z: (batch, head, position, channel) by four strides, and the way back.

Channels-last, channels-first and head layouts need no permuted copy; only a z whose leading axes cannot be merged into
two groups, each with one stride, is copied. The operators take z as their caller has it, and each backend views it
so below the dispatcher: a compiled graph holds no reshapes. csrc/bindings/views.h has the same rule in C++.
"""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor


class Layout(NamedTuple):
    """Which axes of z are what. Axis 0 is the head when `batched`."""

    lead: tuple[int, ...]  # z's sizes without the head and channel axes
    split: int  # lead[:split] is the batch, lead[split:] are the positions
    merged: bool  # the two groups have one stride each, so z is viewed, not copied
    channel_dim: int
    batched: bool

    def rows(self, x: Tensor) -> Tensor:
        """z or anything of its shape -> (batch, head, position, channel), a view wherever strides allow it."""
        x = x.movedim(self.channel_dim, -1)
        x = x if self.batched else x.unsqueeze(0)
        return x.reshape(x.shape[0], self._batch(), self._positions(), x.shape[-1]).movedim(0, 1)

    def per_row(self, x: Tensor) -> Tensor:
        """A mask or indices of z's shape without channels -> (batch, head, position)."""
        x = x if self.batched else x.unsqueeze(0)
        return x.reshape(x.shape[0], self._batch(), self._positions()).movedim(0, 1)

    def restore_rows(self, x: Tensor) -> Tensor:
        """(batch, head, position, channel) -> z's shape."""
        x = x.movedim(1, 0)
        x = x.reshape(x.shape[0], *self.lead, x.shape[-1])
        return (x if self.batched else x.squeeze(0)).movedim(-1, self.channel_dim)

    def restore_per_row(self, x: Tensor) -> Tensor:
        """(batch, head, position) -> z's shape without channels."""
        x = x.movedim(1, 0)
        x = x.reshape(x.shape[0], *self.lead)
        return x if self.batched else x.squeeze(0)

    def _batch(self) -> int:
        return _product(self.lead[: self.split])

    def _positions(self) -> int:
        return _product(self.lead[self.split :])


def _product(sizes: tuple[int, ...]) -> int:
    product = 1
    for size in sizes:
        product *= size
    return product


def layout_of(z: Tensor, channel_dim: int, batched: bool) -> Layout:
    """The layout of z; `channel_dim` is not negative."""
    axes = [i for i in range(z.dim()) if i != channel_dim and not (batched and i == 0)]
    lead = tuple(z.shape[i] for i in axes)
    wide = [i for i in range(len(axes)) if lead[i] != 1]  # an axis of one element may have any stride
    breaks = [
        outer + 1 for outer, inner in pairwise(wide) if z.stride(axes[outer]) != z.stride(axes[inner]) * lead[inner]
    ]
    return Layout(lead, breaks[0] if len(breaks) == 1 else 0, len(breaks) <= 1, channel_dim, batched)


def empty_rows(z: Tensor, layout: Layout) -> Tensor:
    """An uninitialised tensor like z, in z's memory format where z is viewed and contiguous where it is copied."""
    return torch.empty_like(z) if layout.merged else torch.empty_like(z, memory_format=torch.contiguous_format)
