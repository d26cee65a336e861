"""k-means++ (Arthur and Vassilvitskii 2007) in rounds: many codes a round, drawn as if one after the other.

k-means++ draws each code among the rows with probability proportional to D², the squared distance to the nearest code
drawn before, which takes K passes over the rows. Here a round proposes many rows by the D² that held when it began, by
an exponential race (the smallest of E_i / D²_i, E_i ~ Exp(1), are draws without replacement), and goes through them in
order: a proposal is accepted with probability D² now / D² then, "now" counting the codes accepted before it in the same
round. Rejection makes proposals for the old weights into draws for the new ones, so the codes are distributed as those
of k-means++ (but for a proposal's being drawn without replacement). One round costs a search of all rows among the new
codes alone: all rounds together one search among K codes. Built are the pairwise distances of the proposals, at most
512 x 512, and a few numbers per row.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..backends import counter

MOST_PROPOSALS = 512
_BLOCK_ELEMENTS = 1 << 21  # row elements widened to float64 at once: 16 MB

Search = Callable[[Tensor, Tensor], Tensor]  # rows, codes -> index of the nearest code of every row


def seed_codes(rows: Tensor, codebook_size: int, seed: Tensor, search: Search) -> Tensor:
    """Numbers of the rows that become codes, int64: `codebook_size` of them, or as many as there are distinct rows.

    rows `(N, D)`, N > 0, finite. Different numbers stand for different vectors.
    """
    numbers = torch.arange(len(rows), device=rows.device)
    distance = torch.ones(len(rows), dtype=torch.float64, device=rows.device)  # the first code: uniformly
    chosen = numbers[:0]
    stream = 0
    while len(chosen) < codebook_size:
        wanted = codebook_size - len(chosen)
        proposals = _propose(distance, min(max(1, 2 * len(chosen)), MOST_PROPOSALS, len(rows)), seed, stream)
        if len(proposals) == 0:  # every row coincides with a code
            break
        chance = counter.uniform(counter.row_keys(seed, stream + 1, numbers[: len(proposals)]))
        accepted = _accept(rows[proposals], distance[proposals], chance, wanted)
        new = proposals[accepted]
        to_new = squared_distances(rows, rows[new], search(rows, rows[new]))
        distance = to_new if len(chosen) == 0 else torch.minimum(distance, to_new)
        chosen = torch.cat([chosen, new])
        stream += 2
    return chosen


def _propose(weight: Tensor, count: int, seed: Tensor, stream: int) -> Tensor:
    """Draws of up to `count` rows without replacement, in the order drawn; rows of weight 0 are never drawn."""
    keys = counter.row_keys(seed, stream, torch.arange(len(weight), device=weight.device))
    times = -counter.uniform(keys).log() / weight
    first = times.topk(count, largest=False, sorted=True)
    return first.indices[first.values.isfinite()]


def _accept(proposals: Tensor, then: Tensor, chance: Tensor, wanted: int) -> Tensor:
    """Which proposals are accepted, in order, as positions. The loop is short and runs on the host."""
    wide = proposals.to(torch.float64)
    between = torch.cdist(wide, wide, compute_mode="donot_use_mm_for_euclid_dist").square().cpu()
    then, chance = then.cpu(), chance.cpu()
    now, accepted = then.clone(), list[int]()
    threshold = chance * then
    for j in range(len(proposals)):
        if float(now[j]) > 0 and (not accepted or float(threshold[j]) < float(now[j])):
            accepted.append(j)
            now = torch.minimum(now, between[j])
            if len(accepted) == wanted:
                break
    return torch.tensor(accepted, dtype=torch.int64, device=proposals.device)


def squared_distances(rows: Tensor, codes: Tensor, indices: Tensor) -> Tensor:
    """|row - its code|^2 in float64, `(N,)`: 0 only where they are equal."""
    step = max(1, _BLOCK_ELEMENTS // rows.shape[1])
    parts = [
        (block.to(torch.float64) - codes[index].to(torch.float64)).square().sum(1)
        for block, index in zip(rows.split(step), indices.split(step), strict=True)
    ]
    return torch.cat(parts) if parts else rows.new_empty(0, dtype=torch.float64)
