"""Revival of dead codes: a code that hardly any row chooses becomes a row of the batch, its statistics with it.

A code is dead when its moving count n_k is below `threshold` times the mean over all codes: usage relative to uniform,
whatever the batch size, and the start-up factor 1 - g^t cancels. A revived code takes the vector e_k = r of a drawn
row, the mean count n_k = sum n / K, and m_k = n_k r, so the next moving average continues from there instead of
overwriting it, and the code has about log(threshold) / log(g) steps to gain rows.

Where the codebook is trained by gradient there is no m, and n decays by 0.99 a step. The optimizer's moments are not
changed: those of a dead code have decayed with its gradients, so the first steps after a revival are ordinary ones.

Rows are drawn on the device without a synchronisation (`vqkernels.nn.random`): at most 1024 a step, each at most once,
never a masked row, never one with a NaN or an infinity. Ranks that agree on seed and step revive the same codes with
the same rows: one all-reduce of fixed size in every step, whether or not a code is dead.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .random import count_rows, draw_positions, hashed, take_rows
from .rows import Rows
from .synchronisation import DEFAULT, Ranks

MOST_PER_STEP = 1024


class Candidates(NamedTuple):
    """Rows that may become codes: `(H, C, D)`, and which of them are usable `(H, C)`."""

    rows: Tensor
    usable: Tensor


def candidate_count(codebook_size: int) -> int:
    return min(codebook_size, MOST_PER_STEP)


def revival_draws(seed: Tensor, step: Tensor, codebook_size: int) -> Tensor:
    """The random integers of one step's revival, `(2 C + 1,)`: C for positions, C for the order, one for the turn."""
    return hashed(seed, step, 2 * candidate_count(codebook_size) + 1)


@torch.no_grad()
def draw_candidates(rows: Rows, draws: Tensor) -> Candidates:
    """Candidates from this rank's rows alone."""
    return Candidates(*take_rows(rows, *draw_positions(draws[: len(draws) // 2], count_rows(rows), draws[-1])))


@torch.no_grad()
def draw_candidates_over_ranks(rows: Rows, draws: Tensor, rows_of_ranks: Tensor, ranks: Ranks = DEFAULT) -> Candidates:
    """Candidates from the joined rows of all ranks, the same on each of them.

    Args:
        rows_of_ranks: (world size,) int64, how many rows count on each rank.
    """
    positions, real = draw_positions(draws[: len(draws) // 2], rows_of_ranks.sum(), draws[-1])
    return _joined(*take_rows(rows, positions - rows_of_ranks[: ranks.rank].sum(), real), ranks)


@torch.no_grad()
def share_candidates(mine: Candidates, draws: Tensor, ranks: Ranks) -> Candidates:
    """Every slot from one of the ranks, the same on all of them; for candidates drawn before the ranks could meet."""
    usable = mine.usable & (draws[: len(draws) // 2] % ranks.size == ranks.rank)
    return _joined(torch.where(usable.unsqueeze(-1), mine.rows, 0.0), usable, ranks)


def _joined(drawn: Tensor, usable: Tensor, ranks: Ranks) -> Candidates:
    drawn, flags = ranks.sum(drawn, usable.to(drawn.dtype))
    return Candidates(drawn, flags > 0)


@torch.no_grad()
def revive_(
    codebook: Tensor,
    counts: Tensor,
    sums: Tensor | None,
    candidates: Candidates,
    threshold: float,
    draws: Tensor,
) -> None:
    """Replaces dead codes in place, as many as there are usable candidates, the lowest index first.

    Args:
        codebook: `(K, D)` or `(H, K, D)`.
        counts: moving counts n `(K,)` or `(H, K)`; replaced with the code.
        sums: moving sums m like the codebook; replaced with the code. None where the codebook is trained by gradient.
    """
    mean = counts.mean(-1, keepdim=True)
    dead = counts < threshold * mean
    # Usable candidates first and shuffled, so that even few dead codes take rows from all over the batch.
    shuffled = draws[len(draws) // 2 : -1].argsort(dim=-1, stable=True)
    unusable = candidates.usable[:, shuffled].logical_not()
    order = shuffled[unusable.to(torch.uint8).argsort(dim=-1, stable=True)]
    # The i-th dead code of a codebook takes its i-th candidate.
    turn = (dead.cumsum(-1) - 1).clamp_min(0).view(len(order), -1)
    available = (turn < candidates.usable.sum(-1, keepdim=True)).view(dead.shape)
    chosen = order.gather(1, turn.clamp_max(order.shape[1] - 1))
    rows = candidates.rows.gather(1, chosen.unsqueeze(-1).expand(-1, -1, codebook.shape[-1]))
    rows, take = rows.view(codebook.shape), dead & available
    codebook.copy_(torch.where(take.unsqueeze(-1), rows.to(codebook.dtype), codebook))
    if sums is not None:
        sums.copy_(torch.where(take.unsqueeze(-1), (mean.unsqueeze(-1) * rows).to(sums.dtype), sums))
    counts.copy_(torch.where(take, mean, counts))
