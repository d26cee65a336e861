"""Codes from data: k-means on a bounded sample of the first training batch, the same codes on every rank.

The sample is the batch, or at most `256 K` rows of it and at most 2^24 elements. In a process group every rank gives
its share of that bound, padded to a fixed size so that uneven and empty ranks meet in one collective; then each
computes the same k-means on the same rows. Masked and non-finite rows are never in it.
"""

import torch
from torch import Tensor

from ..ops.kmeans import kmeans
from .random import count_rows, draw_positions, hashed, take_rows
from .rows import Rows
from .stack_residuals import next_residual
from .synchronisation import DEFAULT, Ranks

ROWS_PER_CODE = 256
MOST_ELEMENTS = 1 << 24


def sample_size(codebook_size: int, dim: int) -> int:
    """The most rows that all ranks together give to the initialisation."""
    return max(codebook_size, min(ROWS_PER_CODE * codebook_size, MOST_ELEMENTS // dim))


@torch.no_grad()
def sample_rows(rows: Rows, codebook_size: int, seed: Tensor, ranks: Ranks = DEFAULT) -> Rows:
    """The rows of all ranks that the codes are computed from; those that count, in the order of ranks and batch."""
    bound = sample_size(codebook_size, rows.values.shape[rows.channel_dim])
    if ranks.size == 1 and rows.number <= bound:
        return rows
    count = -(-bound // ranks.size)
    step = torch.zeros((), dtype=torch.int64, device=rows.values.device)
    sample, usable = take_rows(rows, *draw_positions(hashed(seed, step, count), count_rows(rows)))
    packed = ranks.gather(torch.cat([sample, usable.unsqueeze(-1).to(sample.dtype)], -1), 1)
    return Rows(packed[..., :-1], packed[..., -1] > 0, 2, True)


@torch.no_grad()
def initial_codes(
    rows: Rows, codebook_size: int, metric: str, seed: Tensor, backend: str, ranks: Ranks
) -> tuple[Tensor, Tensor]:
    """One k-means per codebook, as `vqkernels.ops.kmeans` describes it.

    Returns:
        codes `(K, D)`, or `(H, K, D)` for batched rows; and how many of them come from data, 0-d, the least of all
        codebooks.
    """
    sample = sample_rows(rows, codebook_size, seed, ranks)
    codes, distinct = kmeans(
        sample.values,
        codebook_size,
        seed=seed,
        mask=sample.mask,
        channel_dim=sample.channel_dim,
        batched=sample.batched,
        backend=backend,
        metric=metric,
    )
    return codes if sample.batched == rows.batched else codes.squeeze(0), distinct.min()


@torch.no_grad()
def initial_stack(
    rows: Rows, codebook_size: int, levels: int, seed: Tensor, backend: str, shared: bool, ranks: Ranks
) -> tuple[Tensor, Tensor]:
    """Level after level, k-means on what the levels before it leave.

    A shared codebook is computed from the rows together with what a codebook of the rows alone leaves of them.

    Returns:
        codes `(H, Q, K, D)`, or `(H, K, D)` if shared; and how many of the first level's come from data, 0-d.
    """
    sample = sample_rows(rows, codebook_size, seed, ranks)
    values = sample.values.movedim(sample.channel_dim, -1)
    values, mask = (values, sample.mask) if sample.batched else (values[None], _leading(sample.mask))
    values = values.flatten(1, -2).to(torch.promote_types(values.dtype, torch.float32))
    kept = values.new_ones(values.shape[:2], dtype=torch.bool) if mask is None else mask.flatten(1)

    def codes_of(values: Tensor, kept: Tensor, level: int) -> tuple[Tensor, Tensor]:
        return kmeans(values, codebook_size, seed=seed + level, mask=kept, batched=True, backend=backend)

    first, distinct = codes_of(values, kept, 0)
    stack = [first]
    for level in range(1, 2 if shared else levels):
        rest = next_residual(values, stack[-1], kept, "euclidean", backend)
        if shared:
            return codes_of(torch.cat([values, rest], 1), torch.cat([kept, kept], 1), level)[0], distinct.min()
        values = rest
        stack.append(codes_of(values, kept, level)[0])
    return torch.stack(stack, 1), distinct.min()


def _leading(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.unsqueeze(0)
