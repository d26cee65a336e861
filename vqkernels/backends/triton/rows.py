"""Rounding the rows: z becomes the left operand of the candidate pass.

Fused: addressing by four strides, centring, a power-of-two scale per row, rounding to fp16, and the two norms that the
certificate needs. z is read once from memory (a second time from cache when D > 128) and never copied in its own type.
Traffic per row: D elements of z in, 2·D' bytes and three floats out (D' is D padded).

Units. `2^c` is the scale of the packed codes (pack.py). A row is stored as q = fp16(2^r (z - centre)) with r such that
max|q| lies in [2^10, 2^11); then beta = 2^(c - r) takes q back to code units, and with exact arithmetic beta·q would be
2^c (z - centre). All results are in code units:
    norm  >= ‖beta·q‖                    error >= ‖beta·q - 2^c (z - centre)‖
`error` is measured, not estimated. Its slack covers the fp32 subtraction of the centre (2^-24 of each element), the
fp32 sum of squares (a relative D'·2^-24) and the approximate square root. norm = NaN marks a row with a NaN or an
infinity, norm = -1 a masked row (never read), error = inf a row out of the range of fp32 arithmetic: nothing can be
proved about it, so the float64 kernel decides. So it is with rows of norm + error above 2^9 where codes were left out.
"""

import triton
import triton.language as tl

STATE = tl.constexpr(8)  # int32 numbers per head, see pack.py


@triton.jit
def row_offsets(row, positions, stride_b, stride_p):
    """Offset of row number `row` of one head: row = batch · positions + position. int64, since N·D may pass 2^31."""
    batch = row // positions
    position = row - batch * positions
    return batch.to(tl.int64) * stride_b + position.to(tl.int64) * stride_p


@triton.jit
def live_rows(row, rows, positions, mask, head, mask_b, mask_h, mask_p, MASKED: tl.constexpr):
    """True where the row exists and is not masked."""
    live = row < rows
    if MASKED:
        at = row_offsets(row, positions, mask_b, mask_p) + head.to(tl.int64) * mask_h
        live = live & (tl.load(mask + at, mask=live, other=0).to(tl.int32) != 0)
    return live


@triton.jit
def working(x, WIDE: tl.constexpr):
    """The stored value, exactly, in the type that arithmetic works in: float64 if WIDE, else float32."""
    if x.dtype == tl.bfloat16:  # by its bits: Triton's interpreter flushes subnormal bf16 numbers to zero
        x = (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    if WIDE:
        return x.to(tl.float64)
    else:
        return x.to(tl.float32)


@triton.jit
def binary_exponent(x, WIDE: tl.constexpr):
    """floor(log2 x) of a positive normal number, from its bits."""
    if WIDE:
        return ((x.to(tl.int64, bitcast=True) >> 52) & 2047).to(tl.int32) - 1023
    else:
        return ((x.to(tl.int32, bitcast=True) >> 23) & 255) - 127


@triton.jit
def power_of_two(exponent, WIDE: tl.constexpr):
    """2^exponent, exactly; the exponent must be that of a normal number."""
    if WIDE:
        return ((exponent.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)
    else:
        return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def code_units(state):
    """(exponent of the largest packed element, whether codes are left out): code units are 2^(10 - exponent).

    Codes of norm 2^11 code units and more are left out where some are that much longer than most rows and another is
    not (pack.py).
    """
    largest = tl.load(state)
    sampled = tl.load(state + 3)  # most sampled rows have a norm below 2^(sampled + 1)
    cut = (largest >= sampled + 4) & (tl.load(state + 4) <= sampled + 1) & (sampled > -100) & (sampled < 100)
    return tl.where(cut, sampled + 3, largest), cut


@triton.jit
def row_scale(largest, poisoned, state, WIDE: tl.constexpr):
    """(2^r, beta, fits, cut) of rows whose largest element is known; fits: their arithmetic stays in range."""
    exponent = binary_exponent(largest, WIDE)
    fits = (exponent < 120) & (poisoned == 0)
    # 2^(10 - r): at least -116, so that the scale stays a normal fp32 number; smaller rows just use fewer bits
    exponent = tl.minimum(tl.maximum(exponent, -116), 120)
    scale = power_of_two(10 - exponent, WIDE)
    code_exponent, cut = code_units(state)
    code_exponent = tl.minimum(10 - code_exponent, 126)  # c
    shift = code_exponent + exponent - 10
    fits = fits & (shift < 40)
    # below 2^-126 the row is nothing beside the codes; the flat 2^-40 of the certificate covers the difference
    beta = power_of_two(tl.minimum(tl.maximum(shift, -126), 40), False)
    return scale, beta, fits, cut


@triton.jit
def row_bounds(squares, residual, beta, fits, cut, PADDED: tl.constexpr):
    """(norm, error) in code units, from the sums of q² and of (2^r (z - centre) - q)²."""
    slack: tl.constexpr = 1.0 + (PADDED + 8) * 2.0**-22
    norm = tl.sqrt(squares) * slack
    error = tl.sqrt(residual) * slack + norm * 2.0**-22 + 2.0**-40
    norm = norm * beta
    error = tl.where(fits, error * beta, float("inf"))
    # a row this long may be near a code that was left out
    return norm, tl.where(cut & (norm + error > 512.0), float("inf"), error)


@triton.jit
def pack_rows_kernel(
    z, centre, state, mask, packed, beta_out, norm_out, error_out,
    rows, padded_rows, positions, stride_b, stride_h, stride_p, stride_d, mask_b, mask_h, mask_p,
    DIM: tl.constexpr, PADDED: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr,
    WIDE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    live = live_rows(row, rows, positions, mask, head, mask_b, mask_h, mask_p, MASKED)
    z += row_offsets(row, positions, stride_b, stride_p)[:, None] + head.to(tl.int64) * stride_h
    centre += head * PADDED

    largest = tl.zeros((BM,), tl.float64 if WIDE else tl.float32)
    poisoned = tl.zeros((BM,), tl.int32)
    for start in tl.static_range(0, PADDED, BD):
        d = start + tl.arange(0, BD)
        stored = tl.load(z + d[None, :] * stride_d, mask=live[:, None] & (d < DIM)[None, :], other=0.0)
        x = working(stored, WIDE)  # [BM, BD]
        finite = tl.abs(x) < float("inf")
        x = tl.where(finite, x - working(tl.load(centre + d), WIDE)[None, :], 0.0)
        x = tl.where(live[:, None] & (d < DIM)[None, :], x, 0.0)
        poisoned = tl.maximum(poisoned, tl.max(tl.where(finite, 0, 1), axis=1))
        largest = tl.maximum(largest, tl.max(tl.abs(x), axis=1))

    scale, beta, fits, cut = row_scale(largest, poisoned, state + head * STATE, WIDE)
    squares = tl.zeros((BM,), tl.float32)
    residual = tl.zeros((BM,), tl.float32)
    out = packed + (head.to(tl.int64) * padded_rows + row)[:, None] * PADDED
    for start in tl.static_range(0, PADDED, BD):
        d = start + tl.arange(0, BD)
        stored = tl.load(z + d[None, :] * stride_d, mask=live[:, None] & (d < DIM)[None, :], other=0.0)
        x = (working(stored, WIDE) - working(tl.load(centre + d), WIDE)[None, :]) * scale[:, None]
        x = tl.where((live & fits)[:, None] & (d < DIM)[None, :], x, 0.0).to(tl.float32)
        q = x.to(tl.float16)
        tl.store(out + d[None, :], q, mask=(row < padded_rows)[:, None])
        rounded = q.to(tl.float32)
        squares += tl.sum(rounded * rounded, axis=1)
        residual += tl.sum((x - rounded) * (x - rounded), axis=1)  # the difference is exact in fp32

    norm, error = row_bounds(squares, residual, beta, fits, cut, PADDED)
    norm = tl.where(poisoned > 0, float("nan"), norm)
    norm = tl.where(live, norm, -1.0)
    at = head.to(tl.int64) * padded_rows + row
    tl.store(beta_out + at, tl.where(live & fits, beta, 0.0), mask=row < padded_rows)
    tl.store(norm_out + at, norm, mask=row < padded_rows)
    tl.store(error_out + at, error, mask=row < padded_rows)
