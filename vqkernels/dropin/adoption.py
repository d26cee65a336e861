"""What a drop-in layer takes over from the peer's instance that it replaces, and gives back.

Everything is shared, nothing is copied: Parameters, buffers and child modules are the same objects in both, so an
optimizer goes on, hooks of child modules stay, and what is learned in one is learned in the other. Only what a caller
*replaces* in one of them (`.to` replaces buffers) has to be handed over again.
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
    """Lets `target` hold what `source` holds: attributes, Parameters, buffers, child modules, training mode.

    Args:
        apart: names of child modules that each of the two has for itself.
    """
    share_attributes(source, target)
    for store in _STORES:
        mine, theirs = getattr(target, store), getattr(source, store)
        mine.update({name: value for name, value in theirs.items() if name not in apart})
    target._non_persistent_buffers_set = set(source._non_persistent_buffers_set)
    target.training = source.training


def share_attributes(source: nn.Module, target: nn.Module) -> None:
    """The attributes that are neither tensors nor modules, also those that a user has set."""
    for name, value in source.__dict__.items():
        if name not in _OF_EVERY_MODULE:
            target.__dict__[name] = value


def share_hooks(source: nn.Module, target: nn.Module) -> None:
    """The same dictionaries in both, so that a handle given out before removes its hook from either."""
    for hooks in _HOOKS:
        target.__dict__[hooks] = source.__dict__[hooks]


def adopt_as(layer: type[Layer], peer: nn.Module, *, apart: frozenset[str] = frozenset()) -> Layer:
    """A `layer` that shares the state of `peer`: nothing is drawn, allocated or initialised."""
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
    """Refuses a class that only has the name of the one that is meant: for peers that are no installed package.

    Args:
        shapes: of Parameters and buffers, by name.
        attributes: what else it must have.

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
