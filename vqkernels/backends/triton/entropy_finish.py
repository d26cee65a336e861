"""The last step of the entropy gradients: partial sums of the splits, in order, in float64, to the tensors asked for.

Traffic: the partial sums once (splits x vectors x D), the results once. A masked row gets exactly 0, a row with a NaN
or an infinity NaN, a code with one 0, whatever the incoming gradients are.
"""

import triton
import triton.language as tl

from vqkernels.backends.triton.entropy_pack import NEVER
from vqkernels.backends.triton.gather import narrowed
from vqkernels.backends.triton.rows import row_offsets, working


@triton.jit
def row_finish_kernel(
    partial, factor, status, entropy, grad_z,
    rows, padded_rows, positions, splits, stride_b, stride_h, stride_p, stride_d,
    DIM: tl.constexpr, PADDED: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    inside = row < rows
    scaled = tl.load(factor + head)
    kind = tl.load(status + head.to(tl.int64) * padded_rows + row, mask=inside, other=0)
    own = tl.load(entropy + head.to(tl.int64) * rows + row, mask=inside, other=0.0)
    bad = (kind == 2) | (own != own)
    grad_z += row_offsets(row, positions, stride_b, stride_p)[:, None] + head.to(tl.int64) * stride_h
    for start in range(0, DIM, BD):
        d = start + tl.arange(0, BD)
        read = (kind == 1)[:, None] & (d < DIM)[None, :]
        total = tl.zeros((BM, BD), tl.float64)
        for split in range(splits):
            at = (split * tl.num_programs(1) + head).to(tl.int64) * padded_rows + row
            total += tl.load(partial + at[:, None] * PADDED + d[None, :], mask=read, other=0.0).to(tl.float64)
        total = tl.where(read, total * scaled, 0.0)
        total = tl.where(bad[:, None], float("nan"), total)
        stored = narrowed(total, grad_z.dtype.element_ty, INTERPRETED)
        tl.store(grad_z + d[None, :] * stride_d, stored, mask=inside[:, None] & (d < DIM)[None, :])


@triton.jit
def code_finish_kernel(
    partial, sums, factor, codes_packed, bias, grad_codebook, codes, padded_codes, splits,
    DIM: tl.constexpr, PADDED: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, SQUARED: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """SQUARED: the metric is euclidean, and each code's own part Σ G e is taken off."""
    head = tl.program_id(1)
    k = tl.program_id(0) * BM + tl.arange(0, BM)
    inside = k < codes
    scaled = tl.load(factor + head)
    own = head.to(tl.int64) * padded_codes + k
    counts = inside & (tl.load(bias + own) > 0.5 * NEVER)
    gathered = tl.zeros((BM,), tl.float64)
    if SQUARED:
        for split in range(splits):
            at = (split * tl.num_programs(1) + head).to(tl.int64) * padded_codes + k
            gathered += tl.load(sums + at, mask=counts, other=0.0).to(tl.float64)
    out = grad_codebook + (head.to(tl.int64) * codes + k)[:, None] * DIM
    for start in range(0, DIM, BD):
        d = start + tl.arange(0, BD)
        read = counts[:, None] & (d < DIM)[None, :]
        total = tl.zeros((BM, BD), tl.float64)
        for split in range(splits):
            at = (split * tl.num_programs(1) + head).to(tl.int64) * padded_codes + k
            total += tl.load(partial + at[:, None] * PADDED + d[None, :], mask=read, other=0.0).to(tl.float64)
        if SQUARED:
            e = working(tl.load(codes_packed + own[:, None] * PADDED + d[None, :], mask=read, other=0.0), True)
            total = total - gathered[:, None] * e
        total = tl.where(read, total * scaled, 0.0)
        stored = narrowed(total, grad_codebook.dtype.element_ty, INTERPRETED)
        tl.store(out + d[None, :], stored, mask=inside[:, None] & (d < DIM)[None, :])
