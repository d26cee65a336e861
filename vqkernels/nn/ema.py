"""Exponential-moving-average codebook updates, unbiased from the first step (van den Oord et al. 2017, appendix A.1).

With counts c and sums s of the rows of each code in one step, and decay g:

    n <- g n + (1 - g) c,    m <- g m + (1 - g) s,    e_k <- m_k / n_k  where c_k > 0.

n and m start at zero, so e_k is a weighted mean of data from its first use on, with no start-up bias and no epsilon;
codes without rows in a step stay where they are. `n / (1 - g^t)` is the unbiased usage after t steps.
"""

import torch
from torch import Tensor


@torch.no_grad()
def ema_update_(
    codebook: Tensor, ema_counts: Tensor, ema_sums: Tensor, counts: Tensor, sums: Tensor, decay: float
) -> None:
    """Updates `codebook (..., K, D)`, `ema_counts (..., K)`, `ema_sums (..., K, D)` in place from one step."""
    ema_counts.lerp_(counts.to(ema_counts.dtype), 1 - decay)
    ema_sums.lerp_(sums.to(ema_sums.dtype), 1 - decay)
    used = (counts > 0).unsqueeze(-1)
    mean = ema_sums / torch.where(used, ema_counts.unsqueeze(-1), 1.0)
    codebook.copy_(torch.where(used, mean.to(codebook.dtype), codebook))
