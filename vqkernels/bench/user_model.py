"""A user's own model, named by PACKAGE.MODULE:FACTORY: how it is loaded, called, and given a loss."""

import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

FACTORY_HELP = """
PACKAGE.MODULE:FACTORY is imported from here or from what is installed. FACTORY() returns the model, or (model, inputs),
or (model, inputs, loss):
  inputs  a tensor, or a tuple of the arguments of one forward pass; where missing, model.example_inputs() gives them
  loss    a function from what the model returns to a 0-d tensor; where missing, model.example_loss(output), and where
          that is missing too, the sum of the mean squares of all floating tensors that the model returns
"""


class ModelError(ValueError):
    """The model cannot be measured; the message says why."""


@dataclass(frozen=True)
class UserModel:
    """A model with what it is called on and what is minimised."""

    model: nn.Module
    inputs: tuple[Any, ...]
    loss: Callable[[Any], Tensor]


def load(spec: str) -> UserModel:
    """Calls the factory named by `PACKAGE.MODULE:FACTORY`.

    Raises:
        ModelError: the module, the factory or what it returns is wrong; the message says what.
    """
    module_name, colon, name = spec.partition(":")
    if not (module_name and colon and name):
        raise ModelError(f"--model must be PACKAGE.MODULE:FACTORY, got '{spec}'")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever the user's module raises
        raise ModelError(f"importing '{module_name}' failed: {one_line(error)}") from error
    factory = getattr(module, name, None)
    if not callable(factory):
        raise ModelError(f"'{module_name}' has no function '{name}'")
    try:
        made = factory()
    except Exception as error:
        raise ModelError(f"{name}() failed: {one_line(error)}") from error
    model, *rest = made if isinstance(made, tuple) else (made,)
    if not isinstance(model, nn.Module) or len(rest) > 2:
        raise ModelError(f"{name}() must return a torch.nn.Module, (model, inputs) or (model, inputs, loss)")
    if not rest and not hasattr(model, "example_inputs"):
        raise ModelError(f"{name}() returned a model without example_inputs(): return (model, inputs) instead")
    inputs: Any = rest[0] if rest else model.example_inputs()  # type: ignore[operator]
    inputs = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
    loss = rest[1] if len(rest) == 2 else getattr(model, "example_loss", mean_squares)
    return UserModel(model, inputs, loss)


def one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def floating(value: Any) -> list[Tensor]:
    """Floating tensors in a nest of tuples, lists, dicts and dataclasses."""
    found: list[Tensor] = []
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, Tensor):
            found += [leaf] if leaf.is_floating_point() else []
        elif hasattr(leaf, "__dataclass_fields__"):
            found += floating([getattr(leaf, name) for name in leaf.__dataclass_fields__])
    return found


def mean_squares(output: Any) -> Tensor:
    terms = [x.float().square().mean() for x in floating(output) if x.requires_grad]
    if not terms:
        raise ModelError("the model returns no floating tensor with a gradient: return (model, inputs, loss)")
    return torch.stack(terms).sum()
