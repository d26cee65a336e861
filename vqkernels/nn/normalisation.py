"""Vectors of length one, for cosine codebooks: safe at zero, at any scale, and under autocast."""

import torch
from torch import Tensor


def unit(x: Tensor, channel_dim: int = -1) -> Tensor:
    """x over its euclidean norm along `channel_dim`, float32 (float64 where x is).

    The norm is summed in float64, where no square of a float32 over- or underflows. A zero vector stays zero, and the
    gradient passes it unscaled instead of being divided by nearly nothing.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    norm = torch.linalg.vector_norm(x, dim=channel_dim, keepdim=True, dtype=torch.float64)
    return x / torch.where(norm > 0, norm, 1.0).to(x.dtype)
