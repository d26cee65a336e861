"""Wrappers in one process: each takes the name of a cell, trains it wrapped, and returns the result."""

import copy
import io
import pickle
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from wrappers.cells import build
from wrappers.steps import STEPS, Result, result, train


def continued(copied: Callable[[nn.Module], nn.Module], cell: str) -> Result:
    """The first step, then a copy, then the copy's other steps; the original must not notice."""
    original = build(cell)
    outputs = train(cell, original, steps=[0])
    before = copy.deepcopy(original.state_dict())
    model = copied(original)
    outputs += train(cell, model, steps=range(1, STEPS))
    for name, value in original.state_dict().items():
        assert torch.equal(value, before[name]), f"the copy shares {name} with the original"
    return result(model, outputs)


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def compiled(cell: str) -> Result:
    torch.compiler.reset()
    model = build(cell)
    call = torch.compile(model, backend="aot_eager", fullgraph=True)
    return result(model, train(cell, model, call), call)


def checkpointed(around: Callable[[Callable[[Tensor], object], Tensor], object], cell: str) -> Result:
    """Only the layer is recomputed."""
    model = build(cell)
    model.around = around
    return result(model, train(cell, model))


def wholly_checkpointed(cell: str) -> Result:
    """The model is recomputed, and the layer with it."""
    model = build(cell)
    return result(model, train(cell, model, partial(checkpoint, model, use_reentrant=False)))


def checkpoint_around_compiled(cell: str) -> Result:
    torch.compiler.reset()
    model = build(cell)
    inner = torch.compile(model.quantize, backend="aot_eager", fullgraph=True)
    model.around = lambda _, z: checkpoint(inner, z, use_reentrant=False)
    return result(model, train(cell, model))


def compiled_around_checkpoint(cell: str) -> Result:
    torch.compiler.reset()
    model = build(cell)
    model.around = partial(checkpoint, use_reentrant=False)
    call = torch.compile(model, backend="aot_eager", fullgraph=True)
    return result(model, train(cell, model, call), call)


EXACT = {
    "plain": lambda cell: result(model := build(cell), train(cell, model)),
    "deepcopy": partial(continued, copy.deepcopy),
    "pickle": partial(continued, pickled),
    "torch.save": partial(continued, saved),
    "checkpoint": partial(checkpointed, partial(checkpoint, use_reentrant=False)),
    "checkpoint, reentrant": partial(checkpointed, partial(checkpoint, use_reentrant=True)),
    "checkpoint of the model": wholly_checkpointed,
}
COMPILED = {
    "compile": compiled,
    "checkpoint around compile": checkpoint_around_compiled,
    "compile around checkpoint": compiled_around_checkpoint,
}
