"""How much of a codebook is in use, from the counts of one step."""

import torch
from torch import Tensor


def perplexity(counts: Tensor) -> Tensor:
    """exp of the entropy of the codes' frequencies `(..., K)`: 1 if one code takes all rows, K if all share them."""
    total = counts.sum(-1, keepdim=True).clamp_min(1)
    frequency = counts.to(torch.float32) / total
    return torch.exp(torch.special.entr(frequency).sum(-1))


def usage(counts: Tensor) -> Tensor:
    """Fraction of codes with at least one row."""
    return (counts > 0).to(torch.float32).mean(-1)


def dead_codes(counts: Tensor) -> Tensor:
    """Number of codes without a row, int64."""
    return (counts == 0).sum(-1)
