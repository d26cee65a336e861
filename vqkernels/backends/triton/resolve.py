"""After the candidate pass: merge the splits, decide what the certificate can decide, list the rest.

Fused: ordered merge of (best, second, group), threshold, fp32 re-check of the eight codes of the winning group,
compaction of the undecided rows. Traffic per row: 12 bytes per split, one packed row, eight packed codes (from cache).

A row is decided when no other group reaches the threshold (or holds any code that may be chosen) and exactly one code
of the winning group does: then that code is the contract's choice. The eight scores are summed in fp32 in another order
than the tensor core's; the certificate allows any order (margin.py). Undecided rows go to a list per head. Its order
depends on timing, the result does not: each row is rescored on its own.
Codes settled without any scores: a masked row (norm < 0) gets -1, a poisoned row (norm NaN) and a row for which every
code is non-finite (best = inf) get 0.
"""

import triton
import triton.language as tl

from vqkernels.backends.triton.margin import threshold
from vqkernels.backends.triton.rows import STATE


@triton.jit
def resolve_kernel(
    packed_rows, packed_codes, half_norms, beta, norm_in, error_in, state, best_in, second_in, winner_in,
    indices, threshold_out, undecided, counters,
    rows, padded_rows, padded_codes, splits,
    PADDED: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, METRIC: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    heads = tl.num_programs(1)
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    inside = row < rows
    at = head.to(tl.int64) * padded_rows + row

    best = tl.full((BM,), float("inf"), tl.float32)
    second = tl.full((BM,), float("inf"), tl.float32)
    winner = tl.zeros((BM,), tl.int32)
    for split in range(splits):
        from_split = at + (heads * split).to(tl.int64) * padded_rows
        v = tl.load(best_in + from_split, mask=inside, other=float("inf"))
        s = tl.load(second_in + from_split, mask=inside, other=float("inf"))
        w = tl.load(winner_in + from_split, mask=inside, other=0)
        second = tl.minimum(tl.minimum(second, s), tl.maximum(best, v))
        winner = tl.where(v < best, w, winner)
        best = tl.minimum(best, v)

    norm = tl.load(norm_in + at, mask=inside, other=-1.0)
    error = tl.load(error_in + at, mask=inside, other=0.0)
    radius = tl.load(state + head * STATE + 1).to(tl.float32, bitcast=True)
    spread = tl.load(state + head * STATE + 2).to(tl.float32, bitcast=True)
    limit = threshold(best, norm, error, radius, spread, PADDED, METRIC)

    member = tl.arange(0, 8)  # member 2j + e of group (block of 32, lane) is code 32·block + 8j + 2·lane + e
    offset = (member >> 1) * 8 + (member & 1)
    code = ((winner >> 2) * 32 + (winner & 3) * 2)[:, None] + offset[None, :]  # [BM, 8]
    first_code = head.to(tl.int64) * padded_codes
    product = tl.zeros((BM, 8), tl.float32)
    for start in tl.static_range(0, PADDED, BD):
        d = start + tl.arange(0, BD)
        q = tl.load(packed_rows + at[:, None] * PADDED + d[None, :], mask=inside[:, None], other=0.0)
        p = tl.load(packed_codes + ((first_code + code) * PADDED)[:, :, None] + d[None, None, :])  # [BM, 8, BD]
        product += tl.sum(q.to(tl.float32)[:, None, :] * p.to(tl.float32), axis=2)
    half = tl.load(half_norms + first_code + code)
    score = half - product * tl.load(beta + at, mask=inside, other=0.0)[:, None]
    possible = (half < float("inf")) & ((score > limit[:, None]) == 0)
    survivors = tl.sum(possible.to(tl.int32), axis=1)
    index = tl.min(tl.where(possible, code, 0x7FFFFFFF), axis=1)
    proved = ((second > limit) | (second == float("inf"))) & (survivors == 1)

    masked = norm < 0.0
    settled = (norm != norm) | (best == float("inf"))
    index = tl.where(settled, 0, index)
    index = tl.where(masked, -1, index)
    decided = inside & (masked == 0) & (proved | settled)
    open_ = inside & (masked == 0) & ((proved | settled) == 0)
    tl.store(indices + head.to(tl.int64) * rows + row, index.to(tl.int64), mask=inside & (open_ == 0))

    # counters: [decided rows of all heads, undecided rows of head 0, head 1, ...]
    tl.atomic_add(counters, tl.sum(decided.to(tl.int64), axis=0))
    position = tl.cumsum(open_.to(tl.int32), axis=0) - 1
    base = tl.atomic_add(counters + 1 + head, tl.sum(open_.to(tl.int64), axis=0))
    list_at = undecided + head.to(tl.int64) * rows + base + position
    tl.store(list_at, row, mask=open_)
    tl.store(threshold_out + at, limit, mask=open_)


@triton.jit
def merge_kernel(
    norm_in, best_in, winner_in, indices, counters, rows, padded_rows, splits,
    BM: tl.constexpr,
):  # fmt: skip
    """The uncertified end: the lowest score of the splits, the lower code on ties. All rows count as decided."""
    head = tl.program_id(1)
    heads = tl.num_programs(1)
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    inside = row < rows
    at = head.to(tl.int64) * padded_rows + row
    best = tl.full((BM,), float("inf"), tl.float32)
    winner = tl.zeros((BM,), tl.int32)
    for split in range(splits):
        from_split = at + (heads * split).to(tl.int64) * padded_rows
        v = tl.load(best_in + from_split, mask=inside, other=float("inf"))
        w = tl.load(winner_in + from_split, mask=inside, other=0)
        winner = tl.where(v < best, w, winner)
        best = tl.minimum(best, v)
    norm = tl.load(norm_in + at, mask=inside, other=-1.0)
    index = tl.where((norm != norm) | (best == float("inf")), 0, winner)
    tl.store(indices + head.to(tl.int64) * rows + row, tl.where(norm < 0.0, -1, index).to(tl.int64), mask=inside)
    tl.atomic_add(counters, tl.sum((inside & ((norm < 0.0) == 0)).to(tl.int64), axis=0))
