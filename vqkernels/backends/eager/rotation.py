"""The rotation trick's gradient in plain PyTorch: float64, norms that neither overflow nor vanish.

Specified by `vqkernels.reference.rotate`, whose transpose this is. The twin of csrc/cpu/rotation.cpp.
"""

import torch
from torch import Tensor

from ...reference import OPPOSITE


def rotate_gradient(gradient: Tensor, z: Tensor, codes: Tensor) -> Tensor:
    """|e|/|z| (g - 2 (g.w) w + 2 (g.q) u) for float64 rows `(..., D)`; g itself where z or e is zero."""
    u, z_norm, z_exponent = _direction(z)
    q, e_norm, e_exponent = _direction(codes)
    s = u + q
    square = s.square().sum(-1, keepdim=True)
    along_s = torch.where(square > OPPOSITE, (gradient * s).sum(-1, keepdim=True) / square.clamp_min(OPPOSITE), 0.0)
    along_q = (gradient * q).sum(-1, keepdim=True)
    ratio = e_norm / torch.where(z_norm == 0, 1.0, z_norm) * torch.exp2(e_exponent - z_exponent)
    ratio = ratio.clamp_max(torch.finfo(torch.float64).max)  # an infinite ratio would turn a zero into NaN
    turned = ratio * (gradient - 2 * along_s * s + 2 * along_q * u)
    return torch.where((z_norm == 0) | (e_norm == 0), gradient, turned)


def _direction(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x/|x| (0 where x is), and |x| as a number below sqrt(D) times 2^exponent."""
    largest = x.abs().amax(-1, keepdim=True)
    exponent = torch.frexp(largest).exponent.to(torch.float64).clamp(-1000, 1000)
    scaled = x * torch.exp2(-exponent)
    norm = scaled.square().sum(-1, keepdim=True).sqrt()
    return scaled / torch.where(norm == 0, 1.0, norm), norm, exponent
