"""Counts and sums per code: the launcher of segment.py.

The stable sort, the search for the segment borders and the running sum are PyTorch's own (deterministic, no
synchronisation); everything that touches z is one pass of the kernels.
"""

from __future__ import annotations

import torch
import triton

from vqkernels.backends.triton.gather import key_kernel
from vqkernels.backends.triton.launch import FUSED_ROUNDING, interpreted, on_device
from vqkernels.backends.triton.segment import partial_kernel, total_kernel
from vqkernels.backends.triton.views import KEY_ROWS, bytes_of, mask_strides, slab, wide

CHUNK = 256
CHUNK_TILE = 32


def statistics(
    z: torch.Tensor, indices: torch.Tensor, codebook_size: int, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """How many rows chose each code (H, K) int64, and their sums (H, K, D) float32 (float64 if z is).

    z (B, H, P, D) with any strides, indices (B, H, P) int64. Rows that are masked, poisoned, or whose index lies
    outside [0, K) count nowhere.
    """
    batch, heads, positions, dim = z.shape
    rows = batch * positions
    keys = empty_keys(z, codebook_size)
    with on_device(z):
        if keys.numel() > 0:
            key_kernel[(triton.cdiv(rows, KEY_ROWS), heads)](
                z, indices.contiguous(), bytes_of(mask), keys,
                rows, positions, codebook_size, *z.stride(), *mask_strides(mask),
                DIM=dim, BM=KEY_ROWS, BD=slab(dim), WIDE=wide(z), MASKED=mask is not None, **FUSED_ROUNDING,
            )  # fmt: skip
        return sums_by_key(z, keys, codebook_size)


def empty_keys(z: torch.Tensor, codebook_size: int) -> torch.Tensor:
    """Room for one sort key per row, in the narrowest type: a radix sort pays per byte."""
    batch, heads, positions, _ = z.shape
    narrow = heads * codebook_size < 2**15
    return torch.empty(heads * batch * positions, dtype=torch.int16 if narrow else torch.int32, device=z.device)


def sums_by_key(z: torch.Tensor, keys: torch.Tensor, codebook_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Counts and sums from the keys that gather.py writes."""
    heads, dim = z.shape[1], z.shape[3]
    sums = torch.empty(heads, codebook_size, dim, dtype=torch.float64 if wide(z) else torch.float32, device=z.device)
    counts = segment_sums(z, keys, sums, codebook=None, grad_loss=None, elements=None)
    return counts, sums


def segment_sums(
    z: torch.Tensor,
    keys: torch.Tensor,
    sums: torch.Tensor,
    *,
    codebook: torch.Tensor | None,
    grad_loss: torch.Tensor | None,
    elements: torch.Tensor | None,
) -> torch.Tensor:
    """Fill `sums` (H, K, D) with Σ z, or with grad_loss · 2 / elements · Σ (e - z) if a codebook is given.

    Returns the counts (H, K) int64.
    """
    batch, heads, positions, dim = z.shape
    codes = sums.shape[1]
    groups = heads * codes
    sorted_keys, order = torch.sort(keys, stable=True)
    borders = torch.arange(groups + 1, dtype=keys.dtype, device=z.device)
    offsets = torch.searchsorted(sorted_keys, borders)
    counts = offsets[1:] - offsets[:-1]
    chunk_ends = ((counts + (CHUNK - 1)) // CHUNK).cumsum(0)
    most_chunks = keys.numel() // CHUNK + min(groups, keys.numel())
    partials = torch.empty(most_chunks, dim, dtype=torch.float64, device=z.device)
    block = slab(dim)
    if groups > 0:
        if most_chunks > 0:
            partial_kernel[(most_chunks, triton.cdiv(dim, block))](
                z, codebook, order, offsets, chunk_ends, partials,
                batch * positions, positions, codes, groups, *z.stride(),
                *((0, 0, 0) if codebook is None else codebook.stride()),
                DIM=dim, CHUNK=CHUNK, BM=CHUNK_TILE, BD=block, RESIDUAL=codebook is not None, **FUSED_ROUNDING,
            )  # fmt: skip
        total_kernel[(groups, triton.cdiv(dim, block))](
            partials, chunk_ends, grad_loss, elements, sums, codes, *sums.stride(),
            DIM=dim, BM=CHUNK_TILE, BD=block, SCALED=grad_loss is not None, INTERPRETED=interpreted(),
            **FUSED_ROUNDING,
        )  # fmt: skip
    return counts.view(heads, codes)
