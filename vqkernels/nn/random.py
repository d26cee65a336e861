"""Random integers and random rows: on the device, without a synchronisation, and the same on every rank.

They depend on (seed, step, slot) and on how many rows there are. There is no generator state: ranks that agree on these
agree on the rows. The hash stays below 2^63, so no int64 overflows. Rows are drawn by strata: slot j of C takes a row
of [j n / C, (j + 1) n / C), so no row is drawn twice, and with n <= C every row is drawn exactly once.
"""

import torch
from torch import Tensor

from .rows import Rows

_MASK = 0xFFFFFFFF
_SEED_KEY = 0x9E3779B9


def _mix(x: Tensor) -> Tensor:
    """A bijective 32-bit hash in int64 arithmetic that never overflows (constants of the hash-prospector project)."""
    x = x ^ (x >> 16)
    x = (x * 0x21F0AAAD) & _MASK
    x = x ^ (x >> 15)
    x = (x * 0x735A2D97) & _MASK
    return x ^ (x >> 15)


def hashed(seed: Tensor, step: Tensor, count: int) -> Tensor:
    """`count` integers in [0, 2^32), int64, that depend on seed, step (both 0-d int64) and their place alone."""
    key = _mix((step + _mixed_seed(seed)) & _MASK)
    return _mix((torch.arange(count, device=step.device) + key) & _MASK)


def _mixed_seed(seed: Tensor) -> Tensor:
    """Any int64 in 32 bits."""
    return _mix((seed ^ ((seed >> 32) * 3) ^ _SEED_KEY) & _MASK)


def step_key(seed: Tensor, step: Tensor) -> Tensor:
    """A seed of one step, 0-d int64: `step` (0-d int64) counts up from a place that `seed` (0-d int64) chooses."""
    return step + (_mixed_seed(seed) << 24)


def fill_seed_(buffer: Tensor, seed: int | None) -> None:
    """Fills a 0-d int64 seed with a number, or where that is None with one of torch's default generator.

    Drawn seeds are below 2^24: an average of buffers in float32 keeps them.
    """
    if seed is None:
        buffer.copy_(torch.randint(0, 1 << 24, (), device="cpu"))
    else:
        buffer.fill_(seed)


def draw_positions(draws: Tensor, total: Tensor, turn: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """As many distinct positions in [0, total) as there are draws, and which of them are real.

    Args:
        draws: (C,) from `hashed`.
        total: 0-d int64, on the device.
        turn: 0-d from `hashed`, by which all positions are turned round, so that every one is equally likely although
            strata differ by one in size. Without it positions ascend.

    Returns:
        positions (C,) int64 and real (C,) bool; `min(total, C)` of them are real.
    """
    count = len(draws)
    edges = torch.arange(count + 1, device=draws.device) * total // count
    low, size = edges[:-1], edges.diff()
    positions = low + draws % size.clamp_min(1)
    if turn is not None:
        positions = (positions + turn) % total.clamp_min(1)
    return positions, size > 0


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
