"""What the operators' autograd Functions share: when one is needed, and what it may keep."""

from typing import Any

import torch
from torch import Tensor

from .snapshot import snapshot


def is_differentiated(z: Tensor, codebook: Tensor) -> bool:
    """Whether a gradient can reach an input. Where none can, an operator is called without its autograd Function.

    A Function cannot be written into a TorchScript or ONNX graph, so that none is taken while tracing: a traced layer is
    for inference.
    """
    return (z.requires_grad or codebook.requires_grad) and torch.is_grad_enabled() and not torch.jit.is_tracing()


def kept_indices(indices: Tensor) -> Tensor:
    """A copy for the backward pass: the caller owns the indices, and may overwrite them."""
    return snapshot(indices) if torch.compiler.is_compiling() else indices.clone()


def at_least_one(number: Any) -> Any:
    """The number, or 1 where it is 0; an int, or a tensor where it depends on a mask or TorchScript traces."""
    return number.clamp_min(1) if isinstance(number, Tensor) else max(number, 1)
