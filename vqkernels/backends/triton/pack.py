"""Preparing the codebook: e becomes the right operand of the candidate pass.

Three small launches over K·D elements, all arithmetic in float64: the centre, the common exponent, the packed codes.
Results per head, in code units (2^c (e - centre), c an integer):
    packed (K', D') fp16 with zeros as padding
    half_norms (K',) fp32: ½‖packed‖² (0 for the dot product and cosine), +inf for padding and for codes with a NaN or
        an infinity, so neither is ever chosen
    state = [exponent of the largest element (c = 10 - it, at most 126), radius >= max‖packed‖,
        spread >= max‖packed - 2^c (e - centre)‖, unused]: int32, the two norms as fp32 bits, so that an integer maximum
        combines them in any order with one result

The centre is the mean of the first 512 codes. Any vector is valid: distances do not depend on it, and the rounding it
causes is measured. It removes a common offset, which would otherwise use up the bits. The dot product is not centred,
nor are 16-bit inputs (their products are exact as they stand). Cosine packs e/‖e‖, zero codes as zero.
Codes beyond fp32's comfortable range set the radius to infinity: nothing can then be proved and float64 decides.
"""

import triton
import triton.language as tl

from vqkernels.backends.triton.rows import binary_exponent, power_of_two, working


@triton.jit
def centre_kernel(
    codebook, centre, state, codes, stride_h, stride_k, stride_d,
    DIM: tl.constexpr, PADDED: tl.constexpr, BD: tl.constexpr, SAMPLE: tl.constexpr,
    CENTRED: tl.constexpr, METRIC: tl.constexpr,
):  # fmt: skip
    """The centre (zero unless CENTRED) and the first values of `state`."""
    head = tl.program_id(1)
    if tl.program_id(0) == 0:
        slot = tl.arange(0, 4)
        # unit codes have elements up to 1 = 2^0
        tl.store(state + head * 4 + slot, tl.where((slot == 0) & (METRIC != "cosine"), -1023, 0))
    d = tl.program_id(0) * BD + tl.arange(0, BD)
    total = tl.zeros((BD,), tl.float64)
    if CENTRED:
        sample = tl.minimum(codes, SAMPLE)
        for start in range(0, sample, 32):
            k = start + tl.arange(0, 32)
            at = head.to(tl.int64) * stride_h + k.to(tl.int64)[:, None] * stride_k + d[None, :] * stride_d
            e = working(tl.load(codebook + at, mask=(k < sample)[:, None] & (d < DIM)[None, :], other=0.0), True)
            total += tl.sum(tl.where(tl.abs(e) < 2.0**100, e, 0.0), axis=0)
        total = total / sample
    tl.store(centre + head * PADDED + d, total.to(tl.float32), mask=d < PADDED)


@triton.jit
def extent_kernel(
    codebook, centre, state, codes, stride_h, stride_k, stride_d,
    DIM: tl.constexpr, PADDED: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Exponent of the largest centred element over the finite codes."""
    head = tl.program_id(1)
    k = tl.program_id(0) * BK + tl.arange(0, BK)
    at = codebook + head.to(tl.int64) * stride_h + k.to(tl.int64)[:, None] * stride_k
    largest = tl.zeros((BK,), tl.float64)
    finite = k < codes
    for start in range(0, DIM, BD):
        d = start + tl.arange(0, BD)
        inside = (k < codes)[:, None] & (d < DIM)[None, :]
        e = working(tl.load(at + d[None, :] * stride_d, mask=inside, other=0.0), True)
        finite = finite & (tl.max(tl.where(tl.abs(e) < float("inf"), 0, 1), axis=1) == 0)
        y = e - tl.load(centre + head * PADDED + d, mask=d < DIM, other=0.0).to(tl.float64)[None, :]
        largest = tl.maximum(largest, tl.max(tl.where(inside, tl.abs(y), 0.0), axis=1))
    exponent = tl.max(tl.where(finite, binary_exponent(largest, True), -1023), axis=0)
    tl.atomic_max(state + head * 4, exponent)


@triton.jit
def pack_codes_kernel(
    codebook, centre, state, packed, half_norms, codes, padded_codes, stride_h, stride_k, stride_d,
    DIM: tl.constexpr, PADDED: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr, METRIC: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    k = tl.program_id(0) * BK + tl.arange(0, BK)
    at = codebook + head.to(tl.int64) * stride_h + k.to(tl.int64)[:, None] * stride_k
    centre += head * PADDED

    finite = k < codes
    length = tl.zeros((BK,), tl.float64)
    for start in range(0, DIM, BD):
        d = start + tl.arange(0, BD)
        e = tl.load(at + d[None, :] * stride_d, mask=(k < codes)[:, None] & (d < DIM)[None, :], other=0.0)
        e = working(e, True)
        finite = finite & (tl.max(tl.where(tl.abs(e) < float("inf"), 0, 1), axis=1) == 0)
        length += tl.sum(e * e, axis=1)

    exponent = tl.load(state + head * 4)
    unprovable = tl.zeros((BK,), tl.int1)
    if METRIC == "cosine":
        # float64 squares that leave its range make the contract's own norm coarse: leave those codebooks to it
        unprovable = finite & (length > 0) & ((length < 2.0**-900) | (length > 2.0**900))
        divisor = tl.where((length > 0) & (length < float("inf")), tl.sqrt(length), 1.0)
    else:
        unprovable = finite & (exponent >= 110)
        divisor = tl.full((BK,), 1.0, tl.float64)
    scale = power_of_two(tl.minimum(10 - exponent, 126), True)

    squares = tl.zeros((BK,), tl.float64)
    residual = tl.zeros((BK,), tl.float64)
    out = packed + (head.to(tl.int64) * padded_codes + k)[:, None] * PADDED
    for start in range(0, PADDED, BD):
        d = start + tl.arange(0, BD)
        e = working(tl.load(at + d[None, :] * stride_d, mask=finite[:, None] & (d < DIM)[None, :], other=0.0), True)
        y = (e - tl.load(centre + d).to(tl.float64)[None, :]) / divisor[:, None] * scale
        y = tl.where(finite[:, None] & (d < DIM)[None, :] & (~unprovable)[:, None], y, 0.0)  # [BK, BD]
        p = y.to(tl.float32).to(tl.float16)
        tl.store(out + d[None, :], p, mask=(k < padded_codes)[:, None])
        rounded = p.to(tl.float64)
        squares += tl.sum(rounded * rounded, axis=1)
        residual += tl.sum((y - rounded) * (y - rounded), axis=1)

    half = tl.zeros((BK,), tl.float32)
    if METRIC == "euclidean":
        half = (0.5 * squares).to(tl.float32)
    tl.store(half_norms + head * padded_codes + k, tl.where(finite, half, float("inf")), mask=k < padded_codes)
    up: tl.constexpr = 1.0 + 2.0**-20  # covers float64 arithmetic and the conversion to fp32
    radius = tl.max(tl.where(unprovable, float("inf"), tl.sqrt(squares) * up), axis=0).to(tl.float32)
    spread = tl.max(tl.sqrt(residual) * up, axis=0).to(tl.float32)
    tl.atomic_max(state + head * 4 + 1, radius.to(tl.int32, bitcast=True))
    tl.atomic_max(state + head * 4 + 2, spread.to(tl.int32, bitcast=True))
