"""The gradient of residual quantization with respect to z, one pass over the rows.

Fused: the residuals of all levels, recomputed in registers; the straight-through or rotated gradient; the commitment
gradient of every level; the keys of the codebooks' gradient. With r_{q+1} = r_q - sg[e_q] the gradient of level q's
commitment loss is 2 (r_q - e_q) / M_q. Traffic: z twice (once to learn which rows are finite, then from cache), Q codes
per row twice, the incoming gradient and the result once. The rotation turns towards the sum of a row's codes, which is
written to scratch of z's shape and walked over three times, in cache.
A row that is not finite at a level it passes gets NaN and no key from there on; a row that passes no level is never
read and gets 0.
"""

import triton
import triton.language as tl

from vqkernels.backends.triton.gather import narrowed
from vqkernels.backends.triton.residual_rows import code_rows, less, level_index
from vqkernels.backends.triton.rotation import rotation_sums
from vqkernels.backends.triton.rows import row_offsets, working


@triton.jit
def residual_grad_kernel(
    grad_quantized, grad_losses, elements, z, codebooks, indices, sums, grad_z, keys,
    rows, positions, codes, levels, stride_b, stride_h, stride_p, stride_d,
    code_stride_h, code_stride_q, code_stride_k, code_stride_d, grad_stride_b, grad_stride_h, grad_stride_p,
    grad_stride_d, out_stride_b, out_stride_h, out_stride_p, out_stride_d,
    DIM: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, WIDE: tl.constexpr, SUM_WIDE: tl.constexpr,
    EXACT: tl.constexpr, ROTATED: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """grad_losses and elements (H, Q); sums (H, rows, D) is scratch, used if ROTATED; EXACT: arithmetic in float64."""
    head = tl.program_id(1)
    heads = tl.num_programs(1)
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    inside = row < rows
    z += row_offsets(row, positions, stride_b, stride_p)[:, None] + head.to(tl.int64) * stride_h
    grad_z += row_offsets(row, positions, out_stride_b, out_stride_p)[:, None] + head.to(tl.int64) * out_stride_h
    grad_quantized += row_offsets(row, positions, grad_stride_b, grad_stride_p)[:, None]
    grad_quantized += head.to(tl.int64) * grad_stride_h
    indices += (row_offsets(row, positions, heads * positions, 1) + head.to(tl.int64) * positions) * levels
    codebooks += head.to(tl.int64) * code_stride_h
    grad_losses += head * levels
    elements += head * levels
    if ROTATED:
        sums += (head.to(tl.int64) * rows + row)[:, None] * DIM

    live = tl.load(indices, mask=inside & (levels > 0), other=-1) >= 0
    finite_until = tl.full((BM,), 0x7FFFFFFF, tl.int32)  # the first level whose residual or code is not there
    for start in range(0, DIM, BD):
        d = start + tl.arange(0, BD)
        column = (d < DIM)[None, :]
        r = working(tl.load(z + d[None, :] * stride_d, mask=live[:, None] & column, other=0.0), WIDE)  # [BM, BD]
        total = tl.zeros((BM, BD), tl.float64 if SUM_WIDE else tl.float32)
        for level in range(levels):
            index, passed, known = level_index(indices, level, inside, codes)
            read = passed[:, None] & column
            bad = tl.max(tl.where(read & ((tl.abs(r) < float("inf")) == 0), 1, 0), axis=1) > 0
            bad = bad | (passed & (known == 0))
            finite_until = tl.minimum(finite_until, tl.where(bad, level, 0x7FFFFFFF))
            e_at = code_rows(codebooks, level, index, code_stride_q, code_stride_k)
            e = tl.load(e_at + d[None, :] * code_stride_d, mask=known[:, None] & column, other=0.0)
            if ROTATED:
                total = tl.where(read, tl.where(level == 0, working(e, SUM_WIDE), total + working(e, SUM_WIDE)), total)
            r = tl.where(read, less(r, e, WIDE), r)
        if ROTATED:
            tl.store(sums + d[None, :], total, mask=live[:, None] & column)
    poisoned = finite_until < levels

    if ROTATED:
        tl.debug_barrier()  # other threads of the program read what was written
        to_u, to_q, ratio, along_s, along_q, directed = rotation_sums(
            z, sums, grad_quantized, live, stride_d, 1, grad_stride_d, DIM, BM, BD
        )
    for start in range(0, DIM, BD):
        d = start + tl.arange(0, BD)
        column = (d < DIM)[None, :]
        row_read = live[:, None] & column
        r = working(tl.load(z + d[None, :] * stride_d, mask=row_read, other=0.0), WIDE)
        through = working(tl.load(grad_quantized + d[None, :] * grad_stride_d, mask=row_read, other=0.0), EXACT)
        if ROTATED:
            target = working(tl.load(sums + d[None, :], mask=row_read, other=0.0), True)
            u = r.to(tl.float64) * to_u[:, None]
            turned = through - along_s[:, None] * (u + target * to_q[:, None]) + along_q[:, None] * u
            through = tl.where(directed[:, None], ratio[:, None] * turned, through)
        for level in range(levels):
            index, passed, known = level_index(indices, level, inside, codes)
            read = passed[:, None] & column
            e_at = code_rows(codebooks, level, index, code_stride_q, code_stride_k)
            e = tl.load(e_at + d[None, :] * code_stride_d, mask=known[:, None] & column, other=0.0)
            factor = 2.0 * tl.load(grad_losses + level).to(tl.float64) / tl.load(elements + level).to(tl.float64)
            difference = working(r, EXACT) - working(e, EXACT)
            through = tl.where(read, through + working(factor, EXACT) * difference, through)
            r = tl.where(read, less(r, e, WIDE), r)
        gradient = tl.where(row_read, through, 0.0)
        gradient = tl.where(poisoned[:, None], float("nan"), gradient)
        stored = narrowed(gradient, grad_z.dtype.element_ty, INTERPRETED)
        tl.store(grad_z + d[None, :] * out_stride_d, stored, mask=inside[:, None] & column)
    for level in range(levels):
        index, _passed, known = level_index(indices, level, inside, codes)
        group = head * levels + level
        key = tl.where(known & (level < finite_until), group * codes + index.to(tl.int32), heads * levels * codes)
        tl.store(keys + group.to(tl.int64) * rows + row, key.to(keys.dtype.element_ty), mask=inside)
