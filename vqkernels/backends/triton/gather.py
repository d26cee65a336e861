"""Lookup, residual and their gradient: the elementwise kernels around the search.

gather_kernel fuses lookup, output in z's type and layout, squared error and the keys of the statistics.
grad_kernel fuses the straight-through or rotated gradient, the commitment gradient and the keys of the codebook's
gradient. Neither materialises e[index] or z - e. Traffic: z once, the chosen codes (mostly from cache), the output
once; the rotation walks over its rows four times, in cache.
A poisoned row (NaN or infinity) gives output code 0, squared error NaN, gradient NaN and no key; a masked row is never
read and gives output 0, gradient 0, no key. The key of a row is head · K + index, and heads · K for a row that counts
nowhere, so that sorting keys puts the rows of one code together and the others last.
"""

import triton
import triton.language as tl

from vqkernels.backends.triton.rotation import rotation_sums
from vqkernels.backends.triton.rows import live_rows, row_offsets, working


@triton.jit
def narrowed(x, TYPE: tl.constexpr, INTERPRETED: tl.constexpr):
    """x in the type to be stored. Triton's interpreter truncates to bf16 instead of rounding to even: done by hand."""
    if INTERPRETED and TYPE == tl.bfloat16:
        bits = x.to(tl.float32).to(tl.int32, bitcast=True)
        bits = tl.where(x == x, bits + 0x7FFF + ((bits >> 16) & 1), 0x7FC00000)
        return (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    elif TYPE == tl.float64:
        return x.to(tl.float64)
    else:
        return x.to(tl.float32).to(TYPE)


@triton.jit
def poisoned_rows(
    z, live, stride_d, DIM: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """[BM] True where a live row holds a NaN or an infinity; z points at the rows, [BM, 1]."""
    bad = tl.zeros((BM,), tl.int32)
    for start in range(0, DIM, BD):
        d = start + tl.arange(0, BD)
        x = tl.load(z + d[None, :] * stride_d, mask=live[:, None] & (d < DIM)[None, :], other=0.0)
        bad = tl.maximum(bad, tl.max(tl.where(tl.abs(working(x, WIDE)) < float("inf"), 0, 1), axis=1))
    return bad > 0


@triton.jit
def gather_kernel(
    z, codebook, indices, out, partial_error, keys,
    rows, positions, codes, stride_b, stride_h, stride_p, stride_d, code_stride_h, code_stride_k, code_stride_d,
    out_stride_b, out_stride_h, out_stride_p, out_stride_d,
    DIM: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, WIDE: tl.constexpr, KEYS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """An index of -1 marks a masked row, one of `codes` or more a poisoned row whose code is NaN."""
    head = tl.program_id(1)
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    inside = row < rows
    z += row_offsets(row, positions, stride_b, stride_p)[:, None] + head.to(tl.int64) * stride_h
    out += row_offsets(row, positions, out_stride_b, out_stride_p)[:, None] + head.to(tl.int64) * out_stride_h
    index_at = row_offsets(row, positions, tl.num_programs(1) * positions, 1) + head.to(tl.int64) * positions
    index = tl.load(indices + index_at, mask=inside, other=-1)  # [BM]
    live = index >= 0
    known = live & (index < codes)
    index = tl.where(known, index, 0)
    codebook += head.to(tl.int64) * code_stride_h + index[:, None] * code_stride_k

    error = tl.zeros((BM,), tl.float64 if WIDE else tl.float32)
    bad = poisoned_rows(z, live, stride_d, DIM, BM, BD, WIDE) | (live & (known == 0))
    for start in range(0, DIM, BD):
        d = start + tl.arange(0, BD)
        read = live[:, None] & (d < DIM)[None, :]
        e = working(tl.load(codebook + d[None, :] * code_stride_d, mask=read, other=0.0), WIDE)  # [BM, BD]
        e = tl.where((live & (known == 0))[:, None], float("nan"), e)
        x = working(tl.load(z + d[None, :] * stride_d, mask=read, other=0.0), WIDE)
        stored = narrowed(e, out.dtype.element_ty, INTERPRETED)
        tl.store(out + d[None, :] * out_stride_d, stored, mask=inside[:, None] & (d < DIM)[None, :])
        residual = x - e
        error += tl.sum(residual * residual, axis=1)
    error = tl.where(bad, float("nan"), error)
    at = head * tl.num_programs(0) + tl.program_id(0)
    tl.store(partial_error + at, tl.sum(error, axis=0).to(tl.float64))
    if KEYS:
        counted = live & (bad == 0)
        key = tl.where(counted, head * codes + index.to(tl.int32), tl.num_programs(1) * codes)
        tl.store(keys + head.to(tl.int64) * rows + row, key.to(keys.dtype.element_ty), mask=inside)


@triton.jit
def key_kernel(
    z, indices, mask, keys,
    rows, positions, codes, stride_b, stride_h, stride_p, stride_d, mask_b, mask_h, mask_p,
    DIM: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, WIDE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The keys alone, for statistics of rows whose indices were found earlier."""
    head = tl.program_id(1)
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    live = live_rows(row, rows, positions, mask, head, mask_b, mask_h, mask_p, MASKED)
    z += row_offsets(row, positions, stride_b, stride_p)[:, None] + head.to(tl.int64) * stride_h
    index_at = row_offsets(row, positions, tl.num_programs(1) * positions, 1) + head.to(tl.int64) * positions
    index = tl.load(indices + index_at, mask=live, other=-1)
    counted = (index >= 0) & (index < codes)
    counted = counted & (poisoned_rows(z, counted, stride_d, DIM, BM, BD, WIDE) == 0)
    key = tl.where(counted, head * codes + index.to(tl.int32), tl.num_programs(1) * codes)
    tl.store(keys + head.to(tl.int64) * rows + row, key.to(keys.dtype.element_ty), mask=row < rows)


@triton.jit
def grad_kernel(
    grad_quantized, grad_loss, elements, z, codebook, indices, grad_z, keys,
    rows, positions, codes, stride_b, stride_h, stride_p, stride_d, code_stride_h, code_stride_k, code_stride_d,
    grad_stride_b, grad_stride_h, grad_stride_p, grad_stride_d,
    out_stride_b, out_stride_h, out_stride_p, out_stride_d,
    DIM: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, WIDE: tl.constexpr, ROTATED: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """grad_z = grad_quantized + grad_loss · 2 (z - e) / elements; indices as in gather_kernel.

    ROTATED (which needs WIDE) replaces grad_quantized g by ratio (g - along_s s + along_q u), see rotation.py.
    """
    head = tl.program_id(1)
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    inside = row < rows
    z += row_offsets(row, positions, stride_b, stride_p)[:, None] + head.to(tl.int64) * stride_h
    grad_z += row_offsets(row, positions, out_stride_b, out_stride_p)[:, None] + head.to(tl.int64) * out_stride_h
    index_at = row_offsets(row, positions, tl.num_programs(1) * positions, 1) + head.to(tl.int64) * positions
    index = tl.load(indices + index_at, mask=inside, other=-1)
    live = index >= 0
    known = live & (index < codes)
    index = tl.where(known, index, 0)
    codebook += head.to(tl.int64) * code_stride_h + index[:, None] * code_stride_k
    grad_quantized += row_offsets(row, positions, grad_stride_b, grad_stride_p)[:, None]
    grad_quantized += head.to(tl.int64) * grad_stride_h
    factor = working(2.0 * tl.load(grad_loss).to(tl.float64) / tl.load(elements).to(tl.float64), WIDE)

    bad = poisoned_rows(z, live, stride_d, DIM, BM, BD, WIDE) | (live & (known == 0))
    if ROTATED:
        to_u, to_q, ratio, along_s, along_q, directed = rotation_sums(
            z, codebook, grad_quantized, live, stride_d, code_stride_d, grad_stride_d, DIM, BM, BD
        )
    for start in range(0, DIM, BD):
        d = start + tl.arange(0, BD)
        read = live[:, None] & (d < DIM)[None, :]
        x = working(tl.load(z + d[None, :] * stride_d, mask=read, other=0.0), WIDE)  # [BM, BD]
        e = working(tl.load(codebook + d[None, :] * code_stride_d, mask=read, other=0.0), WIDE)
        through = working(tl.load(grad_quantized + d[None, :] * grad_stride_d, mask=read, other=0.0), WIDE)
        if ROTATED:
            u = x * to_u[:, None]
            turned = through - along_s[:, None] * (u + e * to_q[:, None]) + along_q[:, None] * u
            through = tl.where(directed[:, None], ratio[:, None] * turned, through)
        gradient = tl.where(read, through + factor * (x - e), 0.0)
        gradient = tl.where(bad[:, None], float("nan"), gradient)
        stored = narrowed(gradient, grad_z.dtype.element_ty, INTERPRETED)
        tl.store(grad_z + d[None, :] * out_stride_d, stored, mask=inside[:, None] & (d < DIM)[None, :])
    key = tl.where(live & (bad == 0), head * codes + index.to(tl.int32), tl.num_programs(1) * codes)
    tl.store(keys + head.to(tl.int64) * rows + row, key.to(keys.dtype.element_ty), mask=inside)
