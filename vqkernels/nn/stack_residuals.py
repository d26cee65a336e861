"""Residuals of rows at each level of a stack of codebooks, for the few rows that initialise or revive codes."""

import torch
from torch import Tensor

from ..ops.nearest import nearest_code
from .revival import Candidates


@torch.no_grad()
def next_residual(values: Tensor, codes: Tensor, mask: Tensor, metric: str, backend: str) -> Tensor:
    """r - e for rows `(H, C, D)` and codebooks `(H, K, D)`; rows that are masked `(H, C)` stay."""
    index = nearest_code(values, codes, mask=mask, metric=metric, backend=backend)
    chosen = codes.gather(1, index.clamp_min(0).unsqueeze(-1).expand(-1, -1, codes.shape[-1]))
    return torch.where(mask.unsqueeze(-1), values - chosen.to(values.dtype), values)


@torch.no_grad()
def residual_candidates(drawn: Candidates, stack: Tensor, shared: bool, metric: str, backend: str) -> Candidates:
    """Candidates for the codebooks of every level from rows of z `(G, C, D)`: what is left of them at that level.

    Args:
        stack: `(G, Q, K, D)`, as it was when the rows were quantized.
        shared: one codebook for all levels, whose c-th candidate is the rest of the c-th row at level c mod Q.

    Returns:
        rows `(G Q, C, D)` and usable `(G Q, C)`, groups outermost; `(G, C, ...)` if shared.
    """
    groups, levels = stack.shape[:2]
    residual, rests = drawn.rows, []
    for q in range(levels):
        rests.append(residual)
        if q + 1 < levels:
            residual = next_residual(residual, stack[:, q].to(residual.dtype), drawn.usable, metric, backend)
    rows = torch.stack(rests, 1)  # (G, Q, C, D)
    if shared:
        slots = torch.arange(rows.shape[2], device=rows.device)
        rows = rows[:, slots % levels, slots]
        return Candidates(rows, drawn.usable & rows.isfinite().all(-1))
    usable = drawn.usable.unsqueeze(1) & rows.isfinite().all(-1)
    return Candidates(rows.flatten(0, 1), usable.flatten(0, 1))
