"""Forwards that run twice: what a layer reads and changes, kept from the first pass for its recomputation.

Activation checkpointing (`torch.utils.checkpoint`, with `use_reentrant` True or False, around a compiled module or
inside of one) runs a forward again in the backward pass. A layer whose forward changes its own state would then see
the changed state and change it again. `enter` gives every forward the state that it saw when it first ran, and says
whether it may change anything. What is kept hangs on a tensor of the layer and goes with it; no checkpoint holds it.

A forward that runs inside a backward pass is a recomputation. Its first pass is found among those kept by a
fingerprint of its rows, and by the checkpoint that runs it. A first pass is kept only where a recomputation may follow:
under the hooks of a checkpoint, in a reentrant one, and in compiled training, where a checkpoint may be part of the
graph. It is kept as long as the checkpoint's part of the graph lives: the second of two backward passes finds it, too.
"""

import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from types import CodeType, FrameType
from typing import Any, NamedTuple

import torch
import torch.utils.checkpoint
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .registration import Operation

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
    """The state that one first pass saw, and the checkpoint that will run it again; None where that is not known."""

    def __init__(self, rows: Tensor, state: list[Tensor], checkpoint: Any) -> None:
        self.fingerprint, self.state, self.uses = _fingerprint(rows), state, 0
        self.checkpoint = None if checkpoint is None else weakref.ref(checkpoint)

    @property
    def done(self) -> bool:
        """It cannot be computed again; or, where no checkpoint is known, has been."""
        return self.uses > 0 if self.checkpoint is None else self.checkpoint() is None


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
        running = list(_running_checkpoints())
        found = _find(owner, rows, len(state), running)
        if found is not None:
            found.uses += 1
            return found.state, True, False
        # Else a first forward inside of a hook or a Function, or one whose layer was switched since it first ran.
        return [x.clone() for x in state], bool(running), grad and not running
    reentrant = None if grad else _reentrant_checkpoint()
    # Hooks count without gradients, too: some layers learn then.
    checkpoint = _hooks_of_checkpoint() if reentrant is None else reentrant
    copies = [x.clone() for x in state] if changes or compiled or checkpoint is not None else state
    if checkpoint is not None or (compiled and grad):
        _keep(owner, _Kept(rows, copies, checkpoint))
    return copies, False, grad or reentrant is not None


def _keep(owner: Tensor, kept: _Kept) -> None:
    """Adds a first pass; those that will not be computed again go, and the oldest of too many unexpected ones."""
    waiting = [x for x in _kept.get(owner, ()) if not x.done]
    unexpected = [x for x in waiting if x.checkpoint is None]
    gone = unexpected[: max(0, len(unexpected) - MOST_POSSIBLE + 1)]
    _kept[owner] = [*(x for x in waiting if x not in gone), kept]


def _find(owner: Tensor, rows: Tensor, number: int, running: list) -> _Kept | None:
    """The first pass of a recomputation: with as much state, the same rows, and of a checkpoint that runs now.

    Where several are left, those of one checkpoint are computed again in their order, and the newest checkpoint first.
    """
    passes = [x for x in _kept.get(owner, ()) if len(x.state) == number]
    if len(passes) > 1:
        same = _fingerprint(rows)
        passes = [x for x in passes if x.fingerprint.equal(same)] or passes
    passes = [x for x in passes if any(_runs(x.checkpoint, frame) for frame in running)] or passes
    if not passes:
        return None
    fewest = min(x.uses for x in passes)
    passes = [x for x in passes if x.uses == fewest]
    newest = passes[-1].checkpoint
    return passes[-1] if newest is None else next(x for x in passes if x.checkpoint == newest)


def _fingerprint(rows: Tensor) -> Tensor:
    """The sum of the bits of some elements spread over all of them, 0-d int64; no copy of the rows is made."""
    some = rows.detach()[tuple(slice(None, None, max(1, size // _FINGERPRINT_SIZE)) for size in rows.shape)]
    return some.contiguous().view(_BITS[some.element_size()]).sum(dtype=torch.int64)


def _hooks_of_checkpoint() -> Any:
    """The hook that will compute saved tensors again; None without one. Those of `save_on_cpu` keep the tensors.

    Every checkpoint makes a hook of its own, which lives as long as a tensor that it was asked to save.
    """
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return None if hooks is None or getattr(hooks[0], "__module__", "") == "torch.autograd.graph" else hooks[1]


def _reentrant_checkpoint() -> Any:
    """The graph node of a checkpoint's Function that runs the forward: torch's, fairscale's, DeepSpeed's, Megatron's.

    Of nested ones the outermost: the others are in no graph yet.
    """
    found = None
    for frame in _frames():
        if _may_run_again(frame.f_code, "forward") and hasattr(node := frame.f_locals.get("ctx"), "run_function"):
            found = node
    return found


def _running_checkpoints() -> Iterator[FrameType]:
    """The calls that compute something again now: of hooks, and of the Functions of reentrant checkpoints."""
    for frame in _frames():
        code = frame.f_code
        if code.co_name == "unpack_hook" and code.co_filename == torch.utils.checkpoint.__file__:
            yield frame
        elif _may_run_again(code, "backward") and hasattr(frame.f_locals.get("ctx"), "run_function"):
            yield frame


def _runs(checkpoint: weakref.ref | None, frame: FrameType) -> bool:
    """Whether the frame is a call of this hook, or the backward pass of this node."""
    made = None if checkpoint is None else checkpoint()
    if made is None:
        return False
    if frame.f_locals.get("ctx") is made:
        return True
    if getattr(made, "__code__", None) is not frame.f_code:
        return False
    enclosed = zip(made.__code__.co_freevars, made.__closure__ or (), strict=True)
    return all(frame.f_locals.get(name) is cell.cell_contents for name, cell in enclosed)


def _frames() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _may_run_again(code: CodeType, method: str) -> bool:
    return code.co_name == method and code.co_varnames[:1] == ("ctx",)


def _fake(owner: Tensor, rows: Tensor, state: list[Tensor], grad: bool) -> list[Tensor]:
    flags = [rows.new_empty((), dtype=torch.bool) for _ in range(2)]
    return [torch.empty_like(x) for x in state] + flags


def _run(backend: str, owner: Tensor, rows: Tensor, state: list[Tensor], grad: bool) -> list[Tensor]:
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
