"""The contract itself, in float64, for the rows that the certificate left open.

Launched with a fixed grid whose programs walk the device-side list of undecided rows; compiled with
enable_fp_fusion=False, so that subtraction, multiplication and addition are rounded separately, as the contract says.
For 16 rows at a time the candidate scores are recomputed tile by tile and compared with each row's fixed threshold
(margin.py: every code that the contract could choose passes). Then float64 decides, sequentially over d:
  few candidates in the tile   one code per row at a time, in ascending order;
  many (duplicates, ties, codes that no bound separates)   the whole [16, BK] tile.
Ties: codes ascend and the comparison is a strict <, so the lowest index stays. A NaN never wins. If no code compares
below infinity the index is the lowest finite code.
Reads the stored rows and codes by their strides; nothing of size K is written.
"""

import triton
import triton.language as tl

from vqkernels.backends.triton.rows import row_offsets, working


@triton.jit
def _finish(total, length, METRIC: tl.constexpr):
    """The quantity to minimise, from the sequential sums."""
    if METRIC == "euclidean":
        return total
    elif METRIC == "dot":
        return -total
    else:
        root = tl.sqrt(length)
        return -tl.where(root == 0.0, 0.0, total / tl.where(root == 0.0, 1.0, root))


@triton.jit
def _step(total, length, x, e, METRIC: tl.constexpr):
    """One term of the contract's sums."""
    if METRIC == "euclidean":
        difference = x - e
        total = total + difference * difference
    else:
        total = total + x * e
    if METRIC == "cosine":
        length = length + e * e
    return total, length


@triton.jit
def rescore_kernel(
    z, codebook, packed_rows, packed_codes, half_norms, beta, threshold_in, undecided, counters, indices,
    rows, padded_rows, padded_codes, codes, tiles, positions,
    stride_b, stride_h, stride_p, stride_d, code_stride_h, code_stride_k, code_stride_d,
    DIM: tl.constexpr, PADDED: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
    METRIC: tl.constexpr, FEW: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    first_code = head.to(tl.int64) * padded_codes
    z += head.to(tl.int64) * stride_h
    codebook += head.to(tl.int64) * code_stride_h
    open_rows = tl.load(counters + 1 + head).to(tl.int32)
    none: tl.constexpr = 0x7FFFFFFF
    for block in range(tl.program_id(0), (open_rows + BM - 1) // BM, tl.num_programs(0)):
        slot = block * BM + tl.arange(0, BM)
        inside = slot < open_rows
        row = tl.load(undecided + head.to(tl.int64) * rows + slot, mask=inside, other=0)
        at = head.to(tl.int64) * padded_rows + row
        row_at = row_offsets(row, positions, stride_b, stride_p)
        limit = tl.load(threshold_in + at, mask=inside, other=0.0)
        scale = tl.load(beta + at, mask=inside, other=0.0)
        best = tl.full((BM,), float("inf"), tl.float64)
        index = tl.full((BM,), none, tl.int32)
        for tile in range(tiles):
            column = tile * BK + tl.arange(0, BK)
            product = tl.zeros((BM, BK), tl.float32)
            for start in range(0, PADDED, BD):
                d = start + tl.arange(0, BD)
                q = tl.load(packed_rows + at[:, None] * PADDED + d[None, :], mask=inside[:, None], other=0.0)
                p = tl.load(packed_codes + (first_code + column)[:, None] * PADDED + d[None, :])
                product = tl.dot(q, tl.trans(p), product)
            half = tl.load(half_norms + first_code + column)
            score = half[None, :] - product * scale[:, None]
            open_codes = inside[:, None] & (half < float("inf"))[None, :] & ((score > limit[:, None]) == 0)  # [BM, BK]
            most = tl.max(tl.sum(open_codes.to(tl.int32), axis=1), axis=0)
            if most > FEW:
                total = tl.zeros((BM, BK), tl.float64)
                length = tl.zeros((BM, BK), tl.float64)
                code_at = column.to(tl.int64) * code_stride_k
                for d in range(DIM):
                    x = working(tl.load(z + row_at + d * stride_d, mask=inside, other=0.0), True)
                    e = working(tl.load(codebook + code_at + d * code_stride_d, mask=column < codes, other=0.0), True)
                    total, length = _step(total, length, x[:, None], e[None, :], METRIC)
                value = _finish(total, length, METRIC)
                value = tl.where(open_codes & (value < float("inf")), value, float("inf"))
                lowest = tl.min(value, axis=1)
                candidate = open_codes & (value == lowest[:, None])
                first = tl.min(tl.where(candidate, column[None, :], none), axis=1)
                index = tl.where((lowest < best) | (index == none), first, index)
                best = tl.minimum(best, lowest)
            elif most > 0:
                left = most
                while left > 0:
                    code = tl.min(tl.where(open_codes, column[None, :], none), axis=1)  # [BM]
                    open_codes = open_codes & (column[None, :] != code[:, None])
                    pending = code != none
                    code_at = tl.where(pending, code, 0).to(tl.int64) * code_stride_k
                    total = tl.zeros((BM,), tl.float64)
                    length = tl.zeros((BM,), tl.float64)
                    for d in range(DIM):
                        x = working(tl.load(z + row_at + d * stride_d, mask=pending, other=0.0), True)
                        e = working(tl.load(codebook + code_at + d * code_stride_d, mask=pending, other=0.0), True)
                        total, length = _step(total, length, x, e, METRIC)
                    value = _finish(total, length, METRIC)
                    better = pending & ((value < best) | (index == none))
                    index = tl.where(better, code, index)
                    best = tl.where(pending & (value < best), value, best)
                    left = left - 1
        index = tl.where(index == none, 0, index)
        tl.store(indices + head.to(tl.int64) * rows + row, index.to(tl.int64), mask=inside)
