"""Nearest codes and quantization: allocates, and launches csrc/cuda/nearest.cu.

Rows and codes are rounded to fp16 operands, searched on the tensor cores, certified, and scored in float64 where the
certificate leaves a row open. Three launches for few rows, at most five for many; nothing of size N x K, and no wait
for the device. `precision="fast"` takes the rounded operands for exact.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vqkernels.backends.cuda import launch
from vqkernels.backends.cuda import statistics as segments

MOST_CHANNELS = 8192
MOST_ROWS = 2**30  # of one head; codes likewise
MOST_HEADS = 2**16 - 1  # a grid's second axis


def nearest(z: Tensor, codebook: Tensor, mask: Tensor | None, metric: str, precision: str) -> tuple[Tensor, Tensor]:
    """Indices (B, H, P) int64, and how many unmasked rows the certificate decided (0-d int64).

    z (B, H, P, D) with any strides; codebook (H, K, D); mask (B, H, P) bool or None, True where a row counts.
    """
    indices, decided = _outputs(z)
    _launch(z, codebook, mask, metric, precision, indices, decided, None, None)
    return indices, decided


def quantize(
    z: Tensor,
    codebook: Tensor,
    mask: Tensor | None,
    metric: str,
    precision: str,
    statistics: bool,
    out: Tensor,
) -> tuple[Tensor, ...]:
    """Fills `out`, of z's shape and dtype; returns it, indices (B, H, P), squared error 0-d float64, counts and sums.

    Shapes as in nearest(); counts (H, K) and sums (H, K, D) are empty unless `statistics`. The squared error is the sum
    of (z - e)² over the unmasked rows, added in a fixed order; NaN if one of them is poisoned.
    """
    indices, decided = _outputs(z)
    squared_error = torch.empty((), dtype=torch.float64, device=z.device)
    _launch(z, codebook, mask, metric, precision, indices, decided, out, squared_error)
    counts, sums = _statistics(z, indices, codebook, mask, statistics)
    return out, indices, squared_error, counts, sums


def lookup(z: Tensor, codebook: Tensor, indices: Tensor, statistics: bool, out: Tensor) -> tuple[Tensor, ...]:
    """quantize() for given indices (B, H, P), which it does not return. -1 marks a masked row, and a row whose index is
    not below the codebook's size becomes NaN."""
    squared_error = torch.empty((), dtype=torch.float64, device=z.device)
    _check(z, codebook)
    kernels = _operators()
    with launch.on_device(z):
        workspace = torch.empty(kernels.cuda_lookup_workspace(z, codebook), dtype=torch.uint8, device=z.device)
        kernels.cuda_lookup(z, codebook, indices, out, squared_error, workspace, launch.stream(z))
    return out, squared_error, *_statistics(z, indices, codebook, None, statistics)


def _statistics(
    z: Tensor, indices: Tensor, codebook: Tensor, mask: Tensor | None, wanted: bool
) -> tuple[Tensor, Tensor]:
    if wanted:
        return segments.statistics(z, indices, codebook.shape[1], mask)
    wide = torch.float64 if z.dtype == torch.float64 else torch.float32
    return torch.empty(0, dtype=torch.int64, device=z.device), torch.empty(0, dtype=wide, device=z.device)


def _outputs(z: Tensor) -> tuple[Tensor, Tensor]:
    batch, heads, positions, _ = z.shape
    indices = torch.empty(heads, batch, positions, dtype=torch.int64, device=z.device).transpose(0, 1)
    return indices, torch.empty((), dtype=torch.int64, device=z.device)


def _operators() -> Any:
    return torch.ops.vqkernels


def _launch(
    z: Tensor, codebook: Tensor, mask: Tensor | None, metric: str, precision: str, indices: Tensor, decided: Tensor,
    quantized: Tensor | None, squared_error: Tensor | None,
) -> None:  # fmt: skip
    _check(z, codebook)
    kernels = _operators()
    processors = launch.processors(z)
    with launch.on_device(z):
        size = kernels.cuda_nearest_workspace(z, codebook, mask, metric, precision, processors)
        workspace = torch.empty(size, dtype=torch.uint8, device=z.device)
        kernels.cuda_nearest(
            z, codebook, mask, metric, precision, indices, decided, quantized, squared_error, workspace, processors,
            launch.stream(z),
        )  # fmt: skip


def _check(z: Tensor, codebook: Tensor) -> None:
    batch, heads, positions, dim = z.shape
    if heads > MOST_HEADS:
        raise RuntimeError(f"the CUDA kernels search up to {MOST_HEADS} heads, got {heads}")
    if dim > MOST_CHANNELS:
        raise RuntimeError(f"the CUDA kernels search up to {MOST_CHANNELS} channels, got {dim}")
    if max(batch * positions, codebook.shape[1]) > MOST_ROWS:
        raise RuntimeError(
            f"the CUDA kernels search up to {MOST_ROWS} rows and codes per head,"
            f" got {batch * positions} rows and {codebook.shape[1]} codes"
        )
