"""A copy that a compiler keeps.

The backward pass of an EMA layer needs the codes that were looked up, and the layer overwrites them in the forward
pass. Inductor (torch 2.13) drops a plain `clone` of a buffer that is mutated later in the same graph, and the
backward pass then reads the new codes; an opaque operator is left alone.
"""

import torch
from torch import Tensor

from .registration import Operation


def _copy(backend: str, x: Tensor) -> Tensor:
    return x.clone()


_snapshot = Operation("snapshot", "(Tensor x) -> Tensor", torch.empty_like, _copy)


def snapshot(x: Tensor) -> Tensor:
    """A copy of `x` without its gradient: same shape, dtype and values."""
    return _snapshot("eager", x.detach())
