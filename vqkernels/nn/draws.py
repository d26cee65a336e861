"""Draws of rows: on the device, without a synchronisation, and the same on every rank.

A draw is a function of (seed, step, slot) and of how many rows there are, nothing else: no generator state, so ranks
that agree on these agree on the rows. Positions are drawn by strata: slot j of C takes a row of
[j n / C, (j + 1) n / C), so no row is drawn twice, and with n <= C every row is drawn exactly once.
"""

import torch
from torch import Tensor

from .heads import Rows

_MASK = 0xFFFFFFFF


def _mix(x: Tensor) -> Tensor:
    """A bijective 32-bit hash in int64 arithmetic that never overflows (constants of the hash-prospector project)."""
    x = x ^ (x >> 16)
    x = (x * 0x21F0AAAD) & _MASK
    x = x ^ (x >> 15)
    x = (x * 0x735A2D97) & _MASK
    return x ^ (x >> 15)


def hashed(seed: int, step: Tensor, count: int, stream: int) -> Tensor:
    """`count` integers in [0, 2^32), int64, for a step (0-d int64) and a stream: one stream per purpose."""
    slots = torch.arange(count, device=step.device)
    key = _mix((step + ((seed ^ (seed >> 32)) & _MASK)) & _MASK)
    key = _mix((key + 0x3C6EF372 * (stream + 1)) & _MASK)
    return _mix((slots + key) & _MASK)


def step_key(seed: int, step: Tensor) -> Tensor:
    """A seed of one step, 0-d int64: `step` (0-d int64) counts up from a place that `seed` chooses."""
    start = (seed * 0x9E3779B97F4A7C15) % (1 << 64)
    return step + (start - (1 << 64) if start >= 1 << 63 else start)


def draw_positions(
    seed: int, step: Tensor, total: Tensor, count: int, ascending: bool = False
) -> tuple[Tensor, Tensor]:
    """`count` distinct positions in [0, total), all equally likely, and which of them are real.

    Args:
        total: 0-d int64, on the device.
        ascending: in order, at the price that strata of unequal size make some positions a little likelier.

    Returns:
        positions (count,) int64 and real (count,) bool; `min(total, count)` of them are real.
    """
    slots = torch.arange(count, device=step.device)
    low, high = slots * total // count, (slots + 1) * total // count
    offset = hashed(seed, step, count, stream=0) % (high - low).clamp_min(1)
    positions = low + offset
    if not ascending:
        turn = hashed(seed, step, 1, stream=3)
        positions = (positions + turn) % total.clamp_min(1)
    return positions, high > low


def count_rows(rows: Rows) -> Tensor:
    """How many rows of each codebook count, 0-d int64 on the device."""
    if rows.mask is not None:
        return (rows.mask[0] if rows.batched else rows.mask).sum()
    return torch.full((), rows.number, dtype=torch.int64, device=rows.values.device)


def take_rows(rows: Rows, positions: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """The rows at `positions` among the rows that count, and which of them are there and finite.

    Args:
        positions, real: (C,); a position outside of these rows is not there. Only the rows drawn are read.

    Returns:
        `(H, C, D)` float32 or wider, zeros where nothing is, and usable `(H, C)` bool; H = 1 unless batched.
    """
    values = rows.values.detach().movedim(rows.channel_dim, -1)
    values = values if rows.batched else values.unsqueeze(0)
    dtype = torch.promote_types(values.dtype, torch.float32)
    if rows.number == 0:
        drawn = values.new_zeros((len(values), len(positions), values.shape[-1]), dtype=dtype)
        return drawn, torch.zeros_like(drawn[..., 0], dtype=torch.bool)
    if rows.mask is None:
        here = real & (positions >= 0) & (positions < rows.number)
        flat = positions.clamp(0, rows.number - 1)
    else:
        ranks = (rows.mask[0] if rows.batched else rows.mask).reshape(-1).cumsum(0)  # the ranks[i]-th that counts is i
        here = real & (positions >= 0) & (positions < ranks[-1])
        flat = torch.searchsorted(ranks, positions + 1).clamp_max(rows.number - 1)
    index: tuple[Tensor, ...] = ()
    for size in reversed(rows.shape):
        index = (flat % size, *index)
        flat = flat // size
    drawn = values[(slice(None),) + index].to(dtype)
    usable = here & drawn.isfinite().all(-1)
    return torch.where(usable.unsqueeze(-1), drawn, 0.0), usable
