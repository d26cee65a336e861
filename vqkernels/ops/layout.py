"""The canonical view of z and of a codebook, the way back, and the checks that every operation shares.

Kernels read z as (batch, head, position, channel) by four strides, so that channels-last, channels-first and head
layouts need no permuted copy; only a z whose leading axes cannot be merged into two strides is copied.
"""

from typing import NamedTuple

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
METRICS = ("euclidean", "dot", "cosine")
PRECISIONS = ("exact", "fast")


class Layout(NamedTuple):
    """How a tensor of rows was brought to the canonical shape, and how to undo it."""

    lead: tuple[int, ...]  # z's shape without the head and channel axes
    channel_dim: int  # of z, non-negative
    batched: bool  # the codebook has a leading head axis, and z has it too

    def rows(self, x: Tensor) -> Tensor:
        """z or anything of its shape -> (batch, head, position, channel), a view wherever strides allow it."""
        x = x.movedim(self.channel_dim, -1)
        head = x.shape[:1] if self.batched else (1,)
        x = x if self.batched else x.unsqueeze(0)
        split = _mergeable_split(x.shape[1:-1], x.stride()[1:-1])
        batch, positions = _product(x.shape[1 : 1 + split]), _product(x.shape[1 + split : -1])
        return x.reshape(*head, batch, positions, x.shape[-1]).movedim(0, 1)

    def per_row(self, x: Tensor, like: Tensor) -> Tensor:
        """A mask or indices of z's shape without channels -> contiguous (batch, head, position) of the view `like`."""
        x = x if self.batched else x.unsqueeze(0)
        return x.reshape(x.shape[0], like.shape[0], like.shape[2]).movedim(0, 1).contiguous()

    def restore_rows(self, x: Tensor) -> Tensor:
        """(batch, head, position, channel) -> z's shape."""
        x = x.movedim(1, 0)
        x = x.reshape(*x.shape[:1], *self.lead, x.shape[-1])
        return (x if self.batched else x.squeeze(0)).movedim(-1, self.channel_dim)

    def restore_per_row(self, x: Tensor) -> Tensor:
        """(batch, head, position) -> z's shape without channels."""
        x = x.movedim(1, 0)
        x = x.reshape(*x.shape[:1], *self.lead)
        return x if self.batched else x.squeeze(0)


def _product(sizes: tuple[int, ...]) -> int:
    product = 1
    for size in sizes:
        product *= size
    return product


def _mergeable_split(sizes: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Where to split axes into two groups, each of which is one stride; 0 when all of them are, or when none serves."""

    def one_stride(first: int, last: int) -> bool:
        return all(sizes[i] == 1 or strides[i] == strides[i + 1] * sizes[i + 1] for i in range(first, last - 1))

    return next((s for s in range(len(sizes)) if one_stride(0, s) and one_stride(s, len(sizes))), 0)


def layout_of(z: Tensor, codebook: Tensor, channel_dim: int) -> Layout:
    """Checks z against the codebook and finds its layout."""
    if not isinstance(z, Tensor) or not isinstance(codebook, Tensor):
        raise TypeError(f"z and codebook must be tensors, got {type(z).__name__} and {type(codebook).__name__}")
    for name, x in (("z", z), ("codebook", codebook)):
        if x.dtype not in DTYPES:
            raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {x.dtype}")
    if codebook.device != z.device:
        raise ValueError(f"z and codebook must be on one device, got {z.device} and {codebook.device}")
    if codebook.dim() not in (2, 3):
        raise ValueError(f"codebook must be (K, D), or (H, K, D) for batched codebooks, got {_shape(codebook)}")
    batched = codebook.dim() == 3
    if z.dim() < 1 + batched:
        raise ValueError(f"z must have at least {1 + batched} dimensions for this codebook, got {_shape(z)}")
    if not -z.dim() <= channel_dim < z.dim():
        raise ValueError(
            f"channel_dim must be in [-{z.dim()}, {z.dim() - 1}] for z of shape {_shape(z)}, got {channel_dim}"
        )
    channel_dim = channel_dim % z.dim()
    if batched and channel_dim == 0:
        raise ValueError("channel_dim must not be 0 with a batched codebook: axis 0 of z is the head")
    if codebook.shape[-1] != z.shape[channel_dim]:
        raise ValueError(
            f"codebook of shape {_shape(codebook)} has {codebook.shape[-1]} channels, but z of shape {_shape(z)} has "
            f"{z.shape[channel_dim]} at channel_dim={channel_dim}"
        )
    if batched and codebook.shape[0] != z.shape[0]:
        raise ValueError(f"z must have {codebook.shape[0]} heads on axis 0 like the codebook, got {_shape(z)}")
    if codebook.shape[-2] == 0 or codebook.shape[-1] == 0:
        raise ValueError(f"codebook must hold at least one code of at least one channel, got {_shape(codebook)}")
    lead = tuple(n for i, n in enumerate(z.shape) if i != channel_dim and not (batched and i == 0))
    return Layout(lead, channel_dim, batched)


def check_mask(mask: Tensor | None, z: Tensor, channel_dim: int) -> None:
    """A mask is bool, on z's device, and has z's shape without the channel axis; True means that the row counts."""
    if mask is None:
        return
    channel_dim = channel_dim % z.dim()
    expected = tuple(n for i, n in enumerate(z.shape) if i != channel_dim)
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"mask must be a bool tensor (True: the row counts), got {getattr(mask, 'dtype', type(mask))}")
    if tuple(mask.shape) != expected:
        raise ValueError(f"mask must have z's shape without channels, {list(expected)}, got {_shape(mask)}")
    if mask.device != z.device:
        raise ValueError(f"mask must be on z's device {z.device}, got {mask.device}")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """One of a few names, or a sentence that lists them."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def codebook_heads(codebook: Tensor) -> Tensor:
    """(K, D) or (H, K, D) -> contiguous (heads, size, channels)."""
    return (codebook if codebook.dim() == 3 else codebook.unsqueeze(0)).contiguous()


def _shape(x: Tensor) -> list[int]:
    return list(x.shape)
