"""Ward's agglomeration (Ward 1963): from many small clusters to K, each time by the merge that costs least.

Joining clusters of n_i and n_j rows with means c_i and c_j raises the sum of squared distances by exactly
|c_i - c_j|^2 / (1/n_i + 1/n_j). Three facts turn what would be one merge at a time into some tens of rounds, and keep
the costs of most pairs from being computed twice:

- Two clusters that are each other's cheapest partner are merged sooner or later whatever else is (Bruynooghe 1978).
- Their union is no cheaper for a third cluster than the cheaper of the two was. So what a search has found, the
  cheapest partner and the cost of the second cheapest, is a lower bound of all costs from then on. Where the partner
  is merged, its union is the new partner if it costs no more than the second did; otherwise the cluster is searched for
  again, but only when the merges have become so expensive.
- Let M merges be left and T be the M-th smallest of all clusters' lowest costs. Fewer than M merges cost less than T,
  for only the clusters below T take part in them. So all pairs of the first kind up to T are among the M cheapest.

Of the C x C costs one block of rows exists at a time.
"""

import torch
from torch import Tensor

_BLOCK_ELEMENTS = 1 << 21  # costs alive at once: 16 MB of float64, and as many weights
_TIE = 2.0**-40  # costs that differ by less of themselves are equal: among many equal ones the partner stays


def merge_clusters(means: Tensor, counts: Tensor, wanted: int) -> Tensor:
    """`wanted` means `(wanted, D)` float64 from means `(C, D)` float64 and counts `(C,)` of at least 1."""
    means, counts = means - (centre := means.mean(0)), counts.to(torch.float64)
    partner = torch.arange(len(means), device=means.device)
    unknown = torch.ones_like(partner, dtype=torch.bool)  # who the partner is
    cost = means.new_zeros(len(means))  # of a merge with the partner; a lower bound where it is unknown
    second = cost.clone()  # a lower bound of a merge with anyone else; the same one where the partner is unknown
    while (left := len(means) - wanted) > 0:
        limit = cost.sort().values[min(left, len(means)) - 1]
        asked = (unknown & (cost <= limit)).nonzero().squeeze(1)
        if len(asked) > 0:
            partner[asked], second[asked] = _cheapest_partners(means, counts, asked)
            cost[asked] = _costs(means, counts, asked, partner[asked])
            unknown[asked] = False
        numbers = torch.arange(len(means), device=means.device)
        mutual = (partner[partner] == numbers) & (numbers < partner) & ~unknown & ~unknown[partner]
        first = (mutual & (cost <= limit)).nonzero().squeeze(1)
        if len(first) == 0:
            if len(asked) > 0:  # they have turned out more expensive, and the limit with them
                continue
            first = cost.masked_fill(unknown, torch.inf).argmin()[None]  # rounding made a pair's two costs differ
        first = first[cost[first].sort(stable=True).indices[:left]]
        other = partner[first]
        total = counts[first] + counts[other]
        means[first] = (means[first] * counts[first, None] + means[other] * counts[other, None]) / total[:, None]
        counts[first] = total
        cost[first] = second[first] = torch.minimum(second[first], second[other])
        unknown[first] = True
        union = numbers.index_copy(0, other, first)
        partner = union[partner]
        merged, kept = torch.zeros_like(unknown), torch.ones_like(unknown)
        merged[first], kept[other] = True, False
        left_alone = (merged[partner] & kept & ~merged & ~unknown).nonzero().squeeze(1)
        with_union = _costs(means, counts, left_alone, partner[left_alone])
        cost[left_alone] = torch.minimum(with_union, second[left_alone])
        unknown[left_alone] = with_union > second[left_alone] * (1 + _TIE)
        partner = (kept.cumsum(0) - 1)[partner[kept]]
        means, counts, cost, second, unknown = (x[kept] for x in (means, counts, cost, second, unknown))
    return means + centre


def _cheapest_partners(means: Tensor, counts: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """For the clusters of these numbers: with which other one a merge costs least, and the second lowest cost."""
    square, one, inverse = means.square().sum(1, keepdim=True), means.new_ones(len(means), 1), 1 / counts
    mine, others = torch.cat([-2 * means, square, one], 1), torch.cat([means, one, square], 1).T.contiguous()
    partners, seconds = [], []
    step = min(len(rows), max(1, _BLOCK_ELEMENTS // len(means)))
    costs, weights = means.new_empty(2, step, len(means))  # made once: fresh memory costs as much as the sums
    for block in rows.split(step):
        cost, weight = costs[: len(block)], weights[: len(block)]
        torch.mm(mine[block], others, out=cost)
        cost.div_(torch.add(inverse[block, None], inverse, out=weight))
        partner = cost.scatter_(1, block[:, None], torch.inf).min(1).indices
        partners.append(partner)
        seconds.append(cost.scatter_(1, partner[:, None], torch.inf).amin(1))
    return torch.cat(partners), torch.cat(seconds)


def _costs(means: Tensor, counts: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """What the merges of these pairs cost: the same bits for either order of a pair."""
    weight = counts[first] * counts[second] / (counts[first] + counts[second])
    return (means[first] - means[second]).square().sum(1) * weight
