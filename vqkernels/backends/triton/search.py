"""The candidate pass: a matrix product of packed rows and packed codes that is reduced as it is produced.

Fused: product, score ½‖e‖² - z·e in one FMA, running best. Never materialised: the N×K scores.
Traffic: the packed rows once (D' <= 128; once per code tile from cache beyond), the packed codes once per row tile.

Reduction in registers. A tensor core leaves a [BM, BK] tile with column 8b + 2·lane + e in the lane'th of four threads,
so reshaping to [BM, BK/8, 4, 2] names what one thread holds. Both reductions stay inside a thread until the last tile;
the reshapes are logical, so the result is right on any layout and merely fastest on that one.
  index  exact (score, code): pairs e, then blocks b in ascending order, with a strict <, so a tie keeps the lower code;
         tiles ascend too, and the four lanes are compared by (score, code) at the end.
  group  codes in groups of 8 that share b // 4 and lane: running best, second best and group of the best. `second`
         bounds every code outside the winning group, which is what the certificate needs (margin.py).
Padding codes have a half norm of +inf, so they lose every comparison.
Small batches split the code tiles over programs; `resolve.py` merges the splits in ascending order.
"""

import triton
import triton.language as tl


@triton.jit
def _lower(v0, i0, v1, i1):
    """The lower score; of equals, the first."""
    take = v1 < v0
    return tl.where(take, v1, v0), tl.where(take, i1, i0)


@triton.jit
def _halves(x, BM: tl.constexpr, BLOCKS: tl.constexpr):
    """[BM, BLOCKS, 4] to its first and its second half of blocks."""
    return tl.split(tl.permute(tl.reshape(x, (BM, 2, BLOCKS // 2, 4)), (0, 2, 3, 1)))


@triton.jit
def _fold(v, i, score, code, EMPTY: tl.constexpr, BM: tl.constexpr, BLOCKS: tl.constexpr):
    """Fold [BM, BLOCKS, 4] into (v, i) [BM, 4] one block after the other: a chain selects between constants, which is
    cheaper than a tree, and its order is explicit. EMPTY: there is nothing in (v, i) yet."""
    if BLOCKS == 1:
        score = tl.reshape(score, (BM, 4))
        code = tl.reshape(code, (BM, 4))
        if EMPTY:
            return score, code
        else:
            return _lower(v, i, score, code)
    else:
        score0, score1 = _halves(score, BM, BLOCKS)
        code0, code1 = _halves(code, BM, BLOCKS)
        v, i = _fold(v, i, score0, code0, EMPTY, BM, BLOCKS // 2)
        return _fold(v, i, score1, code1, False, BM, BLOCKS // 2)


@triton.jit
def lowest_in_lane(t, BM: tl.constexpr, BK: tl.constexpr):
    """[BM, BK] scores to the lowest per row and lane [BM, 4] and its number 2b + e within the lane."""
    even, odd = tl.split(tl.reshape(t, (BM, BK // 8, 4, 2)))
    code = 2 * tl.arange(0, BK // 8)[None, :, None] + tl.zeros((BM, BK // 8, 4), tl.int32)
    v, i = _lower(even, code, odd, code + 1)
    return _fold(v, i, v, i, True, BM, BK // 8)


@triton.jit
def search_kernel(
    packed_rows, packed_codes, half_norms, beta, best_out, second_out, winner_out,
    rows, padded_rows, padded_codes, tiles, tiles_per_split,
    PADDED: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
    GROUPS: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(2)
    split = tl.program_id(1)
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    first_row = head * padded_rows + tl.program_id(0) * BM
    first_code = head * padded_codes
    half_norms += first_code
    d = tl.arange(0, BD)
    row_at = (head.to(tl.int64) * padded_rows + row)[:, None] * PADDED + d[None, :]
    code_at = tl.arange(0, BK)[:, None] * PADDED + d[None, :]
    code_base = head.to(tl.int64) * padded_codes
    scale = tl.load(beta + head.to(tl.int64) * padded_rows + row)

    if GROUPS:
        best = tl.full((BM, BK // 32, 4), float("inf"), tl.float32)
        second = tl.full((BM, BK // 32, 4), float("inf"), tl.float32)
        winner = tl.zeros((BM, BK // 32, 4), tl.int32)
    else:
        best = tl.full((BM, 4), float("inf"), tl.float32)
        winner = tl.zeros((BM, 4), tl.int32)
    if BD == PADDED:
        q = packed_rows.load([first_row, 0]) if DESCRIPTORS else tl.load(packed_rows + row_at)  # [BM, BD], resident

    begin = split * tiles_per_split
    for tile in range(begin, tl.minimum(begin + tiles_per_split, tiles)):
        half = tl.load(half_norms + tile * BK + tl.arange(0, BK))
        if BD == PADDED:
            if DESCRIPTORS:
                p = packed_codes.load([first_code + tile * BK, 0])
            else:
                p = tl.load(packed_codes + (code_base + tile * BK) * PADDED + code_at)
            product = tl.dot(q, tl.trans(p))  # [BM, BK]
        else:
            product = tl.zeros((BM, BK), tl.float32)
            for start in range(0, PADDED, BD):
                if DESCRIPTORS:
                    q = packed_rows.load([first_row, start])
                    p = packed_codes.load([first_code + tile * BK, start])
                else:
                    q = tl.load(packed_rows + row_at + start)
                    p = tl.load(packed_codes + (code_base + tile * BK) * PADDED + start + code_at)
                product = tl.dot(q, tl.trans(p), product)
        t = half[None, :] - product * scale[:, None]
        if GROUPS:
            g = tl.min(tl.min(tl.reshape(t, (BM, BK // 32, 4, 4, 2)), axis=4), axis=2)  # [BM, BK/32, 4]
            second = tl.minimum(second, tl.maximum(best, g))
            winner = tl.where(g < best, tile, winner)
            best = tl.minimum(best, g)
        else:
            v, i = lowest_in_lane(t, BM, BK)
            winner = tl.where(v < best, tile * (BK // 4) + i, winner)
            best = tl.minimum(best, v)

    lane = tl.arange(0, 4)
    if GROUPS:
        group = (winner * (BK // 32) + tl.arange(0, BK // 32)[None, :, None]) * 4 + lane[None, None, :]
        slots: tl.constexpr = BK // 8
        group = tl.reshape(group, (BM, slots))
        best = tl.reshape(best, (BM, slots))
        second = tl.reshape(second, (BM, slots))
        lowest = tl.min(best, axis=1)
        winner = tl.min(tl.where(best == lowest[:, None], group, 0x7FFFFFFF), axis=1)
        second = tl.min(tl.where(group == winner[:, None], second, best), axis=1)
    else:
        code = (winner >> 1) * 8 + lane[None, :] * 2 + (winner & 1)
        lowest = tl.min(best, axis=1)
        winner = tl.min(tl.where(best == lowest[:, None], code, 0x7FFFFFFF), axis=1)

    at = (split.to(tl.int64) * tl.num_programs(2) + head) * padded_rows + row
    tl.store(best_out + at, lowest, mask=row < rows)
    tl.store(winner_out + at, winner, mask=row < rows)
    if GROUPS:
        tl.store(second_out + at, second, mask=row < rows)
