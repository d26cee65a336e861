"""Orthogonal regularisation of a codebook (Shin et al. 2021, "Translation-equivariant Image Quantizer for
Bi-directional Image-Text Generation", section 3.2): codes that point apart."""

import torch
from torch import Tensor, nn

from .arguments import check_number
from .normalisation import unit


def orthogonal_loss(codebook: Tensor, used: Tensor | None = None) -> Tensor:
    """`(1 / K^2) || E E^T - I ||^2` of the codes scaled to length one, 0-d float32 or wider; the mean over codebooks.

    E E^T is K x K, but its squared norm is that of E^T E, which is D x D, and its diagonal is known: nothing of
    size K x K is built.

    Args:
        codebook: `(K, D)` or `(H, K, D)`.
        used: bool `(K,)` or `(H, K)`; only these codes are pushed apart, and K is how many they are.
    """
    if codebook.dim() not in (2, 3):
        raise ValueError(f"codebook must be (K, D) or (H, K, D), got {list(codebook.shape)}")
    codes = unit(codebook)
    if used is None:
        number = torch.full(codebook.shape[:-2], codebook.shape[-2], dtype=codes.dtype, device=codes.device)
    else:
        if used.shape != codebook.shape[:-1] or used.dtype != torch.bool:
            raise ValueError(f"used must be bool {list(codebook.shape[:-1])}, got {used.dtype} {list(used.shape)}")
        codes = codes * used.unsqueeze(-1)
        number = used.sum(-1).to(codes.dtype)
    with torch.autocast(codes.device.type, enabled=False):
        gram = codes.mT @ codes
        diagonal = codes.square().sum(-1)  # 1, or 0 for a zero code
        squared = gram.square().sum((-2, -1)) - 2 * diagonal.sum(-1) + number
    return (squared / number.square().clamp_min(1)).mean()


class OrthogonalRegularization(nn.Module):
    """`weight * orthogonal_loss(codebook)`, to be added to the loss of a codebook that is trained by gradient.

        regularization = OrthogonalRegularization(weight=10.0)
        loss = loss + regularization(quantizer.codebook)

    Args:
        weight: a finite number, at least 0.
    """

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        check_number("weight", weight, 0)
        self.weight = weight

    def forward(self, codebook: Tensor, used: Tensor | None = None) -> Tensor:
        return self.weight * orthogonal_loss(codebook, used)

    def extra_repr(self) -> str:
        return f"weight={self.weight}"
