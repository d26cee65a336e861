"""Codebook statistics: how many rows chose each code, and their sums, deterministic to the bit."""

import torch
from torch import Tensor

from ..backends import registry
from .checks import check_mask, check_rows, row_shape
from .registration import Operation


def _fake(
    z: Tensor, indices: Tensor, codebook_size: int, mask: Tensor | None, channel_dim: int, batched: bool
) -> tuple[Tensor, Tensor]:
    heads, channels = z.shape[0] if batched else 1, z.shape[channel_dim]
    sums = torch.float64 if z.dtype == torch.float64 else torch.float32
    return (
        z.new_empty((heads, codebook_size), dtype=torch.int64),
        z.new_empty((heads, codebook_size, channels), dtype=sums),
    )


statistics = Operation(
    "statistics",
    "(Tensor z, Tensor indices, SymInt codebook_size, Tensor? mask, int channel_dim, bool batched)"
    " -> (Tensor counts, Tensor sums)",
    _fake,
)


def codebook_statistics(
    z: Tensor,
    indices: Tensor,
    codebook_size: int,
    *,
    mask: Tensor | None = None,
    channel_dim: int = -1,
    batched: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Counts and sums of the rows of each code: what an EMA codebook update needs.

    Args:
        z: `(..., D)`, or any layout whose channel axis is `channel_dim`.
        indices: int64, z's shape without the channel axis, in [-1, codebook_size); -1 marks a row that counts nowhere.
        codebook_size: K.
        mask: bool, like `indices`; rows where it is False are not read.
        batched: axis 0 of z, indices and mask is the head, each with statistics of its own.

    Returns:
        `counts (K,)` int64 and `sums (K, D)` float32 (float64 where z is), with a leading axis H if `batched`: each
        sum is accumulated in float64 over the rows in ascending order and rounded once. Rows with a NaN or an
        infinity count nowhere.

    Raises:
        RuntimeError: where an index is `codebook_size` or more and the backend is cpu or eager. The Triton backend does
            not wait for the device to tell: there such a row counts nowhere, like one with index -1.
    """
    if not isinstance(codebook_size, int) or codebook_size < 1:
        raise ValueError(f"codebook_size must be a positive int, got {codebook_size!r}")
    if not isinstance(z, Tensor) or z.dim() < 1:
        raise TypeError("z must be a tensor of at least one dimension")
    if not -z.dim() <= channel_dim < z.dim():
        raise ValueError(
            f"channel_dim must be in [-{z.dim()}, {z.dim() - 1}] for z of {z.dim()} axes, got {channel_dim}"
        )
    one_code = z.new_empty((1, z.shape[channel_dim]))
    channel_dim = check_rows(z, one_code.expand(z.shape[0], -1, -1) if batched else one_code, channel_dim)
    check_mask(mask, z, channel_dim)
    expected = row_shape(z, channel_dim)
    if not isinstance(indices, Tensor) or indices.dtype != torch.int64 or tuple(indices.shape) != expected:
        raise ValueError(f"indices must be int64 of z's shape without channels, {list(expected)}")
    chosen = registry.resolve(backend, z.device, "statistics")
    counts, sums = statistics(chosen, z.detach(), indices, codebook_size, mask, channel_dim, batched)
    return (counts, sums) if batched else (counts[0], sums[0])
