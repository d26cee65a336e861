"""The backward pass of quantization: allocates, and launches csrc/cuda/backward.cu and statistics.cu.

L = mean of (z - e)² over the unmasked elements, M of them: with respect to z (commitment) the gradient is
2 (z - e) / M, with respect to code k it is Σ 2 (e - z) / M over its rows. Both come from direct residuals.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vqkernels.backends.cuda import launch
from vqkernels.backends.cuda.statistics import LIMIT, codebook_gradient


def quantize_backward(
    incoming: Tensor,
    grad_codebook_loss: Tensor,
    grad_commitment_loss: Tensor,
    z: Tensor,
    codebook: Tensor,
    indices: Tensor,
    gradient: str,
    codebook_gradient_wanted: bool,
    out: Tensor,
) -> tuple[Tensor, Tensor]:
    """Fills `out`, the gradient of z; returns it and that of the codebook, contiguous, or empty if not wanted.

    z, incoming, out (B, H, P, D) of one dtype with any strides; codebook (H, K, D); indices (B, H, P), -1 where masked.
    """
    batch, heads, positions, dim = z.shape
    if batch * heads * positions >= LIMIT:
        raise RuntimeError(f"the CUDA kernels number rows in 31 bits, got {batch * heads * positions}")
    kernels: Any = torch.ops.vqkernels
    elements = torch.count_nonzero(indices >= 0).clamp_min(1) * dim
    with launch.on_device(z):
        kernels.cuda_row_gradient(
            z, codebook, indices, incoming, grad_commitment_loss, elements, gradient == "rotation", out,
            launch.stream(z),
        )  # fmt: skip
    if not codebook_gradient_wanted:
        return out, codebook.new_empty(0)
    return out, codebook_gradient(z, codebook, indices, grad_codebook_loss, elements)
