"""Ward's agglomeration (Ward 1963): from many small clusters to K, each time by the merges that cost least.

Joining clusters of n_i and n_j rows with means c_i and c_j raises the sum of squared distances by exactly
n_i n_j / (n_i + n_j) |c_i - c_j|^2. Two clusters that are each other's cheapest partner are merged by Ward's procedure
sooner or later whatever else is merged (Bruynooghe 1978), so a round merges many such pairs, the cheapest half of them.
Of the C x C costs one block of rows exists at a time.
"""

import torch
from torch import Tensor

_BLOCK_ELEMENTS = 1 << 21  # costs alive at once: 16 MB of float64


def merge_clusters(means: Tensor, counts: Tensor, wanted: int) -> Tensor:
    """`wanted` means `(wanted, D)` float64 from means `(C, D)` float64 and counts `(C,)` of at least 1."""
    means, counts = means - (centre := means.mean(0)), counts.to(torch.float64)
    while len(means) > wanted:
        cost, partner = _cheapest_partners(means, counts)
        numbers = torch.arange(len(means), device=means.device)
        first = ((partner[partner] == numbers) & (numbers < partner)).nonzero().squeeze(1)
        if len(first) == 0:  # rounding made the cheapest pair's two costs differ
            first = cost.argmin()[None]
        pairs = max(1, min(len(means) - wanted, (len(first) + 1) // 2))
        first = first[cost[first].sort(stable=True).indices[:pairs]]
        second = partner[first]
        total = counts[first] + counts[second]
        joined = (means[first] * counts[first, None] + means[second] * counts[second, None]) / total[:, None]
        means[first], counts[first] = joined, total
        kept = torch.ones(len(means), dtype=torch.bool, device=means.device)
        kept[second] = False
        means, counts = means[kept], counts[kept]
    return means + centre


def _cheapest_partners(means: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """For every cluster the lowest cost of a merge, and with which other cluster."""
    square = means.square().sum(1)
    step = max(1, _BLOCK_ELEMENTS // len(means))
    costs, partners = [], []
    for start in range(0, len(means), step):
        block = slice(start, start + step)
        cost = torch.addmm(square[None], means[block], means.T, alpha=-2).add_(square[block, None]).clamp_min_(0)
        cost.mul_(counts[block, None]).mul_(counts / (counts[block, None] + counts))
        cost.diagonal(start).fill_(torch.inf)
        lowest = cost.min(1)
        costs.append(lowest.values)
        partners.append(lowest.indices)
    return torch.cat(costs), torch.cat(partners)
