"""Operands of the entropy kernels: z and the codebook, once, in the layout and type that is multiplied.

Never materialised: anything N x K. Traffic: z and codebook read twice (the second time from cache), their packed copies
written. The copies are contiguous, padded with zeros to whole tiles, and free of NaN, infinity and masked rows, so the
sweeps neither mask nor check:
    rows (H R', D') and codes (H K', D'), in the inputs' own type where both are bf16 or both fp16 (their products are
        exact as they stand), else float32, or float64 where one of the inputs is
    bias (H K',): a code's part of the logit, -‖e‖²/τ or 0, in binary units (times log2 e); NEVER for padding and for
        codes with a NaN or an infinity, so that their probability is 0
    status (H R',): 0 for a masked row (never read) and for padding, 1 for a row that counts, 2 for one with a NaN or an
        infinity
Codes, and for the euclidean metric rows, have a centre subtracted (pack.py, centre_kernel) unless they are 16 bits
wide: the logits of a row change by one constant, which the softmax ignores, and a common offset no longer uses up the
bits.
"""

import triton
import triton.language as tl

from vqkernels.backends.triton.rows import live_rows, row_offsets, working

NEVER = tl.constexpr(-(2.0**120))  # a logit of probability zero that stays finite under addition


@triton.jit
def entropy_rows_kernel(
    z, centre, mask, packed, status,
    rows, padded_rows, positions, stride_b, stride_h, stride_p, stride_d, mask_b, mask_h, mask_p,
    DIM: tl.constexpr, PADDED: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, WIDE: tl.constexpr,
    CENTRED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    live = live_rows(row, rows, positions, mask, head, mask_b, mask_h, mask_p, MASKED)
    z += row_offsets(row, positions, stride_b, stride_p)[:, None] + head.to(tl.int64) * stride_h
    poisoned = tl.zeros((BM,), tl.int32)
    for start in range(0, DIM, BD):
        d = start + tl.arange(0, BD)
        x = tl.load(z + d[None, :] * stride_d, mask=live[:, None] & (d < DIM)[None, :], other=0.0)
        poisoned = tl.maximum(poisoned, tl.max(tl.where(tl.abs(working(x, WIDE)) < float("inf"), 0, 1), axis=1))
    at = head.to(tl.int64) * padded_rows + row
    tl.store(status + at, tl.where(live, 1 + poisoned, 0))
    good = live & (poisoned == 0)
    for start in range(0, PADDED, BD):
        d = start + tl.arange(0, BD)
        read = good[:, None] & (d < DIM)[None, :]
        x = tl.load(z + d[None, :] * stride_d, mask=read, other=0.0)
        if CENTRED:
            x = working(x, WIDE) - working(tl.load(centre + head * PADDED + d), WIDE)[None, :]
            x = tl.where(read, x, 0.0)
        elif x.dtype != packed.dtype.element_ty:
            x = working(x, WIDE)
        tl.store(packed + at[:, None] * PADDED + d[None, :], x)


@triton.jit
def entropy_codes_kernel(
    codebook, centre, scale, packed, bias, codes, padded_codes, stride_h, stride_k, stride_d,
    DIM: tl.constexpr, PADDED: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, WIDE: tl.constexpr,
    CENTRED: tl.constexpr, SQUARED: tl.constexpr,
):  # fmt: skip
    """SQUARED: the metric is euclidean."""
    head = tl.program_id(1)
    k = tl.program_id(0) * BM + tl.arange(0, BM)
    codebook += head.to(tl.int64) * stride_h + k.to(tl.int64)[:, None] * stride_k
    finite = k < codes
    for start in range(0, DIM, BD):
        d = start + tl.arange(0, BD)
        e = tl.load(codebook + d[None, :] * stride_d, mask=(k < codes)[:, None] & (d < DIM)[None, :], other=0.0)
        finite = finite & (tl.max(tl.where(tl.abs(working(e, WIDE)) < float("inf"), 0, 1), axis=1) == 0)
    at = head.to(tl.int64) * padded_codes + k
    squares = tl.zeros((BM,), tl.float64)
    for start in range(0, PADDED, BD):
        d = start + tl.arange(0, BD)
        read = finite[:, None] & (d < DIM)[None, :]
        e = tl.load(codebook + d[None, :] * stride_d, mask=read, other=0.0)
        y = working(e, WIDE)
        if CENTRED:
            y = tl.where(read, y - working(tl.load(centre + head * PADDED + d), WIDE)[None, :], 0.0)
        if packed.dtype.element_ty == e.dtype and not CENTRED:
            tl.store(packed + at[:, None] * PADDED + d[None, :], e)
        else:
            tl.store(packed + at[:, None] * PADDED + d[None, :], y)
        squares += tl.sum(y.to(tl.float64) * y.to(tl.float64), axis=1)
    own = -0.5 * tl.load(scale) * squares if SQUARED else tl.zeros((BM,), tl.float64)
    own = tl.maximum(own, NEVER)
    tl.store(bias + at, tl.where(finite, own, NEVER).to(bias.dtype.element_ty))
