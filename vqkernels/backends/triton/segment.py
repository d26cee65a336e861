"""Sums of rows by code, in a fixed order: counts and sums for EMA, and the codebook's gradient.

The rows are ordered by a stable sort of their keys, so the rows of a code stand together, ascending. Each code's
stretch is cut into chunks of CHUNK rows counted from its own start; one program sums one chunk (partial_kernel), then
one program per code adds its chunks in order (total_kernel). Which rows are added together, and in which order, depends
on the indices alone: bit-for-bit repeatable, no atomics, and balanced when one code holds most rows. Sums run in
float64 and are rounded once.
Never materialised: a permuted copy of z, a one-hot matrix. Traffic: one gathered read of z; the partial sums (at most
N / CHUNK + occupied codes, D float64 each) written and read once.
RESIDUAL sums e - z instead of z, without the cancellation of n·e - Σz near convergence.
"""

import triton
import triton.language as tl

from vqkernels.backends.triton.gather import narrowed
from vqkernels.backends.triton.rows import working


@triton.jit
def _first_above(ends, count, value):
    """The first position in the ascending `ends` whose entry exceeds `value`."""
    low = tl.full((), 0, tl.int32)
    high = tl.full((), 0, tl.int32) + count
    while low < high:
        middle = (low + high) // 2
        if tl.load(ends + middle) > value:
            high = middle
        else:
            low = middle + 1
    return low


@triton.jit
def partial_kernel(
    z, codebook, order, offsets, chunk_ends, partials,
    rows, positions, codes, groups, stride_b, stride_h, stride_p, stride_d,
    code_stride_h, code_stride_k, code_stride_d,
    DIM: tl.constexpr, CHUNK: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """Sum one chunk. offsets (groups + 1,): where each key starts in `order`; chunk_ends (groups,): running chunks."""
    chunk = tl.program_id(0)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    if chunk < tl.load(chunk_ends + groups - 1):
        group = _first_above(chunk_ends, groups, chunk)
        before = tl.load(chunk_ends + group - 1, mask=group > 0, other=0)
        begin = tl.load(offsets + group) + (chunk - before) * CHUNK
        end = tl.minimum(begin + CHUNK, tl.load(offsets + group + 1))
        if RESIDUAL:
            head = group // codes
            code_at = head.to(tl.int64) * code_stride_h + (group - head * codes).to(tl.int64) * code_stride_k
            e = working(tl.load(codebook + code_at + d * code_stride_d, mask=d < DIM, other=0.0), True)
        total = tl.zeros((BD,), tl.float64)
        for start in range(0, CHUNK, BM):
            slot = begin + start + tl.arange(0, BM)
            inside = slot < end
            flat = tl.load(order + slot, mask=inside, other=0)  # head · rows + row, int64
            head_of_row = flat // rows
            row = flat - head_of_row * rows
            batch = row // positions
            at = batch * stride_b + head_of_row * stride_h + (row - batch * positions) * stride_p
            read = inside[:, None] & (d < DIM)[None, :]
            x = working(tl.load(z + at[:, None] + d[None, :] * stride_d, mask=read, other=0.0), True)  # [BM, BD]
            if RESIDUAL:
                x = tl.where(read, e[None, :] - x, 0.0)
            total += tl.sum(x, axis=0)
        tl.store(partials + chunk.to(tl.int64) * DIM + d, total, mask=d < DIM)


@triton.jit
def total_kernel(
    partials, chunk_ends, grad_loss, elements, sums, codes, stride_h, stride_k, stride_d,
    DIM: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, SCALED: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Add the chunks of one code in order; SCALED multiplies by grad_loss · 2 / elements."""
    group = tl.program_id(0)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    begin = tl.load(chunk_ends + group - 1, mask=group > 0, other=0)
    end = tl.load(chunk_ends + group)
    total = tl.zeros((BD,), tl.float64)
    for start in range(begin, end, BM):
        chunk = start + tl.arange(0, BM)
        read = (chunk < end)[:, None] & (d < DIM)[None, :]
        total += tl.sum(tl.load(partials + chunk[:, None] * DIM + d[None, :], mask=read, other=0.0), axis=0)
    if SCALED:
        factor = 2.0 * tl.load(grad_loss).to(tl.float64) / tl.load(elements).to(tl.float64)
        total = total * factor
        # a code without rows gets 0 even from an infinite or NaN factor
        total = tl.where(end > begin, total, 0.0)
    head = group // codes
    at = head.to(tl.int64) * stride_h + (group - head * codes).to(tl.int64) * stride_k + d * stride_d
    tl.store(sums + at, narrowed(total, sums.dtype.element_ty, INTERPRETED), mask=d < DIM)
