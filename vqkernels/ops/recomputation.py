"""Forwards that run twice: what a layer reads and changes, kept from the first pass for its recomputation.

Activation checkpointing (`torch.utils.checkpoint`, with `use_reentrant` True or False, around a compiled module or
inside of one) runs a forward again in the backward pass. A layer whose forward changes its own state would then see
the changed state and change it again. `enter` gives every forward the state that it saw when it first ran, and says
whether it may change anything. What is kept hangs on a tensor of the layer and goes with it; no checkpoint holds it.

A forward that runs inside a backward pass is a recomputation. Its first pass is found among those kept by a
fingerprint of its rows. A first pass is kept only where a recomputation may follow: under the hooks of a checkpoint,
in a reentrant one, and in compiled training, where a checkpoint may be part of the graph.
"""

import sys
from collections.abc import Callable, Iterable
from types import CodeType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .registration import Operation

MOST_EXPECTED = 64  # first passes that wait for their recomputation, of one layer
MOST_POSSIBLE = 4  # compiled first passes, of which nothing says whether a recomputation follows
_FINGERPRINT_SIZE = 8  # elements along each axis, at least
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Pass(NamedTuple):
    """What one forward sees of its layer's state, and what it may do to it."""

    state: list[Tensor]  # as the first pass saw it
    again: bool | Tensor  # it is a recomputation, which changes nothing; a 0-d bool tensor while compiling
    learns: bool | Tensor  # it is none, and gradients are recorded or a reentrant checkpoint will record them

    @property
    def first(self) -> bool | Tensor:
        """It is no recomputation: of a layer that learns without gradients too, it changes the state."""
        return self.again.logical_not() if isinstance(self.again, Tensor) else not self.again


class _Kept:
    """The state that one first pass saw."""

    def __init__(self, rows: Tensor, state: list[Tensor], expected: bool) -> None:
        self.fingerprint, self.state, self.expected, self.used = _fingerprint(rows), state, expected, False


_kept: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # a tensor of the layer -> its first passes, oldest first


def enter(owner: Tensor, rows: Tensor, state: list[Tensor], changes: bool = True) -> Pass:
    """Begins a forward in training mode.

    Args:
        owner: a tensor that the layer holds as long as it lives, and that no forward writes to: in a compiled graph a
            tensor is another one after a write.
        rows: what the forward computes with; of one shape and of the same bits when it is computed again. A layer that
            enters twice in a forward with the same rows has another number of `state` there.
        state: the tensors of the layer that the forward reads and that it or a later one changes.
        changes: whether this forward or a later one changes them before the backward pass; they are copied then.
    """
    grad = torch.is_grad_enabled()
    if torch.compiler.is_compiling():
        *seen, again, learns = _enter_compiled(owner, rows, state, grad)
        return Pass(seen, again, learns)
    return Pass(*_enter(owner, rows, [x.detach() for x in state], grad, changes, compiled=False))


def _enter(
    owner: Tensor, rows: Tensor, state: list[Tensor], grad: bool, changes: bool, compiled: bool
) -> tuple[list[Tensor], bool, bool]:
    if torch._C._current_graph_task_id() != -1:
        found = _find(owner, rows, len(state))
        if found is not None:
            found.used = True
            return found.state, True, False
        return [x.clone() for x in state], False, grad  # a forward of its own, inside of a hook or a Function
    expected = _in_checkpoint()  # also without gradients: some layers learn then too
    reentrant = not expected and not grad and _in_reentrant_checkpoint()
    copies = [x.clone() for x in state] if changes or compiled or expected or reentrant else state
    if expected or reentrant or (compiled and grad):
        _keep(owner, _Kept(rows, copies, expected or reentrant))
    return copies, False, grad or reentrant


def _keep(owner: Tensor, kept: _Kept) -> None:
    """Adds a first pass; those that have been computed again go, and the oldest of too many."""
    waiting = [x for x in _kept.get(owner, ()) if not x.used]
    for expected, most in ((True, MOST_EXPECTED - 1), (False, MOST_POSSIBLE - 1)):
        alike = [x for x in waiting if x.expected is expected]
        gone = alike[: max(0, len(alike) - most)]
        waiting = [x for x in waiting if x not in gone]
    _kept[owner] = [*waiting, kept]


def _find(owner: Tensor, rows: Tensor, number: int) -> _Kept | None:
    """The first pass of a recomputation: with as much state and the same rows; the newest that was not found before."""
    passes = [x for x in _kept.get(owner, ()) if len(x.state) == number]
    if len(passes) > 1:
        same = _fingerprint(rows)
        passes = [x for x in passes if x.fingerprint.equal(same)] or passes
    waiting = [x for x in passes if not x.used] or passes
    return waiting[-1] if waiting else None


def _fingerprint(rows: Tensor) -> Tensor:
    """The sum of the bits of some elements spread over all of them, 0-d int64; no copy of the rows is made."""
    some = rows.detach()[tuple(slice(None, None, max(1, size // _FINGERPRINT_SIZE)) for size in rows.shape)]
    return some.contiguous().view(_BITS[some.element_size()]).sum(dtype=torch.int64)


def _in_checkpoint() -> bool:
    """Whether hooks are set that drop saved tensors and compute them again; those of `save_on_cpu` keep them."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None and getattr(hooks[0], "__module__", "") != "torch.autograd.graph"


def _in_reentrant_checkpoint() -> bool:
    """Whether a checkpoint's Function runs the forward, as torch's does, fairscale's, DeepSpeed's and Megatron's."""
    frame = sys._getframe(1)
    while frame is not None:
        if _may_run_again(frame.f_code) and hasattr(frame.f_locals.get("ctx"), "run_function"):
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def _may_run_again(code: CodeType) -> bool:
    return code.co_name == "forward" and code.co_varnames[:1] == ("ctx",)


def _fake(owner: Tensor, rows: Tensor, state: list[Tensor], grad: bool) -> list[Tensor]:
    flags = [rows.new_empty((), dtype=torch.bool) for _ in range(2)]
    return [torch.empty_like(x) for x in state] + flags


def _run(owner: Tensor, rows: Tensor, state: list[Tensor], grad: bool) -> list[Tensor]:
    copies, *flags = _enter(owner, rows, state, grad, True, compiled=True)
    return [x.clone() for x in copies] + [torch.full((), flag, device=rows.device) for flag in flags]


_operation = Operation("enter", "(Tensor owner, Tensor rows, Tensor[] state, bool grad) -> Tensor[]", _fake, _run)


def _enter_compiled(owner: Tensor, rows: Tensor, state: list[Tensor], grad: bool) -> list[Tensor]:
    return _operation("eager", owner, rows.detach(), [x.detach() for x in state], grad)


class _Seen(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, seen: Tensor) -> Tensor:
        return seen.view_as(seen)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        pass

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def as_seen(x: Tensor, seen: Tensor) -> Tensor:
    """The value `seen` of a tensor that has changed since, or will; its gradient is x's."""
    return _Seen.apply(x, seen) if x.requires_grad and torch.is_grad_enabled() else seen


def advance(steps: Tensor, again: bool | Tensor) -> None:
    """Counts one forward; a recomputation does not count."""
    if isinstance(again, Tensor):
        steps.add_(again.logical_not())
    elif not again:
        steps.add_(1)


@torch.no_grad()
def change(allowed: bool | Tensor, state: Iterable[Tensor], write: Callable[[], None]) -> None:
    """Runs `write()`, which changes `state` in place, where that is allowed: decided on the device while compiling."""
    if isinstance(allowed, bool):
        if allowed:
            write()
        return
    state = list(state)
    before = [x.clone() for x in state]
    write()
    for x, old in zip(state, before, strict=True):
        x.copy_(torch.where(allowed, x, old))
