"""Gradients of the two entropies by recomputing the probabilities, without their matrix.

With p = exp(l - log partition), G = (f/n) p (alpha log p + lift_i - sink_j), where alpha = -g_sample / f,
lift_i = (g_codebook c_i - g_sample H_i) / f, sink_j = g_codebook log m_j / f, c_i = Σ_j p_ij log m_j and f the larger
of the two incoming gradients, the gradients are Σ_j G_ij e_j and Σ_i G_ij (z_i - e_j) (Σ_i G_ij z_i for the dot
product), times 2/τ or 1/τ.
shift_kernel finds c_i. gradient_kernel is both of the rest: a resident tile (of rows, or of codes), the other side
passing by; product, exponential, G, and a second product of G, in registers, with the passing side. Never
materialised: N×K logits, probabilities or G. Σ_j G_ij = 0, so subtracting the codes' centre (entropy_pack.py) changes
nothing but the rounding.

float32 and float64: both products in that type, never TF32. 16-bit inputs: G is split in two numbers of their type, so
the second product keeps 16 (bf16) or 22 (fp16) bits of it on the tensor core; fp16 needs a power of two beside it, for
|p (...)| is below 2^6 and often small.
Deterministic as the forward pass: partial results by split, added in order in float64 (entropy_finish.py).
"""

import triton
import triton.language as tl

from vqkernels.backends.triton.entropy_forward import product, products
from vqkernels.backends.triton.entropy_pack import NEVER


@triton.jit
def shift_kernel(
    rows_packed, codes_packed, bias, scale, partition, log_mean, partial, rows, padded_rows, padded_codes,
    tiles_per_split,
    PADDED: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """c_i = Σ_j p_ij log m_j, (splits, H, R')."""
    head = tl.program_id(2)
    split = tl.program_id(1)
    SUM: tl.constexpr = bias.dtype.element_ty
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    d = tl.arange(0, BD)
    scaled = tl.load(scale).to(SUM)
    whole = tl.load(partition + head.to(tl.int64) * rows + row, mask=row < rows, other=-NEVER)
    left = rows_packed + (head.to(tl.int64) * padded_rows + row)[:, None] * PADDED + d[None, :]
    codes_packed += head.to(tl.int64) * padded_codes * PADDED
    bias += head.to(tl.int64) * padded_codes
    log_mean += head.to(tl.int64) * padded_codes

    total = tl.zeros((BM,), SUM)
    begin = split * tiles_per_split
    for tile in range(begin, tl.minimum(begin + tiles_per_split, padded_codes // BK)):
        k = tile * BK + tl.arange(0, BK)
        own = tl.load(bias + k)
        right = codes_packed + k.to(tl.int64)[:, None] * PADDED + d[None, :]
        t = products(left, right, SUM, PADDED, BM, BK, BD, INTERPRETED) * scaled + own[None, :]
        total += tl.sum(tl.exp2(t - whole[:, None]) * tl.load(log_mean + k)[None, :], axis=1)
    tl.store(partial + (split.to(tl.int64) * tl.num_programs(2) + head) * padded_rows + row, total)


@triton.jit
def gradient_kernel(
    left_packed, right_packed, scale, alpha, left_logit, right_logit, left_lift, right_lift, partial, sums,
    padded_left, padded_right, tiles_per_split,
    PADDED: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr, BO: tl.constexpr,
    CODES: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Σ over the right of G times the right vector, (splits, H, left', D'); with CODES also Σ G, (splits, H, left').

    Left are rows and right are codes, or with CODES the other way round. The logit of a code is its bias, that of a
    row minus its log partition; their lifts are -sink and lift.
    """
    head = tl.program_id(2)
    slices: tl.constexpr = PADDED // BO
    split = tl.program_id(1) // slices
    output = tl.program_id(1) % slices * BO
    SUM: tl.constexpr = left_logit.dtype.element_ty
    OPERAND: tl.constexpr = left_packed.dtype.element_ty
    POWER: tl.constexpr = 512.0 if OPERAND == tl.float16 else 1.0
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    d = tl.arange(0, BD)
    scaled = tl.load(scale).to(SUM)
    slope = tl.load(alpha + head).to(SUM)
    first = head.to(tl.int64) * padded_left
    second = head.to(tl.int64) * padded_right
    left = left_packed + (first + m)[:, None] * PADDED + d[None, :]
    own = tl.load(left_logit + first + m)
    lift = tl.load(left_lift + first + m)
    right_packed += second * PADDED

    total = tl.zeros((BM, BO), SUM)
    gathered = tl.zeros((BM,), SUM)
    begin = split * tiles_per_split
    for tile in range(begin, tl.minimum(begin + tiles_per_split, padded_right // BK)):
        k = tile * BK + tl.arange(0, BK)
        other = tl.load(right_logit + second + k)
        right = right_packed + k.to(tl.int64)[:, None] * PADDED
        t = products(left, right + d[None, :], SUM, PADDED, BM, BK, BD, INTERPRETED) * scaled
        # a code's bias first, as when the log partition was found
        if CODES:
            t = (t + own[:, None]) + other[None, :]
        else:
            t = (t + other[None, :]) + own[:, None]
        g = tl.exp2(t) * (t * slope + (lift[:, None] + tl.load(right_lift + second + k)[None, :]))  # [BM, BK]
        if CODES:
            gathered += tl.sum(g, axis=1)
        x = tl.load(right + output + tl.arange(0, BO)[None, :])  # [BK, BO]
        if OPERAND.primitive_bitwidth == 16:
            g = g * POWER
            high = g.to(OPERAND)
            total = product((g - high.to(SUM)).to(OPERAND), x, total, INTERPRETED)
            total = product(high, x, total, INTERPRETED)
        else:
            total = product(g, x, total, INTERPRETED)
    at = (split.to(tl.int64) * tl.num_programs(2) + head) * padded_left + m
    tl.store(partial + at[:, None] * PADDED + output + tl.arange(0, BO)[None, :], total / POWER)
    if CODES:
        if output == 0:
            tl.store(sums + at, gathered)


@triton.jit
def lift_kernel(
    partial, entropy, partition, grads, lift, logit, rows, padded_rows, splits, BM: tl.constexpr,
):  # fmt: skip
    """lift_i and minus the log partition, (H, R'). grads (2, H) float64: g_sample / f and g_codebook / f."""
    head = tl.program_id(1)
    SUM: tl.constexpr = lift.dtype.element_ty
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    inside = row < rows
    shift = tl.zeros((BM,), SUM)
    for split in range(splits):
        at = (split * tl.num_programs(1) + head).to(tl.int64) * padded_rows + row
        shift += tl.load(partial + at, mask=inside, other=0.0)
    own = tl.load(entropy + head.to(tl.int64) * rows + row, mask=inside, other=0.0)
    own = tl.where(own == own, own, 0.0)
    of_sample = tl.load(grads + head).to(SUM)
    of_codebook = tl.load(grads + tl.num_programs(1) + head).to(SUM)
    whole = tl.load(partition + head.to(tl.int64) * rows + row, mask=inside, other=-NEVER)
    at = head.to(tl.int64) * padded_rows + row
    tl.store(lift + at, of_codebook * shift - of_sample * own, mask=row < padded_rows)
    tl.store(logit + at, -whole, mask=row < padded_rows)
