"""Softmax over codes without its matrix: log-sum-exp, entropy of each row, mean assignment.

Fused in partition_kernel: product, logit in one FMA, and the running (top, Σw, Σ w (t - top)) with w = 2^(t - top),
from which merge_kernel takes the log partition and the entropy of the row. mean_kernel repeats the product with codes
resident and adds up 2^(t - log partition) over the rows. Never materialised: the N×K logits or probabilities.
Logits t are in binary units (natural ones times log2 e, which is folded into the scale): one exponential instruction.
Traffic: a tile of rows stays, the codes pass by (and the other way round), both from cache. Per score and sweep D FMAs
or their share of a tensor core, one exponential, four or five other instructions.

Deterministic: each sum is made by one program in a fixed order. Where there are too few tiles for the GPU the passing
side is cut into splits, each with a partial result of its own, added in ascending order afterwards; no atomics.
For the mean one program per (tile of codes, split of rows) and not one per tile of rows: then the partial sums are
splits x K, not N / BM x K. Sums over the rows of a tile are float32, sums over tiles and splits float64.

A row that counts nowhere has a log partition of -NEVER: all its probabilities are 0 and no sweep needs a mask.
"""

import triton
import triton.language as tl

from vqkernels.backends.triton.entropy_pack import NEVER
from vqkernels.backends.triton.rows import working


@triton.jit
def product(a, b, total, INTERPRETED: tl.constexpr):
    """total + a b, never in TF32. The interpreter cannot multiply bf16: it is given the same numbers as float32."""
    if INTERPRETED and a.dtype.primitive_bitwidth == 16:
        a = working(a, False)
        b = working(b, False)
    return tl.dot(a, b, total, input_precision="ieee", out_dtype=total.dtype)


@triton.jit
def products(
    left, right, SUM: tl.constexpr, PADDED: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """[BM, BK] dot products of packed vectors; left points at [BM, BD], right at [BK, BD]."""
    total = tl.zeros((BM, BK), SUM)
    for start in range(0, PADDED, BD):
        total = product(tl.load(left + start), tl.trans(tl.load(right + start)), total, INTERPRETED)
    return total


@triton.jit
def partition_kernel(
    rows_packed, codes_packed, bias, scale, top_out, sum_out, tilt_out, padded_rows, padded_codes, tiles_per_split,
    PADDED: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(2)
    split = tl.program_id(1)
    SUM: tl.constexpr = bias.dtype.element_ty
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    d = tl.arange(0, BD)
    scaled = tl.load(scale).to(SUM)
    left = rows_packed + (head.to(tl.int64) * padded_rows + row)[:, None] * PADDED + d[None, :]
    codes_packed += head.to(tl.int64) * padded_codes * PADDED
    bias += head.to(tl.int64) * padded_codes

    top = tl.full((BM,), NEVER, SUM)
    total = tl.zeros((BM,), SUM)
    tilt = tl.zeros((BM,), SUM)
    begin = split * tiles_per_split
    for tile in range(begin, tl.minimum(begin + tiles_per_split, padded_codes // BK)):
        k = tile * BK + tl.arange(0, BK)
        own = tl.load(bias + k)
        right = codes_packed + k.to(tl.int64)[:, None] * PADDED + d[None, :]
        t = products(left, right, SUM, PADDED, BM, BK, BD, INTERPRETED) * scaled + own[None, :]
        higher = tl.maximum(top, tl.max(t, axis=1))
        drop = top - higher
        shrink = tl.exp2(drop)
        t = t - higher[:, None]
        w = tl.exp2(t)
        tilt = (tilt + drop * total) * shrink + tl.sum(w * t, axis=1)
        total = total * shrink + tl.sum(w, axis=1)
        top = higher
    at = (split.to(tl.int64) * tl.num_programs(2) + head) * padded_rows + row
    tl.store(top_out + at, top)
    tl.store(sum_out + at, total)
    tl.store(tilt_out + at, tilt)


@triton.jit
def partition_merge_kernel(
    top_in, sum_in, tilt_in, status, entropy_out, partition_out, partial_entropy, rows, padded_rows, splits,
    BM: tl.constexpr,
):  # fmt: skip
    """Row entropies in nats and binary log partitions (H, R) from the splits, and each block's sum of entropies."""
    head = tl.program_id(1)
    SUM: tl.constexpr = top_in.dtype.element_ty
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    inside = row < rows
    top = tl.full((BM,), NEVER, SUM)
    total = tl.zeros((BM,), SUM)
    tilt = tl.zeros((BM,), SUM)
    for split in range(splits):
        at = (split * tl.num_programs(1) + head).to(tl.int64) * padded_rows + row
        other_top = tl.load(top_in + at, mask=inside, other=NEVER)
        other_total = tl.load(sum_in + at, mask=inside, other=0.0)
        other_tilt = tl.load(tilt_in + at, mask=inside, other=0.0)
        higher = tl.maximum(top, other_top)
        drop = top - higher
        other_drop = other_top - higher
        tilt = (tilt + drop * total) * tl.exp2(drop) + (other_tilt + other_drop * other_total) * tl.exp2(other_drop)
        total = total * tl.exp2(drop) + other_total * tl.exp2(other_drop)
        top = higher
    some = top > 0.5 * NEVER  # a finite code at least
    total = tl.where(some, total, 1.0)
    bits = tl.log2(total)
    entropy = (bits - tilt / total) * 0.6931471805599453
    entropy = tl.where(some, tl.where(entropy < 0.0, 0.0, entropy), 0.0)  # rounding may leave less; NaN stays
    kind = tl.load(status + head.to(tl.int64) * padded_rows + row, mask=inside, other=0)
    entropy = tl.where(kind == 1, entropy, 0.0)
    partition = tl.where((kind == 1) & some & (entropy == entropy), top + bits, -NEVER)
    at = head.to(tl.int64) * rows + row
    tl.store(entropy_out + at, entropy, mask=inside)
    tl.store(partition_out + at, partition, mask=inside)
    entropy = tl.where(kind == 2, float("nan"), entropy).to(tl.float64)
    tl.store(partial_entropy + head * tl.num_programs(0) + tl.program_id(0), tl.sum(entropy, axis=0))


@triton.jit
def mean_kernel(
    rows_packed, codes_packed, bias, scale, partition, partial, rows, padded_rows, padded_codes, tiles_per_split,
    PADDED: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Sums over rows of the probabilities of BM codes, float64, (splits, H, K'); BK rows pass by at a time."""
    head = tl.program_id(2)
    split = tl.program_id(1)
    SUM: tl.constexpr = bias.dtype.element_ty
    k = tl.program_id(0) * BM + tl.arange(0, BM)
    d = tl.arange(0, BD)
    scaled = tl.load(scale).to(SUM)
    left = codes_packed + (head.to(tl.int64) * padded_codes + k)[:, None] * PADDED + d[None, :]
    own = tl.load(bias + head.to(tl.int64) * padded_codes + k)
    rows_packed += head.to(tl.int64) * padded_rows * PADDED
    partition += head.to(tl.int64) * rows

    total = tl.zeros((BM,), tl.float64)
    begin = split * tiles_per_split
    for tile in range(begin, tl.minimum(begin + tiles_per_split, padded_rows // BK)):
        row = tile * BK + tl.arange(0, BK)
        whole = tl.load(partition + row, mask=row < rows, other=-NEVER)
        right = rows_packed + row.to(tl.int64)[:, None] * PADDED + d[None, :]
        t = products(left, right, SUM, PADDED, BM, BK, BD, INTERPRETED) * scaled + own[:, None]
        total += tl.sum(tl.exp2(t - whole[None, :]), axis=1).to(tl.float64)
    tl.store(partial + (split.to(tl.int64) * tl.num_programs(2) + head) * padded_codes + k, total)
