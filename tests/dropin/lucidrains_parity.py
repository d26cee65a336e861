"""How a layer of ours is held against the peer's: results, gradients, and state, key for key."""

from typing import Any

import torch
from torch import Tensor


def batch(shape: tuple[int, ...], seed: int, arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.float64 if arguments.get("double") else torch.float32
    x = torch.randn(shape, generator=generator, dtype=dtype)
    return x.clone().requires_grad_(), x.clone().requires_grad_()


def assert_state_equal(ours: torch.nn.Module, theirs: torch.nn.Module, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    one, other = ours.state_dict(), theirs.state_dict()
    assert list(one) == list(other)
    for name in one:
        assert one[name].shape == other[name].shape and one[name].dtype == other[name].dtype, name
        torch.testing.assert_close(one[name], other[name], rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def assert_results_equal(ours: tuple, theirs: tuple, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype and one.requires_grad == other.requires_grad
        torch.testing.assert_close(one, other, rtol=rtol, atol=atol)


def assert_gradients_equal(ours: torch.nn.Module, theirs: torch.nn.Module, rtol: float = 1e-4, atol: float = 1e-6):
    others = dict(theirs.named_parameters())
    assert set(dict(ours.named_parameters())) == set(others)
    for name, parameter in ours.named_parameters():
        one, other = parameter.grad, others[name].grad
        if other is None or not other.any():
            assert one is None or not one.any(), name
        else:
            torch.testing.assert_close(one, other, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def objective(results: tuple, seed: int = 7) -> Tensor:
    """A loss that weighs every element of quantized differently."""
    weight = torch.randn(results[0].shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (results[0] * weight.to(results[0].dtype)).sum() + 3 * results[2].sum()
