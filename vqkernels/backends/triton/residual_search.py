"""All levels of residual quantization in one launch: the residual of a block of rows stays in registers and L1.

Fused, per level: rounding to scaled fp16 with measured errors (rows.py), the candidate pass on the tensor cores
(search.py), the certificate (margin.py), the contract in float64 for what it leaves open, lookup and subtraction. Never
materialised: residuals, packed rows, scores, lists of undecided rows. Traffic: z once; per level the packed codes once
per block of rows and eight packed codes and one code per row, all from cache; one index per row.

Candidates. A slot is one of the BK / 8 groups of eight codes that a tile has; per slot the pass keeps the lowest score,
its tile and the lowest score of the slot's other tiles. Whatever may still be chosen is either in a slot's best group
that reaches the threshold, or in a slot whose second reaches it. Groups are taken one per row at a time: their eight
scores are summed again, and what reaches the threshold is a candidate. A row's only candidate is its index. From the
second on, candidates are compared under the contract: value, then index, since groups do not ascend.
Rows of which a second reaches the threshold sweep the codes again with the threshold, tile by tile, in programs that
have such a row. Both loops run as often as the data wants, on the device.
The contract takes the channels in order: the residuals of the program's rows are written to scratch, once per level,
and each thread sums a row of its own. Above KEPT channels the residual comes back from there, since the search wants
its registers. The kernel is compiled with enable_fp_fusion=False for its sake; scores ask
for their fused operation by name.
"""

import triton
import triton.language as tl

from vqkernels.backends.triton.margin import threshold
from vqkernels.backends.triton.rescore import _finish, _step
from vqkernels.backends.triton.residual_rows import less
from vqkernels.backends.triton.rows import STATE, row_bounds, row_offsets, row_scale, working

NONE = tl.constexpr(0x7FFFFFFF)
KEPT = tl.constexpr(32)  # channels up to which the residual stays in registers while its level is searched
SWEPT = tl.constexpr(32)  # codes at a time in the second sweep, whose masks want registers


@triton.jit
def _any(flags):
    """Whether one of [BM] flags is set."""
    return tl.max(flags.to(tl.int32), axis=0) > 0


@triton.jit
def _contract(
    r_at, codebook, first, first_wanted, other, other_wanted, stride_k, stride_d,
    DIM: tl.constexpr, BM: tl.constexpr, METRIC: tl.constexpr,
):  # fmt: skip
    """The contract's values [BM] of two codes per row; NaN counts as infinity. r_at [BM] points at the residuals."""
    first_at = codebook + tl.where(first_wanted, first, 0).to(tl.int64) * stride_k
    other_at = codebook + tl.where(other_wanted, other, 0).to(tl.int64) * stride_k
    first_total = tl.zeros((BM,), tl.float64)
    first_length = tl.zeros((BM,), tl.float64)
    other_total = tl.zeros((BM,), tl.float64)
    other_length = tl.zeros((BM,), tl.float64)
    for d in range(DIM):
        x = tl.load(r_at + d, mask=first_wanted | other_wanted, other=0.0).to(tl.float64)
        a = working(tl.load(first_at + d * stride_d, mask=first_wanted, other=0.0), True)
        b = working(tl.load(other_at + d * stride_d, mask=other_wanted, other=0.0), True)
        first_total, first_length = _step(first_total, first_length, x, a, METRIC)
        other_total, other_length = _step(other_total, other_length, x, b, METRIC)
    first_value = _finish(first_total, first_length, METRIC)
    other_value = _finish(other_total, other_length, METRIC)
    first_value = tl.where(first_value == first_value, first_value, float("inf"))
    return first_value, tl.where(other_value == other_value, other_value, float("inf"))


@triton.jit
def _score(q, p, half, beta):
    """[BM] scores of one code per row, from its packed operands [BM, PADDED]."""
    product = tl.sum(q.to(tl.float32) * p.to(tl.float32), axis=1)
    return tl.fma(product, -beta, half)


@triton.jit
def _tile_scores(
    q, packed_codes, half_norms, minus_beta, tile, PADDED: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr
):
    """([BM, BK] scores of one tile, [BK] half norms)."""
    code = tile * BK + tl.arange(0, BK)
    half = tl.load(half_norms + code)
    p = tl.load(packed_codes + code[:, None] * PADDED + tl.arange(0, PADDED)[None, :])  # [BK, PADDED]
    product = tl.dot(q, tl.trans(p))
    down = tl.broadcast_to(minus_beta[:, None], (BM, BK))
    return tl.fma(product, down, tl.broadcast_to(half[None, :], (BM, BK))), half


@triton.jit
def residual_search_kernel(
    z, levels, codebooks, packed_codes, half_norms, centre, state, scratch, found, indices,
    rows, positions, depth, padded_codes, pack_h, pack_q, stride_b, stride_h, stride_p, stride_d,
    level_b, level_h, level_p, code_stride_h, code_stride_q, code_stride_k, code_stride_d,
    DIM: tl.constexpr, PADDED: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, METRIC: tl.constexpr,
    LIMITED: tl.constexpr, CERTIFIED: tl.constexpr,
):  # fmt: skip
    """indices (B, H, P, Q). scratch (H, rows, D) and found (H, programs, BM · (BK / 4 + 1)), float32: residuals, and
    slots with scales, in memory. pack_h and pack_q: how far apart the packs of heads and levels are."""
    head = tl.program_id(1)
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    inside = row < rows
    d = tl.arange(0, PADDED)
    column = (d < DIM)[None, :]
    passes = tl.where(inside, depth, 0)
    if LIMITED:
        level_at = row_offsets(row, positions, level_b, level_p) + head.to(tl.int64) * level_h
        told = tl.load(levels + level_at, mask=inside, other=0)
        passes = tl.where(told < depth, tl.maximum(told, 0), depth).to(tl.int32)
    z += row_offsets(row, positions, stride_b, stride_p)[:, None] + head.to(tl.int64) * stride_h
    r = working(tl.load(z + d[None, :] * stride_d, mask=(passes > 0)[:, None] & column, other=0.0), False)
    codebooks += head.to(tl.int64) * code_stride_h
    lane = tl.arange(0, 4)
    slots: tl.constexpr = BK // 8
    tiles = padded_codes // BK
    found += (head * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * (BM * (2 * slots + 1))

    # what does not change from level to level is computed again: kept, it would spill
    for level in tl.range(depth, disable_licm=True):
        live = passes > level
        pack = (head * pack_h + level * pack_q).to(tl.int64)
        level_codes = packed_codes + pack * padded_codes * PADDED
        level_halves = half_norms + pack * padded_codes
        codebook = codebooks + level * (code_stride_q + tl.zeros((), tl.int64))

        there = live[:, None] & column
        r_at = scratch + (head.to(tl.int64) * rows + row) * DIM
        tl.debug_barrier()  # the level before may still be read
        tl.store(r_at[:, None] + d[None, :], r, mask=there)
        poisoned = tl.max(tl.where(there & ((tl.abs(r) < float("inf")) == 0), 1, 0), axis=1)
        usable = there & (poisoned == 0)[:, None]
        x = tl.where(usable, r - tl.load(centre + pack * PADDED + d)[None, :], 0.0)  # [BM, PADDED]
        scale, beta, fits, cut = row_scale(tl.max(tl.abs(x), axis=1), poisoned, state + pack * STATE, False)
        x = tl.where(fits[:, None], x * scale[:, None], 0.0)
        q = x.to(tl.float16)
        rounded = q.to(tl.float32)
        squares = tl.sum(rounded * rounded, axis=1)
        rest = tl.sum((x - rounded) * (x - rounded), axis=1)
        norm, error = row_bounds(squares, rest, beta, fits, cut, PADDED)
        beta = tl.where(live & fits, beta, 0.0)
        # by way of memory: a scale with the residual's layout would draw the scores out of the tensor core's
        own = tl.arange(0, BM)
        beta_at = found + BM * 2 * slots + own
        slot_out = found + own[:, None, None] * slots + tl.arange(0, BK // 32)[None, :, None] * 4 + lane[None, None, :]
        slot_in = found + own[:, None] * slots + tl.arange(0, slots)[None, :]
        tl.store(beta_at, -beta)
        tl.debug_barrier()
        minus_beta = tl.load(beta_at)

        best = tl.full((BM, BK // 32, 4), float("inf"), tl.float32)
        second = tl.full((BM, BK // 32, 4), float("inf"), tl.float32)
        winner = tl.zeros((BM, BK // 32, 4), tl.int32)
        for tile in range(tiles):
            t, _half = _tile_scores(q, level_codes, level_halves, minus_beta, tile, PADDED, BM, BK)
            g = tl.min(tl.min(tl.reshape(t, (BM, BK // 32, 4, 4, 2)), axis=4), axis=2)
            second = tl.minimum(second, tl.maximum(best, g))
            winner = tl.where(g < best, tile, winner)
            best = tl.minimum(best, g)
        lowest = tl.min(tl.min(best, axis=2), axis=1)
        runner_up = tl.min(tl.min(second, axis=2), axis=1)
        # by way of memory, so that what follows does not ask the pass for another layout of its registers
        group = (winner * (BK // 32) + tl.arange(0, BK // 32)[None, :, None]) * 4 + lane[None, None, :]
        tl.store(slot_out, best)
        tl.store(slot_out + BM * slots, group.to(tl.float32, bitcast=True))
        tl.debug_barrier()
        best = tl.load(slot_in)
        group = tl.load(slot_in + BM * slots).to(tl.int32, bitcast=True)
        asked = live & (poisoned == 0) & (lowest < float("inf"))
        index = tl.full((BM,), NONE, tl.int32)

        if CERTIFIED:
            radius = tl.load(state + pack * STATE + 1).to(tl.float32, bitcast=True)
            spread = tl.load(state + pack * STATE + 2).to(tl.float32, bitcast=True)
            limit = threshold(lowest, norm, error, radius, spread, PADDED, METRIC)
            swept = asked & (runner_up < float("inf")) & ((runner_up > limit) == 0)
            value = tl.full((BM,), float("inf"), tl.float64)
            scored = tl.zeros((BM,), tl.int1)

            pending = (asked & (swept == 0))[:, None] & (best < float("inf")) & ((best > limit[:, None]) == 0)
            taken = tl.min(tl.where(pending, group, NONE), axis=1)  # [BM]
            while _any(taken != NONE):
                pending = pending & (group != taken[:, None])
                open_ = taken != NONE
                base = tl.where(open_, (taken >> 2) * 32 + (taken & 3) * 2, 0)
                left = tl.zeros((BM,), tl.int32)  # the members that are candidates, as bits
                for member in range(8):
                    code = base + (member >> 1) * 8 + (member & 1)
                    half = tl.load(level_halves + code, mask=open_, other=float("inf"))
                    p = tl.load(level_codes + code[:, None] * PADDED + d[None, :], mask=open_[:, None], other=0.0)
                    reaches = open_ & (half < float("inf")) & ((_score(q, p, half, beta) > limit) == 0)
                    left = left | tl.where(reaches, 1, 0) << member
                while _any(left != 0):
                    low = left & (0 - left)
                    left = left & (left - 1)
                    candidate = low != 0
                    # 1, 2, 4, 8, ... to the code: member 2j + e is base + 8j + e
                    code = base + tl.where((low & 0xAA) != 0, 1, 0) + tl.where((low & 0xCC) != 0, 8, 0)
                    code += tl.where((low & 0xF0) != 0, 16, 0)
                    rival = candidate & (index != NONE)
                    if _any(rival):
                        unscored = rival & (scored == 0)
                        mine, theirs = _contract(
                            r_at, codebook, index, unscored, code, rival, code_stride_k, code_stride_d,
                            DIM, BM, METRIC,
                        )  # fmt: skip
                        value = tl.where(unscored, mine, value)
                        scored = scored | rival
                        wins = rival & ((theirs < value) | ((theirs == value) & (code < index)))
                        value = tl.where(wins, theirs, value)
                        index = tl.where(wins, code, index)
                    index = tl.where(candidate & (rival == 0), code, index)
                taken = tl.min(tl.where(pending, group, NONE), axis=1)

            if _any(swept):
                for tile in range(tiles * (BK // SWEPT)):
                    t, half = _tile_scores(q, level_codes, level_halves, minus_beta, tile, PADDED, BM, SWEPT)
                    number = tile * SWEPT + tl.arange(0, SWEPT)
                    open_codes = swept[:, None] & (half < float("inf"))[None, :] & ((t > limit[:, None]) == 0)
                    code = tl.min(tl.where(open_codes, number[None, :], NONE), axis=1)  # [BM]
                    while _any(code != NONE):
                        open_codes = open_codes & (number[None, :] != code[:, None])
                        other = tl.min(tl.where(open_codes, number[None, :], NONE), axis=1)
                        open_codes = open_codes & (number[None, :] != other[:, None])
                        mine, theirs = _contract(
                            r_at, codebook, code, code != NONE, other, other != NONE, code_stride_k, code_stride_d,
                            DIM, BM, METRIC,
                        )  # fmt: skip
                        # codes ascend: of equals the first stays
                        wins = (code != NONE) & ((mine < value) | (index == NONE))
                        value = tl.where(wins, mine, value)
                        index = tl.where(wins, code, index)
                        wins = (other != NONE) & (theirs < value)
                        value = tl.where(wins, theirs, value)
                        index = tl.where(wins, other, index)
                        code = tl.min(tl.where(open_codes, number[None, :], NONE), axis=1)
        else:
            taken = tl.min(tl.where(best == lowest[:, None], group, NONE), axis=1)
            base = tl.where(asked, (taken >> 2) * 32 + (taken & 3) * 2, 0)
            least = tl.full((BM,), float("inf"), tl.float32)
            for member in range(8):
                code = base + (member >> 1) * 8 + (member & 1)
                half = tl.load(level_halves + code, mask=asked, other=float("inf"))
                p = tl.load(level_codes + code[:, None] * PADDED + d[None, :], mask=asked[:, None], other=0.0)
                score = _score(q, p, half, beta)
                index = tl.where(score < least, code, index)  # members ascend
                least = tl.minimum(score, least)

        index = tl.where(asked & (index != NONE), index, 0)
        row_at = row_offsets(row, positions, tl.num_programs(1) * positions, 1) + head.to(tl.int64) * positions
        tl.store(indices + row_at * depth + level, tl.where(live, index, -1).to(tl.int64), mask=inside)
        if PADDED > KEPT:
            r_at = scratch + (head.to(tl.int64) * rows + row) * DIM
            r = tl.load(r_at[:, None] + d[None, :], mask=there, other=0.0)
        e_at = codebook + index[:, None].to(tl.int64) * code_stride_k + d[None, :] * code_stride_d
        r = tl.where(there, less(r, tl.load(e_at, mask=there, other=0.0), False), r)
