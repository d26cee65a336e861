"""Preparing the codebook: e becomes the right operand of the candidate pass.

Three small launches over K·D elements, all arithmetic in float64: the centre, the common exponent, the packed codes.
Results per head, in code units (2^c (e - centre), c an integer):
    packed (K', D') fp16 with zeros as padding
    half_norms (K',) fp32: ½‖packed‖² (0 for the dot product and cosine), +inf for padding, for codes with a NaN or an
        infinity and for codes that repeat an earlier one, so none of them is ever chosen
    state = [exponent of the largest element, radius >= max‖packed‖, spread >= max‖packed - 2^c (e - centre)‖,
        exponent of the length of most rows, exponent of the shortest code, unused ...]: int32, radius and spread as
        fp32 bits, so that an integer maximum or minimum combines them in any order with one result

The centre is the mean of the first 512 codes, without those farther than three standard deviations in a channel, taken
three times. Any vector is valid: distances do not depend on it, and the rounding it causes is measured. It removes a
common offset, which would otherwise use up the bits. The dot product is not centred, nor are 16-bit inputs (their
products are exact as they stand). Cosine packs e/‖e‖, zero codes as zero.

Repeated codes. Of equal codes the contract takes the first, so the others need not compete; if they did, no row near
them could be decided. Every code claims a slot of a hash table, lowest index first; a code that equals the code in its
slot is a repetition. One whose slot went to another code goes unnoticed, which is safe and rare.

Codes left out. One huge code would set the scale, radius and spread of all. As many rows are sampled as there are
codes; of each 64 at least 56 are shorter than 2^(s+1) around the centre. If there are elements of 2^(s+4) and more, and
a code no longer than 2^(s+2), then c = 7 - s, and codes of norm >= 2^11 in code units are left out: packed as zero with
half_norm ¼‖y‖², rounded down, y = 2^c (e - centre). That is a lower bound of ½‖y‖² - x·y, and of the same with the
row's image X, for every row with norm + error <= 2^9 (rows.py makes longer rows undecidable), since then
x·y <= 2^9‖y‖ <= ¼‖y‖²; margin.py shows that a lower bound is all it takes. It is never the lowest score: a code of norm
r <= 2^9 has a score of at most ½r² + 2^9 r < 2^19, one left out has nearly 2^20 or more. Without such a gap between
codes and rows nothing is left out, nor for precision="fast", which has no float64 for rows near those codes.
Codes beyond fp32's comfortable range set the radius to infinity: nothing can then be proved and float64 decides.
"""

import triton
import triton.language as tl

from vqkernels.backends.triton.rows import (
    STATE,
    binary_exponent,
    code_units,
    live_rows,
    power_of_two,
    row_offsets,
    working,
)


@triton.jit
def centre_kernel(
    codebook, centre, state, codes, stride_h, stride_k, stride_d,
    DIM: tl.constexpr, PADDED: tl.constexpr, BD: tl.constexpr, SAMPLE: tl.constexpr,
    CENTRED: tl.constexpr, METRIC: tl.constexpr,
):  # fmt: skip
    """The centre (zero unless CENTRED) and the first values of `state`."""
    head = tl.program_id(1)
    if tl.program_id(0) == 0:
        slot = tl.arange(0, STATE)
        # unit codes have elements up to 1 = 2^0
        first = tl.where(slot == 3, -1023, tl.where(slot == 4, 1023, 0))
        tl.store(state + head * STATE + slot, tl.where((slot == 0) & (METRIC != "cosine"), -1023, first))
    d = tl.program_id(0) * BD + tl.arange(0, BD)
    mean = tl.zeros((BD,), tl.float64)
    if CENTRED:
        sample = tl.minimum(codes, SAMPLE)
        reach = tl.full((BD,), 2.0**100, tl.float64)
        for _attempt in range(3):
            count = tl.zeros((BD,), tl.float64)
            total = tl.zeros((BD,), tl.float64)
            squares = tl.zeros((BD,), tl.float64)
            for start in range(0, sample, 32):
                k = start + tl.arange(0, 32)
                at = head.to(tl.int64) * stride_h + k.to(tl.int64)[:, None] * stride_k + d[None, :] * stride_d
                inside = (k < sample)[:, None] & (d < DIM)[None, :]
                e = working(tl.load(codebook + at, mask=inside, other=0.0), True)
                e = e - mean[None, :]
                near = inside & (tl.abs(e) <= reach[None, :])
                e = tl.where(near, e, 0.0)
                count += tl.sum(near.to(tl.float64), axis=0)
                total += tl.sum(e, axis=0)
                squares += tl.sum(e * e, axis=0)
            count = tl.maximum(count, 1.0)
            shift = total / count
            mean = mean + shift
            reach = 3.0 * tl.sqrt(tl.maximum(squares / count - shift * shift, 0.0))
    tl.store(centre + head * PADDED + d, mean.to(tl.float32), mask=d < PADDED)


@triton.jit
def _mixed(e, d):
    """A number per code and channel whose sum over channels, wrapping, is the code's hash."""
    bits = (e + 0.0).to(tl.int64, bitcast=True)  # -0 equals 0
    bits = bits ^ (bits >> 29)
    return bits * ((2 * d + 1).to(tl.int64) * 0x3C6EF372FE94F82B + 0x1F83D9ABFB41BD6A)[None, :]


@triton.jit
def _slot(hashed, slots):
    """A slot of the table; `slots` is a power of two."""
    return ((hashed ^ (hashed >> 32)) >> 7).to(tl.int32) & (slots - 1)


@triton.jit
def extent_kernel(
    z, codebook, centre, mask, state, table, codes, slots, stride_h, stride_k, stride_d,
    rows, positions, row_stride_b, row_stride_h, row_stride_p, row_stride_d, mask_b, mask_h, mask_p,
    DIM: tl.constexpr, PADDED: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr, METRIC: tl.constexpr,
    MASKED: tl.constexpr, SAMPLED: tl.constexpr,
):  # fmt: skip
    """Exponents of the largest element and shortest code over the finite codes, centred; of the rows' lengths; and the
    claims of slots. Of 64 rows, eight may be longer than what they report."""
    head = tl.program_id(1)
    state += head * STATE
    centre += head * PADDED
    k = tl.program_id(0) * BK + tl.arange(0, BK)
    at = codebook + head.to(tl.int64) * stride_h + k.to(tl.int64)[:, None] * stride_k
    largest = tl.zeros((BK,), tl.float64)
    length = tl.zeros((BK,), tl.float64)
    hashed = tl.zeros((BK,), tl.int64)
    finite = k < codes
    for start in range(0, DIM, BD):
        d = start + tl.arange(0, BD)
        inside = (k < codes)[:, None] & (d < DIM)[None, :]
        e = working(tl.load(at + d[None, :] * stride_d, mask=inside, other=0.0), True)
        finite = finite & (tl.max(tl.where(tl.abs(e) < float("inf"), 0, 1), axis=1) == 0)
        hashed += tl.sum(tl.where(inside, _mixed(e, d), 0), axis=1)
        if METRIC != "cosine":
            y = e - tl.load(centre + d, mask=d < DIM, other=0.0).to(tl.float64)[None, :]
            y = tl.where(inside, y, 0.0)
            largest = tl.maximum(largest, tl.max(tl.abs(y), axis=1))
            length += tl.sum(y * y, axis=1)
    tl.atomic_min(table + head.to(tl.int64) * slots + _slot(hashed, slots), k, mask=finite)
    if METRIC != "cosine":
        tl.atomic_max(state, tl.max(tl.where(finite, binary_exponent(largest, True), -1023), axis=0))
    if SAMPLED:
        tl.atomic_min(state + 4, tl.min(tl.where(finite, binary_exponent(length, True) >> 1, 1023), axis=0))
        row = (k.to(tl.int64) * rows // (tl.num_programs(0) * BK)).to(tl.int32)
        live = live_rows(row, rows, positions, mask, head, mask_b, mask_h, mask_p, MASKED)
        z += row_offsets(row, positions, row_stride_b, row_stride_p)[:, None] + head.to(tl.int64) * row_stride_h
        length = tl.zeros((BK,), tl.float64)
        for start in range(0, DIM, BD):
            d = start + tl.arange(0, BD)
            inside = live[:, None] & (d < DIM)[None, :]
            x = working(tl.load(z + d[None, :] * row_stride_d, mask=inside, other=0.0), True)
            x = x - tl.load(centre + d, mask=d < DIM, other=0.0).to(tl.float64)[None, :]
            length += tl.sum(tl.where(inside, x * x, 0.0), axis=1)
        length = tl.where(length < float("inf"), length, 0.0)  # a poisoned row says nothing
        exponent = binary_exponent(length, True) >> 1
        longer = tl.sum((exponent[None, :] > exponent[:, None]).to(tl.int32), axis=1)
        tl.atomic_max(state + 3, tl.min(tl.where(longer <= BK // 8, exponent, 1023), axis=0))


@triton.jit
def pack_codes_kernel(
    codebook, centre, state, table, packed, half_norms, codes, padded_codes, slots, stride_h, stride_k, stride_d,
    DIM: tl.constexpr, PADDED: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr, METRIC: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    k = tl.program_id(0) * BK + tl.arange(0, BK)
    at = codebook + head.to(tl.int64) * stride_h + k.to(tl.int64)[:, None] * stride_k
    centre += head * PADDED
    state += head * STATE

    finite = k < codes
    length = tl.zeros((BK,), tl.float64)
    hashed = tl.zeros((BK,), tl.int64)
    for start in range(0, DIM, BD):
        d = start + tl.arange(0, BD)
        e = tl.load(at + d[None, :] * stride_d, mask=(k < codes)[:, None] & (d < DIM)[None, :], other=0.0)
        e = working(e, True)
        finite = finite & (tl.max(tl.where(tl.abs(e) < float("inf"), 0, 1), axis=1) == 0)
        length += tl.sum(e * e, axis=1)
        hashed += tl.sum(tl.where((k < codes)[:, None] & (d < DIM)[None, :], _mixed(e, d), 0), axis=1)

    slot = head.to(tl.int64) * slots + _slot(hashed, slots)
    first = tl.load(table + slot, mask=finite, other=0)
    different = first >= k
    first_at = codebook + head.to(tl.int64) * stride_h + tl.where(different, 0, first).to(tl.int64)[:, None] * stride_k
    for start in range(0, DIM, BD):
        d = start + tl.arange(0, BD)
        inside = (finite & (different == 0))[:, None] & (d < DIM)[None, :]
        e = working(tl.load(at + d[None, :] * stride_d, mask=inside, other=0.0), True)
        other = working(tl.load(first_at + d[None, :] * stride_d, mask=inside, other=0.0), True)
        different = different | (tl.max(tl.where(e == other, 0, 1), axis=1) > 0)
    finite = finite & different

    exponent, cut = code_units(state)
    unprovable = tl.zeros((BK,), tl.int1)
    if METRIC == "cosine":
        # float64 squares that leave its range make the contract's own norm coarse: leave those codebooks to it
        unprovable = finite & (length > 0) & ((length < 2.0**-900) | (length > 2.0**900))
        divisor = tl.where((length > 0) & (length < float("inf")), tl.sqrt(length), 1.0)
    else:
        unprovable = finite & (exponent >= 110)
        divisor = tl.full((BK,), 1.0, tl.float64)
    scale = power_of_two(tl.minimum(10 - exponent, 126), True)

    left_out = tl.zeros((BK,), tl.int1)
    if METRIC == "euclidean":
        whole = tl.zeros((BK,), tl.float64)
        for start in range(0, DIM, BD):
            d = start + tl.arange(0, BD)
            inside = finite[:, None] & (d < DIM)[None, :]
            e = working(tl.load(at + d[None, :] * stride_d, mask=inside, other=0.0), True)
            y = (e - tl.load(centre + d, mask=d < DIM, other=0.0).to(tl.float64)[None, :]) * scale
            whole += tl.sum(tl.where(inside, y * y, 0.0), axis=1)
        left_out = cut & (whole >= 2.0**22)

    squares = tl.zeros((BK,), tl.float64)
    residual = tl.zeros((BK,), tl.float64)
    out = packed + (head.to(tl.int64) * padded_codes + k)[:, None] * PADDED
    for start in range(0, PADDED, BD):
        d = start + tl.arange(0, BD)
        e = working(tl.load(at + d[None, :] * stride_d, mask=finite[:, None] & (d < DIM)[None, :], other=0.0), True)
        y = (e - tl.load(centre + d).to(tl.float64)[None, :]) / divisor[:, None] * scale
        y = tl.where((finite & (unprovable == 0) & (left_out == 0))[:, None] & (d < DIM)[None, :], y, 0.0)  # [BK, BD]
        p = y.to(tl.float32).to(tl.float16)
        tl.store(out + d[None, :], p, mask=(k < padded_codes)[:, None])
        rounded = p.to(tl.float64)
        squares += tl.sum(rounded * rounded, axis=1)
        residual += tl.sum((y - rounded) * (y - rounded), axis=1)

    half = tl.zeros((BK,), tl.float32)
    if METRIC == "euclidean":
        bound = tl.minimum(0.25 * whole * (1.0 - 2.0**-20), 1e38)
        half = tl.where(left_out, bound, 0.5 * squares).to(tl.float32)
    tl.store(half_norms + head * padded_codes + k, tl.where(finite, half, float("inf")), mask=k < padded_codes)
    up: tl.constexpr = 1.0 + 2.0**-20  # covers float64 arithmetic and the conversion to fp32
    radius = tl.max(tl.where(unprovable, float("inf"), tl.sqrt(squares) * up), axis=0).to(tl.float32)
    spread = tl.max(tl.sqrt(residual) * up, axis=0).to(tl.float32)
    tl.atomic_max(state + 1, radius.to(tl.int32, bitcast=True))
    tl.atomic_max(state + 2, spread.to(tl.int32, bitcast=True))
