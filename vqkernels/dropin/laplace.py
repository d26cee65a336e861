"""Moving averages with Laplace smoothing, as in the ports of Sonnet's quantizer (van den Oord et al. 2017, A.1).

With counts c and sums s of the rows of each code in one step, decay g and n = sum_k N_k:

    N <- g N + (1 - g) c,    m <- g m + (1 - g) s,    e_k <- m_k / ((N_k + eps) / (n + K eps) n).

Every step writes all codes, those without rows too. If no code has ever had a row (n = 0), codes do not change.
"""

import torch
from torch import Tensor

from ..nn.synchronisation import sum_over_ranks
from ..ops.quantize import Quantization
from ..ops.recomputation import Pass, change

Averages = tuple[Tensor, Tensor, Tensor]  # embed (K, D), cluster_size (K,), embed_avg (K, D)


def laplace_step_(
    averages: Averages, result: Quantization, seen: Pass, *, decay: float, eps: float, synchronise: bool
) -> None:
    """One step of the averages from the statistics of a forward. A recomputed forward changes nothing.

    Args:
        synchronise: sum the statistics over the ranks of the default process group, if there is one.
    """
    if seen.first is False:
        return
    counts, sums = result.counts[0], result.sums[0]
    counts, sums = sum_over_ranks(counts, sums) if synchronise else (counts, sums)
    change(seen.first, list(averages), lambda: laplace_update_(*averages, counts, sums, decay, eps))


@torch.no_grad()
def laplace_update_(
    embed: Tensor, cluster_size: Tensor, embed_avg: Tensor, counts: Tensor, sums: Tensor, decay: float, eps: float
) -> None:
    """Updates `embed (K, D)`, `cluster_size (K,)`, `embed_avg (K, D)` in place from one step's counts and sums."""
    cluster_size.mul_(decay).add_(counts.to(cluster_size.dtype), alpha=1 - decay)
    embed_avg.mul_(decay).add_(sums.to(embed_avg.dtype), alpha=1 - decay)
    total = cluster_size.sum()
    smoothed = (cluster_size + eps) / (total + len(cluster_size) * eps) * total
    embed.copy_(torch.where(total > 0, embed_avg / smoothed.unsqueeze(1), embed))
