"""Results of a frozen layer that reach its Parameter without a gradient.

A Parameter that takes no part in a forward makes DistributedDataParallel fail at its second step. The edge from the
results to the Parameter lets it see that the Parameter is done; its `.grad` stays None where nothing synchronises.
"""

import torch
from torch import Tensor


class _Untouched(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, parameter: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        pass

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def untouched(x: Tensor, parameter: Tensor) -> Tensor:
    """x, with an edge to `parameter` along which no gradient flows."""
    return _Untouched.apply(x, parameter)
