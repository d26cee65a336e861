"""What the operators' autograd Functions share: when one is needed, and what it may keep."""

from typing import Any

import torch
from torch import Tensor

from .registration import refuse_vmap
from .snapshot import snapshot


class FusedFunction(torch.autograd.Function):
    """An autograd Function around an operator, with one sentence for torch.vmap."""

    @staticmethod
    def vmap(*_: Any) -> None:
        refuse_vmap()


def is_differentiated(z: Tensor, codebook: Tensor) -> bool:
    """Whether a gradient can reach an input. Where none can, an operator is called without its autograd Function.

    A graph that TorchScript traces or `torch.export` makes is for inference, and cannot hold a Function.
    """
    if not (z.requires_grad or codebook.requires_grad) or not torch.is_grad_enabled():
        return False
    return not torch.jit.is_tracing() and not torch.compiler.is_exporting()


def kept_indices(indices: Tensor) -> Tensor:
    """A copy for the backward pass: the caller owns the indices, and may overwrite them."""
    return snapshot(indices) if torch.compiler.is_compiling() else indices.clone()


def at_least_one(number: Any) -> Any:
    """The number, or 1 where it is 0; an int, or a tensor where it depends on a mask or TorchScript traces."""
    return number.clamp_min(1) if isinstance(number, Tensor) else max(number, 1)
