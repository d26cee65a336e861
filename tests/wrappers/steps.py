"""Three steps of training on fixed data, what comes of them, and when two of those are equal."""

from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from wrappers.cells import CELLS, Model, build, finish_step

STEPS, ELEMENTS, POSITIONS, RATE = 3, 12, 4, 0.1
# The same sums in another order: of two processes, or of a compiler.
NEAR = {"rtol": 1e-4, "atol": 1e-5}


class Result(NamedTuple):
    """What every forward gave, one after the other, and the state dict at the end."""

    outputs: list[Tensor]
    state: dict[str, Tensor]


def batch(step: int, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(ELEMENTS, POSITIONS, 6, generator=torch.Generator().manual_seed(step)) * 2
    return x.to(dtype)


def micro_batches(cell: str, x: Tensor) -> tuple[Tensor, ...]:
    """Of one optimizer step: two where the codebook waits for them, otherwise one."""
    return x.chunk(2 if CELLS[cell][1] == "manual EMA" else 1)


def objective(output: tuple[Tensor, Tensor, Tensor], x: Tensor) -> Tensor:
    reconstruction, _, loss = output
    return (reconstruction - x).square().mean() + loss


def seed_draws(step: int, part: int) -> None:
    """For layers that draw from torch's generator, as their peers do: a framework may draw from it in between."""
    torch.manual_seed(100 * step + part)


def optimizer_of(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=RATE)


def train(
    cell: str,
    model: nn.Module,
    call: Callable[[Tensor], Any] | None = None,
    steps: Iterable[int] = range(STEPS),
    after: Callable[[], None] = lambda: None,
    share: Callable[[Tensor], Tensor] = lambda x: x,
) -> list[Tensor]:
    """The outputs of all forwards of these steps.

    Args:
        call: what is called in the place of the model.
        after: called after each step.
        share: the part of a micro-batch that this process sees.
    """
    call = model if call is None else call
    optimizer, outputs = optimizer_of(model), []
    dtype = next(model.parameters()).dtype
    for step in steps:
        optimizer.zero_grad()
        parts = micro_batches(cell, batch(step, dtype))
        for part, x in enumerate(map(share, parts)):
            seed_draws(step, part)
            output = call(x)
            (objective(output, x) / len(parts)).backward()
            outputs += [value.detach().clone() for value in output]
        optimizer.step()
        finish_step(model)
        after()
    return outputs


@torch.no_grad()
def evaluate(model: nn.Module, call: Callable[[Tensor], Any] | None = None) -> list[Tensor]:
    """The outputs in eval mode on data of its own; the model is left in eval mode."""
    model.eval()
    dtype = next(model.parameters()).dtype
    return [value.clone() for value in (model if call is None else call)(batch(1000, dtype))]


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def result(model: nn.Module, outputs: list[Tensor], call: Callable[[Tensor], Any] | None = None) -> Result:
    state = snapshot(model)
    return Result(outputs + evaluate(model, call), state)


def without_metrics(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the counts of the last forward, which decide nothing, and the counters of draws: no draw comes twice."""
    apart = {"counts", "sample_steps", "dropout_steps"}
    return {name: value for name, value in state.items() if name.rpartition(".")[2] not in apart}


@cache
def plain(cell: str) -> Result:
    """Of the model as it is."""
    model = build(cell)
    return result(model, train(cell, model))


def trained(cell: str, seed: int = 11) -> Model:
    """After three steps, in training mode."""
    model = build(cell, seed)
    train(cell, model)
    return model


def assert_equal_tensors(got: Mapping[Any, Tensor], expected: Mapping[Any, Tensor], **tolerance: float) -> None:
    """Equal dtypes and bits, or as near as the tolerance says."""
    assert set(got) == set(expected)
    for name, value in expected.items():
        assert got[name].dtype == value.dtype, f"{name} is {got[name].dtype}, not {value.dtype}"
        assert got[name].shape == value.shape, f"{name} is {list(got[name].shape)}, not {list(value.shape)}"
        same = got[name].allclose(value, **tolerance) if tolerance else got[name].equal(value)
        assert same, f"{name} differs by {float((got[name].double() - value.double()).abs().max()):g}"


def assert_equal(got: Result, expected: Result, **tolerance: float) -> None:
    assert_equal_tensors(got.state, expected.state, **tolerance)
    assert len(got.outputs) == len(expected.outputs)
    assert_equal_tensors(dict(enumerate(got.outputs)), dict(enumerate(expected.outputs)), **tolerance)
