"""How a drop-in is held against its peer: same codes, outputs, losses, gradients, buffers and keys.

An index may differ in one row of a thousand, and only where float64 shows ours to be nearer or as near: the peers'
expanded float32 distances are not exact. Such rows are left out where outputs are compared.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def assert_same_codes(ours: Tensor, theirs: Tensor, rows: Tensor, codes: Tensor) -> Tensor:
    """Rows (N, D) that chose codes (K, D); returns where both chose the same."""
    ours, theirs = ours.reshape(-1), theirs.reshape(-1)
    assert ours.dtype == theirs.dtype == torch.int64 and ours.shape == theirs.shape == rows.shape[:1]
    differ = ours != theirs
    assert differ.sum() <= max(1, len(rows) // 1000), f"{int(differ.sum())} of {len(rows)} indices differ"
    rows, codes = rows.double()[differ], codes.double()
    mine = (rows - codes[ours[differ]]).square().sum(1)
    other = (rows - codes[theirs[differ]]).square().sum(1)
    assert (mine <= other).all()
    return ~differ


def assert_same_state(ours: nn.Module, theirs: nn.Module, **tolerance: float) -> None:
    """The state dicts: key for key in order, shapes, dtypes, values."""
    mine, other = ours.state_dict(), theirs.state_dict()
    assert list(mine) == list(other)
    for key, value in mine.items():
        assert value.dtype == other[key].dtype and value.shape == other[key].shape, key
        torch.testing.assert_close(value, other[key], msg=lambda m, key=key: f"{key}: {m}", **tolerance)


def load_both_ways(ours: nn.Module, theirs: nn.Module) -> None:
    """Ours takes their checkpoint; then they take ours, of other values."""
    ours.load_state_dict(theirs.state_dict())
    assert_same_state(ours, theirs, rtol=0, atol=0)
    state = {key: value + 1 if value.is_floating_point() else value for key, value in ours.state_dict().items()}
    ours.load_state_dict(state)
    theirs.load_state_dict(ours.state_dict())
    assert_same_state(ours, theirs, rtol=0, atol=0)


def gradients(layer: nn.Module, z: Tensor, outputs: Callable[[Any], list[Tensor]], seed: int = 1) -> list[Tensor]:
    """Gradients of z and of every Parameter under random incoming gradients on all differentiable outputs at once."""
    z = z.detach().clone().requires_grad_()
    results = [x for x in outputs(layer(z)) if x.requires_grad]
    generator = torch.Generator().manual_seed(seed)
    incoming = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in results]
    wanted = [z, *layer.parameters()]
    found = torch.autograd.grad(results, wanted, incoming, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(wanted, found, strict=True)]


def train(model: nn.Module, loss_of: Callable[[nn.Module, Tensor], Tensor], batches: list[Tensor]) -> list[float]:
    """Steps of SGD, one per batch; returns the losses."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.05) if parameters else None
    losses = []
    for z in batches:
        loss = loss_of(model, z)
        if optimizer is not None:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(float(loss.detach()))
    return losses
