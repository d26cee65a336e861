"""Takes over the state of a peer's instance into a drop-in layer, and gives it back.

Everything is shared, nothing is copied. Parameters, buffers and child modules are the same objects in both. So an
optimizer continues, hooks of child modules stay, and both learn together. Only objects that a caller *replaces* in one
of them (`.to` replaces buffers) must be shared again.
"""

from collections.abc import Mapping
from typing import TypeVar

from torch import nn

Layer = TypeVar("Layer", bound=nn.Module)

_OF_EVERY_MODULE = frozenset(nn.Module().__dict__)
_STORES = ("_parameters", "_buffers", "_modules")
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
_CALLED = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def share(source: nn.Module, target: nn.Module, *, apart: frozenset[str] = frozenset()) -> None:
    """Gives `target` the objects of `source`: attributes, Parameters, buffers, child modules, training mode.

    Args:
        apart: names of child modules that are not shared.
    """
    share_attributes(source, target)
    for store in _STORES:
        mine, theirs = getattr(target, store), getattr(source, store)
        mine.update({name: value for name, value in theirs.items() if name not in apart})
    target._non_persistent_buffers_set = set(source._non_persistent_buffers_set)
    target.training = source.training


def share_attributes(source: nn.Module, target: nn.Module) -> None:
    """Shares the attributes that are neither tensors nor modules, those set by a user included."""
    for name, value in source.__dict__.items():
        if name not in _OF_EVERY_MODULE:
            target.__dict__[name] = value


def share_hooks(source: nn.Module, target: nn.Module) -> None:
    """Both get the same dictionaries of hooks. So an older handle removes its hook from both."""
    for hooks in _HOOKS:
        target.__dict__[hooks] = source.__dict__[hooks]


def adopt_as(layer: type[Layer], peer: nn.Module, *, apart: frozenset[str] = frozenset()) -> Layer:
    """A new `layer` that shares the state of `peer`, without random numbers, allocation or initialisation."""
    ours = layer.__new__(layer)
    nn.Module.__init__(ours)
    share(peer, ours, apart=apart)
    return ours


def check_unhooked(peer: nn.Module, *names: str) -> None:
    """Refuses a peer whose child modules `names` have hooks: our layers read their weights without calling them.

    Raises:
        ValueError: names the child module.
    """
    for name in names:
        if any(getattr(peer.get_submodule(name), hooks) for hooks in _CALLED):
            raise ValueError(f"its module '{name}' has hooks, which would not be called")


def check_tensors(
    peer: nn.Module, shapes: Mapping[str, tuple[int | None, ...]], attributes: tuple[str, ...] = ()
) -> None:
    """Refuses another class with the same name. It is for peers that are not an installed package.

    Args:
        shapes: shapes of Parameters and buffers, by name.
        attributes: names of other attributes that it must have.

    Raises:
        ValueError: names what is missing or of another shape.
    """
    found = {name: tuple(x.shape) for name, x in (*peer.named_parameters(), *peer.named_buffers())}
    for name, shape in shapes.items():
        if found.get(name) != shape:
            raise ValueError(f"it is another class of that name: '{name}' is {found.get(name)} instead of {shape}")
    for name in attributes:
        if not hasattr(peer, name):
            raise ValueError(f"it is another class of that name: it has no '{name}'")
