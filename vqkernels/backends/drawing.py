"""Draws codes from logits and uniform numbers that were drawn before: the rule that every sampler of a prior shares.

The code is the first, in index order, at which the cumulative probability of the kept codes exceeds u times its end.
All in float64, so that samplers which differ in the rounding of float64 logits alone draw the same codes.
"""

import torch
from torch import Tensor


def guided(logits: Tensor, guidance: float) -> Tensor:
    """Logits (..., K) float64 of interleaved rows (2B, K): with the label, without it, with, without, ...

    Classifier-free guidance of Ho and Salimans 2022: `without + guidance * (with - without)`.
    """
    with_label, without = logits[0::2].to(torch.float64), logits[1::2].to(torch.float64)
    return without + guidance * (with_label - without)


def draw_codes(logits: Tensor, uniform: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """Codes (B,) int64 from logits (B, K) and uniform (B,) float64 in [0, 1).

    Args:
        temperature: above 0; the logits are divided by it.
        top_k: only the k most likely codes are kept; of equals the lowest. 0 keeps all.
        top_p: only the fewest most likely codes whose probability reaches p are kept. 1 keeps all.
    """
    wide = logits.to(torch.float64)
    weights = ((wide - wide.amax(-1, keepdim=True)) / temperature).exp()
    if top_k or top_p < 1:
        ranked, order = weights.sort(dim=-1, descending=True, stable=True)
        if top_k:
            ranked[:, top_k:] = 0
        if top_p < 1:
            before = ranked.cumsum(-1) - ranked
            ranked[before >= top_p * ranked.sum(-1, keepdim=True)] = 0
        weights = torch.zeros_like(weights).scatter_(-1, order, ranked)
    cumulative = weights.cumsum(-1)
    end = cumulative[:, -1:]
    # u < 1 may round to the end itself, which no sum exceeds
    threshold = torch.minimum(uniform[:, None] * end, torch.nextafter(end, torch.zeros_like(end)))
    return (cumulative <= threshold).sum(-1)
