"""Counts and sums per code, and the codebook's gradient: allocates, and launches csrc/cuda/statistics.cu.

A stable radix sort of the rows by code, then sums of fixed chunks of the sorted rows: the same bits in every run and on
every GPU, no atomics, nothing of size N x K, no wait for the device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vqkernels.backends.cuda import launch

LIMIT = 2**31


def statistics(z: Tensor, indices: Tensor, codebook_size: int, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """How many rows chose each code (H, K) int64, and their sums (H, K, D) float32 (float64 if z is).

    z (B, H, P, D) with any strides, indices (B, H, P) int64, mask (B, H, P) bool. Rows that are masked, poisoned, or
    whose index lies outside [0, K) count nowhere.
    """
    heads, dim = z.shape[1], z.shape[3]
    counts = torch.empty(heads, codebook_size, dtype=torch.int64, device=z.device)
    wide = torch.float64 if z.dtype == torch.float64 else torch.float32
    sums = torch.empty(heads, codebook_size, dim, dtype=wide, device=z.device)
    _segment_sums(z, indices, mask, codebook_size, None, None, None, counts, sums)
    return counts, sums


def codebook_gradient(z: Tensor, codebook: Tensor, indices: Tensor, grad_loss: Tensor, elements: Tensor) -> Tensor:
    """Contiguous (H, K, D) of the codebook's dtype: grad_loss · 2 / elements · Σ (e - z) over the rows of each code.

    codebook (H, K, D), indices (B, H, P) int64, grad_loss 0-d float32 or float64, elements 0-d int64.
    """
    out = torch.empty_like(codebook, memory_format=torch.contiguous_format)
    _segment_sums(z, indices, None, codebook.shape[1], codebook, grad_loss, elements, None, out)
    return out


def _segment_sums(
    z: Tensor, indices: Tensor, mask: Tensor | None, codes: int, codebook: Tensor | None, grad: Tensor | None,
    elements: Tensor | None, counts: Tensor | None, sums: Tensor,
) -> None:  # fmt: skip
    kernels: Any = torch.ops.vqkernels
    batch, heads, positions, dim = z.shape
    rows, groups = batch * heads * positions, heads * codes
    if max(rows, groups) >= LIMIT:
        raise RuntimeError(f"the CUDA kernels number rows and codes in 31 bits, got {rows} rows and {groups} codes")
    with launch.on_device(z):
        size = kernels.cuda_segment_sums_workspace(rows, groups, dim)
        workspace = torch.empty(size, dtype=torch.uint8, device=z.device)
        kernels.cuda_segment_sums(
            z, indices, mask, codes, codebook, grad, elements, counts, sums, workspace, launch.stream(z)
        )
