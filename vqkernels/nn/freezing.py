"""Results of a frozen layer that reach its Parameter without a gradient.

A Parameter that takes no part in a forward makes DistributedDataParallel fail at its second step. The edge from the
results to the Parameter lets it see that the Parameter is done; its `.grad` stays None where nothing synchronises.
"""

import torch
from torch import Tensor, nn


class Freezable(nn.Module):
    """A layer whose codebook can be frozen; `frozen` holds in every forward, for copies and pickles too."""

    frozen = False

    def freeze(self, frozen: bool = True) -> "Freezable":
        """Leaves codebook and statistics as they are in every forward from now on; `freeze(False)` lets them learn."""
        self.frozen = frozen
        return self


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


def untouched(parameter: Tensor, *results: Tensor) -> tuple[Tensor, ...]:
    """Results of a forward, with an edge to `parameter` along which no gradient flows."""
    if not (parameter.requires_grad and torch.is_grad_enabled()):
        return results
    return tuple(_Untouched.apply(x, parameter) for x in results)
