"""Quantization with Triton: search, then lookup, squared error and statistics; and the backward pass.

Forward reads z twice (pack, gather), plus once more in sorted order if statistics are wanted. Backward reads z twice
(row gradient, codebook gradient) and saves nothing but the indices.
Losses are L = mean of (z - e)² over the unmasked elements, M of them: with respect to z (commitment) the gradient is
2 (z - e) / M, with respect to code k it is Σ 2 (e - z) / M over its rows. Both come from direct residuals.
"""

from __future__ import annotations

import torch
import triton

from vqkernels.backends.triton.gather import gather_kernel, grad_kernel
from vqkernels.backends.triton.launch import FUSED_ROUNDING, interpreted, on_device, registers
from vqkernels.backends.triton.nearest import nearest
from vqkernels.backends.triton.statistics import empty_keys, segment_sums, sums_by_key
from vqkernels.backends.triton.views import KEY_ROWS, slab, wide


def quantize(
    z: torch.Tensor,
    codebook: torch.Tensor,
    mask: torch.Tensor | None,
    metric: str,
    precision: str,
    statistics: bool,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(quantized like z, or `out` filled; indices (B, H, P), squared error 0-d float64, counts (H, K), sums (H, K, D)).

    Shapes as in nearest(); counts and sums are empty unless `statistics`. The squared error is the sum of (z - e)² over
    the unmasked rows, added in a fixed order; NaN if one of them is poisoned.
    """
    indices, _ = nearest(z, codebook, mask, metric, precision)
    quantized, squared_error, counts, sums = lookup(z, codebook, indices, statistics, out)
    return quantized, indices, squared_error, counts, sums


def lookup(
    z: torch.Tensor,
    codebook: torch.Tensor,
    indices: torch.Tensor,
    statistics: bool,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """quantize() for given indices (B, H, P): -1 marks a masked row, and a row beyond the codebook becomes NaN."""
    batch, heads, positions, dim = z.shape
    rows, codes = batch * positions, codebook.shape[1]
    quantized = torch.empty_like(z) if out is None else out
    blocks, double = triton.cdiv(rows, KEY_ROWS), wide(z) or wide(codebook)
    partial_error = torch.empty(heads * blocks, dtype=torch.float64, device=z.device)
    keys = empty_keys(z, codes) if statistics else None
    with on_device(z):
        if partial_error.numel() > 0:
            gather_kernel[(blocks, heads)](
                z, codebook, indices.contiguous(), quantized, partial_error, keys,
                rows, positions, codes, *z.stride(), *codebook.stride(), *quantized.stride(),
                DIM=dim, BM=KEY_ROWS, BD=slab(dim), WIDE=double,
                KEYS=statistics, INTERPRETED=interpreted(), **registers(double), **FUSED_ROUNDING,
            )  # fmt: skip
        squared_error = partial_error.sum()
        if keys is None:
            counts = torch.empty(0, dtype=torch.int64, device=z.device)
            sums = torch.empty(0, dtype=torch.float64 if wide(z) else torch.float32, device=z.device)
        else:
            counts, sums = sums_by_key(z, keys, codes)
    return quantized, squared_error, counts, sums


def quantize_backward(
    grad_quantized: torch.Tensor,
    grad_codebook_loss: torch.Tensor,
    grad_commitment_loss: torch.Tensor,
    z: torch.Tensor,
    codebook: torch.Tensor,
    indices: torch.Tensor,
    gradient: str,
    codebook_gradient: bool,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(grad_z like z, or `out` filled; contiguous grad_codebook, or empty if not wanted). Index -1 marks a masked row.

    grad_z = grad_quantized + grad_commitment_loss · 2 (z - e) / M, grad_quantized rotated if gradient is "rotation"
    grad_codebook_k = grad_codebook_loss · Σ_{i→k} 2 (e_k - z_i) / M,  M = max(1, unmasked rows) · D
    """
    batch, heads, positions, dim = z.shape
    rows, codes = batch * positions, codebook.shape[1]
    elements = torch.count_nonzero(indices >= 0).clamp_min(1) * dim
    grad_z = torch.empty_like(z) if out is None else out
    keys = empty_keys(z, codes)
    rotated = gradient == "rotation"
    double = rotated or wide(z) or wide(codebook)
    with on_device(z):
        if keys.numel() > 0:
            grad_kernel[(triton.cdiv(rows, KEY_ROWS), heads)](
                grad_quantized, grad_commitment_loss, elements, z, codebook, indices.contiguous(), grad_z, keys,
                rows, positions, codes, *z.stride(), *codebook.stride(), *grad_quantized.stride(), *grad_z.stride(),
                DIM=dim, BM=KEY_ROWS, BD=min(slab(dim), 32 if rotated else 64),  # 64 rotated channels spill
                WIDE=double, ROTATED=rotated, INTERPRETED=interpreted(), **registers(double), **FUSED_ROUNDING,
            )  # fmt: skip
        if not codebook_gradient:
            return grad_z, codebook.new_empty(0)
        grad_codebook = torch.empty_like(codebook, memory_format=torch.contiguous_format)
        segment_sums(z, keys, grad_codebook, codebook=codebook, grad_loss=grad_codebook_loss, elements=elements)
    return grad_z, grad_codebook
