"""Residual quantization, row by row: the elementwise kernels around the searches of its levels.

subtract_kernel writes the residual that the next level searches. compose_kernel takes the indices of all levels and
fuses the sum of the codes, the squared error of every level and the keys of the statistics: it recomputes the residuals
in registers, so z is read once and no residual is written. Traffic: z once, Q codes per row (mostly from cache), the
output once.
Rounding is part of the contract: r_{q+1} = r_q - e in r's type and e_0 + e_1 + ... in level order are each rounded
separately; the kernels are compiled with enable_fp_fusion=False, and nothing but loads enters these sums.
A residual is finite or not for good: what is subtracted from an infinity leaves an infinity or a NaN. So one number per
row, the first level whose residual is not finite, says at which levels the row counts.
"""

import triton
import triton.language as tl

from vqkernels.backends.triton.gather import narrowed
from vqkernels.backends.triton.rows import row_offsets, working


@triton.jit
def less(r, e, WIDE: tl.constexpr):
    """r - e, rounded once to r's type: float64 if WIDE, else float32. A float64 code is subtracted in float64."""
    if WIDE:
        return r - working(e, True)
    elif e.dtype == tl.float64:
        return (r.to(tl.float64) - e).to(tl.float32)
    else:
        return r - working(e, False)


@triton.jit
def level_index(indices, level, inside, codes):
    """([BM] code, passed, known): -1 is a level not passed, `codes` and more an index that the codebook has not."""
    index = tl.load(indices + level, mask=inside, other=-1)
    passed = index >= 0
    known = passed & (index < codes)
    return tl.where(known, index, 0), passed, known


@triton.jit
def code_rows(codebooks, level, index, stride_q, stride_k):
    """[BM, 1] pointers to the codes of one level; `codebooks` points at the head."""
    return codebooks + (index * stride_k + level * (stride_q + tl.zeros((), tl.int64)))[:, None]


@triton.jit
def subtract_kernel(
    source, codebook, indices, target,
    rows, positions, stride_b, stride_h, stride_p, stride_d, code_stride_h, code_stride_k, code_stride_d,
    target_b, target_h, target_p, target_d,
    DIM: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """target = source - code, where the row has passed the level; other rows are neither read nor written."""
    head = tl.program_id(1)
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    inside = row < rows
    source += row_offsets(row, positions, stride_b, stride_p)[:, None] + head.to(tl.int64) * stride_h
    target += row_offsets(row, positions, target_b, target_p)[:, None] + head.to(tl.int64) * target_h
    index_at = row_offsets(row, positions, tl.num_programs(1) * positions, 1) + head.to(tl.int64) * positions
    index = tl.load(indices + index_at, mask=inside, other=-1)
    passed = index >= 0
    codebook += head.to(tl.int64) * code_stride_h + tl.where(passed, index, 0)[:, None] * code_stride_k
    for start in range(0, DIM, BD):
        d = start + tl.arange(0, BD)
        read = passed[:, None] & (d < DIM)[None, :]
        r = working(tl.load(source + d[None, :] * stride_d, mask=read, other=0.0), WIDE)  # [BM, BD]
        e = tl.load(codebook + d[None, :] * code_stride_d, mask=read, other=0.0)
        tl.store(target + d[None, :] * target_d, less(r, e, WIDE), mask=read)


@triton.jit
def compose_kernel(
    z, codebooks, indices, out, partial_errors, keys,
    rows, positions, codes, levels, stride_b, stride_h, stride_p, stride_d,
    code_stride_h, code_stride_q, code_stride_k, code_stride_d, out_stride_b, out_stride_h, out_stride_p, out_stride_d,
    DIM: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, WIDE: tl.constexpr, SUM_WIDE: tl.constexpr,
    KEYS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """indices (B, H, P, Q) contiguous. partial_errors (H, Q, programs, slabs): a program's share of each slab of
    channels. keys (H, Q, rows): (head · Q + level) · K + index, and H · Q · K where the row does not count."""
    head = tl.program_id(1)
    heads = tl.num_programs(1)
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    inside = row < rows
    z += row_offsets(row, positions, stride_b, stride_p)[:, None] + head.to(tl.int64) * stride_h
    out += row_offsets(row, positions, out_stride_b, out_stride_p)[:, None] + head.to(tl.int64) * out_stride_h
    index_at = row_offsets(row, positions, heads * positions, 1) + head.to(tl.int64) * positions
    indices += index_at * levels
    codebooks += head.to(tl.int64) * code_stride_h
    slabs: tl.constexpr = (DIM + BD - 1) // BD
    partial_errors += (head * levels * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * slabs

    live = tl.load(indices, mask=inside & (levels > 0), other=-1) >= 0
    finite_until = tl.full((BM,), 0x7FFFFFFF, tl.int32)  # the first level whose residual is not finite
    for slab in range(slabs):
        d = slab * BD + tl.arange(0, BD)
        column = (d < DIM)[None, :]
        r = working(tl.load(z + d[None, :] * stride_d, mask=live[:, None] & column, other=0.0), WIDE)  # [BM, BD]
        total = tl.zeros((BM, BD), tl.float64 if SUM_WIDE else tl.float32)
        for level in range(levels):
            index, passed, known = level_index(indices, level, inside, codes)
            read = passed[:, None] & column
            bad = tl.max(tl.where(read & ((tl.abs(r) < float("inf")) == 0), 1, 0), axis=1) > 0
            finite_until = tl.minimum(finite_until, tl.where(bad, level, 0x7FFFFFFF))
            e_at = code_rows(codebooks, level, index, code_stride_q, code_stride_k)
            e = tl.load(e_at + d[None, :] * code_stride_d, mask=known[:, None] & column, other=0.0)
            difference = tl.where(read, r.to(tl.float64) - working(e, True), 0.0)
            error = tl.sum(difference * difference, axis=1)
            error = tl.where(bad | (passed & (known == 0)), float("nan"), error)
            error_at = level * (tl.num_programs(0).to(tl.int64) * slabs) + slab
            tl.store(partial_errors + error_at, tl.sum(error, axis=0))
            code = tl.where((passed & (known == 0))[:, None], float("nan"), working(e, SUM_WIDE))
            total = tl.where(read, tl.where(level == 0, code, total + code), total)
            r = tl.where(read, less(r, e, WIDE), r)
        stored = narrowed(total, out.dtype.element_ty, INTERPRETED)
        tl.store(out + d[None, :] * out_stride_d, stored, mask=inside[:, None] & column)
    if KEYS:
        for level in range(levels):
            index, _passed, known = level_index(indices, level, inside, codes)
            group = head * levels + level
            counted = known & (level < finite_until)
            key = tl.where(counted, group * codes + index.to(tl.int32), heads * levels * codes)
            tl.store(keys + group.to(tl.int64) * rows + row, key.to(keys.dtype.element_ty), mask=inside)
