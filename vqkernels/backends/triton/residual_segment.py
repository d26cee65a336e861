"""Sums of residuals by level and code, in a fixed order: one sort and two launches for all levels.

As segment.py, with keys (head · Q + level) · K + index over the rows of all levels. The residual that a sum takes is
recomputed from z and the codes of the levels before it: a chunk holds rows of one code, hence of one level, so that
costs q gathers from cache for level q, and no residual is ever written. Float64 sums, rounded once.
Never materialised: residuals, a permuted copy of z, a one-hot matrix. Scratch: keys and order of Q·N rows, and at most
Q·N / CHUNK + occupied codes partial sums.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vqkernels.backends.triton.gather import narrowed
from vqkernels.backends.triton.launch import SEPARATE_ROUNDING, interpreted, registers
from vqkernels.backends.triton.residual_rows import code_rows, less
from vqkernels.backends.triton.rows import row_offsets, working
from vqkernels.backends.triton.segment import _first_above
from vqkernels.backends.triton.statistics import CHUNK, CHUNK_TILE
from vqkernels.backends.triton.views import slab, wide


@triton.jit
def residual_partial_kernel(
    z, codebooks, indices, order, offsets, chunk_ends, partials,
    rows, positions, heads, levels, codes, groups, stride_b, stride_h, stride_p, stride_d,
    code_stride_h, code_stride_q, code_stride_k, code_stride_d,
    DIM: tl.constexpr, CHUNK: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, WIDE: tl.constexpr,
    DIFFERENCE: tl.constexpr,
):  # fmt: skip
    """Sum one chunk of r_q, or of e - r_q if DIFFERENCE; arguments as in segment.py."""
    chunk = tl.program_id(0)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    if chunk < tl.load(chunk_ends + groups - 1):
        group = _first_above(chunk_ends, groups, chunk)
        before = tl.load(chunk_ends + group - 1, mask=group > 0, other=0)
        begin = tl.load(offsets + group) + (chunk - before) * CHUNK
        end = tl.minimum(begin + CHUNK, tl.load(offsets + group + 1))
        slice_ = group // codes  # head · Q + level
        head = slice_ // levels
        level = slice_ - head * levels
        z += head.to(tl.int64) * stride_h
        codebooks += head.to(tl.int64) * code_stride_h
        if DIFFERENCE:
            code_at = level.to(tl.int64) * code_stride_q + (group - slice_ * codes).to(tl.int64) * code_stride_k
            own = working(tl.load(codebooks + code_at + d * code_stride_d, mask=d < DIM, other=0.0), True)
        total = tl.zeros((BD,), tl.float64)
        for start in range(0, CHUNK, BM):
            slot = begin + start + tl.arange(0, BM)
            inside = slot < end
            row = tl.load(order + slot, mask=inside, other=0) - slice_.to(tl.int64) * rows  # int64
            row = tl.where(inside, row, 0)
            read = inside[:, None] & (d < DIM)[None, :]
            z_at = row_offsets(row, positions, stride_b, stride_p)[:, None] + d[None, :] * stride_d
            r = working(tl.load(z + z_at, mask=read, other=0.0), WIDE)  # [BM, BD]
            index_at = row_offsets(row, positions, heads * positions, 1) + head.to(tl.int64) * positions
            for earlier in range(level):
                index = tl.load(indices + index_at * levels + earlier, mask=inside, other=0)
                e_at = code_rows(codebooks, earlier, index, code_stride_q, code_stride_k)
                r = less(r, tl.load(e_at + d[None, :] * code_stride_d, mask=read, other=0.0), WIDE)
            x = r.to(tl.float64)
            if DIFFERENCE:
                x = tl.where(read, own[None, :] - x, 0.0)
            total += tl.sum(x, axis=0)
        tl.store(partials + chunk.to(tl.int64) * DIM + d, total, mask=d < DIM)


@triton.jit
def residual_total_kernel(
    partials, chunk_ends, grad_losses, elements, sums, codes,
    DIM: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, SCALED: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Add the chunks of one code in order; SCALED multiplies by the level's grad_loss · 2 / elements."""
    group = tl.program_id(0)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    begin = tl.load(chunk_ends + group - 1, mask=group > 0, other=0)
    end = tl.load(chunk_ends + group)
    total = tl.zeros((BD,), tl.float64)
    for start in range(begin, end, BM):
        chunk = start + tl.arange(0, BM)
        read = (chunk < end)[:, None] & (d < DIM)[None, :]
        total += tl.sum(tl.load(partials + chunk[:, None] * DIM + d[None, :], mask=read, other=0.0), axis=0)
    if SCALED:
        level = group // codes
        total = total * (2.0 * tl.load(grad_losses + level).to(tl.float64) / tl.load(elements + level).to(tl.float64))
        # a code without rows gets 0 even from an infinite or NaN factor
        total = tl.where(end > begin, total, 0.0)
    tl.store(sums + group.to(tl.int64) * DIM + d, narrowed(total, sums.dtype.element_ty, INTERPRETED), mask=d < DIM)


def empty_keys(z: torch.Tensor, levels: int, codebook_size: int) -> torch.Tensor:
    """Room for one sort key per row and level, in the narrowest type."""
    batch, heads, positions, _ = z.shape
    narrow = heads * levels * codebook_size < 2**15
    kind = torch.int16 if narrow else torch.int32
    return torch.empty(heads * levels * batch * positions, dtype=kind, device=z.device)


def residual_sums(
    z: torch.Tensor,
    codebooks: torch.Tensor,
    indices: torch.Tensor,
    keys: torch.Tensor,
    sums: torch.Tensor,
    grad_losses: torch.Tensor | None = None,
    elements: torch.Tensor | None = None,
) -> torch.Tensor:
    """Fill `sums` (H, Q, K, D) with Σ r_q, or given gradients (H, Q) with those · 2 / elements · Σ (e - r_q).

    z (B, H, P, D), codebooks (H, Q, K, D), indices (B, H, P, Q) contiguous, keys from compose_kernel or
    residual_grad_kernel. Returns the counts (H, Q, K) int64.
    """
    batch, heads, positions, dim = z.shape
    levels, codes = codebooks.shape[1:3]
    groups = heads * levels * codes
    sorted_keys, order = torch.sort(keys, stable=True)
    offsets = torch.searchsorted(sorted_keys, torch.arange(groups + 1, dtype=keys.dtype, device=z.device))
    counts = offsets[1:] - offsets[:-1]
    chunk_ends = ((counts + (CHUNK - 1)) // CHUNK).cumsum(0)
    most_chunks = keys.numel() // CHUNK + min(groups, keys.numel())
    partials = torch.empty(most_chunks, dim, dtype=torch.float64, device=z.device)
    block, scaled = slab(dim), grad_losses is not None
    if most_chunks > 0:
        residual_partial_kernel[(most_chunks, triton.cdiv(dim, block))](
            z, codebooks, indices, order, offsets, chunk_ends, partials,
            batch * positions, positions, heads, levels, codes, groups, *z.stride(), *codebooks.stride(),
            DIM=dim, CHUNK=CHUNK, BM=CHUNK_TILE, BD=block, WIDE=wide(z), DIFFERENCE=scaled,
            **registers(True), **SEPARATE_ROUNDING,
        )  # fmt: skip
    if groups > 0:
        residual_total_kernel[(groups, triton.cdiv(dim, block))](
            partials, chunk_ends, grad_losses, elements, sums, codes,
            DIM=dim, BM=CHUNK_TILE, BD=block, SCALED=scaled, INTERPRETED=interpreted(), **SEPARATE_ROUNDING,
        )  # fmt: skip
    return counts.view(heads, levels, codes)
