"""Residual quantization with Triton: the searches of all levels, then codes, errors and statistics; and the backward.

Small D: residual_search.py takes a block of rows through all levels in one launch, after one packing of all codebooks.
Any other: the search of nearest.py level by level on the residual, which subtract_kernel keeps in one buffer of z's
shape (float32; float64 where z is). configs.py draws the line. Either way compose_kernel makes everything else of the
indices alone (residual_rows.py), and one sort serves the statistics of all levels (residual_segment.py). Nothing waits
for the device and no shape depends on what it holds. Scratch: O((N + K) · D) bytes, and keys of Q·N rows if statistics
are wanted. Backward reads z and the indices and recomputes the residuals in registers (residual_gradient.py).
"""

from __future__ import annotations

import torch
import triton

from vqkernels.backends.triton import configs
from vqkernels.backends.triton.launch import (
    FUSED_ROUNDING,
    SEPARATE_ROUNDING,
    capability,
    interpreted,
    multiprocessors,
    on_device,
    registers,
)
from vqkernels.backends.triton.nearest import nearest, pack_codes
from vqkernels.backends.triton.residual_gradient import residual_grad_kernel
from vqkernels.backends.triton.residual_rows import compose_kernel, subtract_kernel
from vqkernels.backends.triton.residual_search import residual_search_kernel
from vqkernels.backends.triton.residual_segment import empty_keys, residual_sums
from vqkernels.backends.triton.views import KEY_ROWS, mask_strides, slab, wide


def residual_quantize(
    z: torch.Tensor,
    codebooks: torch.Tensor,
    levels: torch.Tensor | None,
    metric: str,
    precision: str,
    statistics: bool,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(quantized like z, or `out` filled; indices (B, H, P, Q); squared errors (H, Q) float64; counts (H, Q, K) int64;
    sums (H, Q, K, D)).

    z (B, H, P, D) with any strides; codebooks (H, Q, K, D); levels (B, H, P) int64, how many levels a row passes, or
    None for all. A row of no level is never read: index -1, output 0. counts and sums are empty unless `statistics`;
    sums are of the residuals, float32 (float64 where z is).
    """
    quantized = torch.empty_like(z) if out is None else out
    with on_device(z):
        rows = z.shape[0] * z.shape[1] * z.shape[2]
        config = configs.chained_config(
            capability(z.device), z.shape[3], codebooks.shape[2], rows, multiprocessors(z.device)
        )
        # float64 residuals would take the registers of the scores
        if config is None or wide(z) or wide(codebooks):
            indices = search_by_level(z, codebooks, levels, metric, precision)
        else:
            indices = search_chained(z, codebooks, levels, metric, precision, config)
        return quantized, indices, *compose(z, codebooks, indices, statistics, quantized)


def search_chained(
    z: torch.Tensor,
    codebooks: torch.Tensor,
    levels: torch.Tensor | None,
    metric: str,
    precision: str,
    config: configs.ResidualConfig,
) -> torch.Tensor:
    """Indices (B, H, P, Q) by one launch for all levels."""
    batch, heads, positions, dim = z.shape
    rows, (depth, size) = batch * positions, codebooks.shape[1:3]
    indices = torch.empty(batch, heads, positions, depth, dtype=torch.int64, device=z.device)
    if indices.numel() == 0:
        return indices
    shared = codebooks.stride(1) == 0 or depth == 1  # one codebook for all levels is packed once
    packs = codebooks[:, :1] if shared else codebooks
    # residuals are not of z's lengths, so no code is left out for the sake of z
    codes = pack_codes(z, None, packs.reshape(-1, size, dim), metric, config, certified=False)
    scratch = torch.empty(heads, rows, dim, dtype=torch.float32, device=z.device)
    programs = triton.cdiv(rows, config.block_rows)
    of_program = config.block_rows * (2 * config.block_codes // 8 + 1)
    found = torch.empty(heads, programs, of_program, dtype=torch.float32, device=z.device)
    residual_search_kernel[(programs, heads)](
        z, levels, codebooks, codes.packed, codes.half_norms, codes.centre, codes.state, scratch, found, indices,
        rows, positions, depth, codes.padded_codes,
        packs.shape[1], 0 if shared else 1, *z.stride(), *mask_strides(levels), *codebooks.stride(),
        DIM=dim, PADDED=codes.packed.shape[1], BM=config.block_rows, BK=config.block_codes, METRIC=metric,
        LIMITED=levels is not None, CERTIFIED=precision == "exact",
        num_warps=config.warps, num_stages=config.stages, **registers(True), **SEPARATE_ROUNDING,
    )  # fmt: skip
    return indices


def search_by_level(
    z: torch.Tensor, codebooks: torch.Tensor, levels: torch.Tensor | None, metric: str, precision: str
) -> torch.Tensor:
    """Indices (B, H, P, Q) by one search per level."""
    batch, heads, positions, dim = z.shape
    rows, depth = batch * positions, codebooks.shape[1]
    indices = torch.empty(batch, heads, positions, depth, dtype=torch.int64, device=z.device)
    residual = z
    for level in range(depth):
        codebook = codebooks[:, level]
        passed = None if levels is None else levels > level
        found, _ = nearest(residual, codebook, passed, metric, precision)
        indices[..., level] = found
        if level < depth - 1 and rows > 0 and heads > 0:
            source = residual
            if level == 0:
                residual = torch.empty(z.shape, dtype=torch.float64 if wide(z) else torch.float32, device=z.device)
            subtract_kernel[(triton.cdiv(rows, KEY_ROWS), heads)](
                source, codebook, found, residual,
                rows, positions, *source.stride(), *codebook.stride(), *residual.stride(),
                DIM=dim, BM=KEY_ROWS, BD=slab(dim), WIDE=wide(z), **SEPARATE_ROUNDING,
            )  # fmt: skip
    return indices


def compose(
    z: torch.Tensor, codebooks: torch.Tensor, indices: torch.Tensor, statistics: bool, quantized: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Fill `quantized` from indices (B, H, P, Q) contiguous; (squared errors, counts, sums)."""
    batch, heads, positions, dim = z.shape
    depth, codes = codebooks.shape[1:3]
    blocks, block = triton.cdiv(batch * positions, KEY_ROWS), slab(dim)
    errors = torch.empty(heads, depth, blocks * triton.cdiv(dim, block), dtype=torch.float64, device=z.device)
    keys = empty_keys(z, depth, codes) if statistics else None
    if quantized.numel() > 0:
        compose_kernel[(blocks, heads)](
            z, codebooks, indices, quantized, errors, keys,
            batch * positions, positions, codes, depth, *z.stride(), *codebooks.stride(), *quantized.stride(),
            DIM=dim, BM=KEY_ROWS, BD=block, WIDE=wide(z), SUM_WIDE=wide(codebooks),
            KEYS=statistics, INTERPRETED=interpreted(), **registers(True), **SEPARATE_ROUNDING,
        )  # fmt: skip
    squared_errors = errors.sum(-1)
    kind = torch.float64 if wide(z) else torch.float32
    if keys is None:
        empty = torch.empty(0, dtype=torch.int64, device=z.device)
        return squared_errors, empty, torch.empty(0, dtype=kind, device=z.device)
    sums = torch.empty(heads, depth, codes, dim, dtype=kind, device=z.device)
    counts = residual_sums(z, codebooks, indices, keys, sums)
    return squared_errors, counts, sums


def residual_quantize_backward(
    grad_quantized: torch.Tensor,
    grad_codebook_losses: torch.Tensor,
    grad_commitment_losses: torch.Tensor,
    z: torch.Tensor,
    codebooks: torch.Tensor,
    indices: torch.Tensor,
    gradient: str,
    codebook_gradient: bool,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(grad_z like z, or `out` filled; contiguous grad_codebooks (H, Q, K, D), or empty if not wanted).

    The gradients of the losses are (H, Q); index -1 marks a level not passed. With M_q = max(1, rows at level q) · D
    grad_z = grad_quantized + Σ_q grad_commitment_q · 2 (r_q - e_q) / M_q, grad_quantized rotated towards the sum of the
    codes if gradient is "rotation"
    grad_codebook_qk = grad_codebook_q · Σ_{i→k} 2 (e_qk - r_q) / M_q
    """
    batch, heads, positions, dim = z.shape
    rows = batch * positions
    depth, codes = codebooks.shape[1:3]
    indices = indices.contiguous()
    elements = torch.count_nonzero(indices >= 0, dim=(0, 2)).clamp_min(1) * dim
    grad_z = torch.empty_like(z) if out is None else out
    keys = empty_keys(z, depth, codes)
    rotated = gradient == "rotation"
    sum_wide = wide(codebooks)
    double = wide(z) or sum_wide
    sums = None
    if rotated:
        sums = torch.empty(heads, rows, dim, dtype=torch.float64 if sum_wide else torch.float32, device=z.device)
    with on_device(z):
        if grad_z.numel() > 0:
            residual_grad_kernel[(triton.cdiv(rows, KEY_ROWS), heads)](
                grad_quantized, grad_commitment_losses.contiguous(), elements, z, codebooks, indices, sums, grad_z,
                keys, rows, positions, codes, depth, *z.stride(), *codebooks.stride(), *grad_quantized.stride(),
                *grad_z.stride(),
                DIM=dim, BM=KEY_ROWS, BD=min(slab(dim), 32 if rotated else 64),
                WIDE=wide(z), SUM_WIDE=sum_wide, EXACT=double or rotated, ROTATED=rotated,
                INTERPRETED=interpreted(), **registers(double or rotated), **FUSED_ROUNDING,
            )  # fmt: skip
        if not codebook_gradient:
            return grad_z, codebooks.new_empty(0)
        grad_codebooks = torch.empty_like(codebooks, memory_format=torch.contiguous_format)
        residual_sums(z, codebooks, indices, keys, grad_codebooks, grad_codebook_losses.contiguous(), elements)
    return grad_z, grad_codebooks
