"""A model beside a copy with its quantizers swapped: how much their results differ, and the time of each.

Both get the same inputs and random numbers. Outputs and gradients are compared, and whole steps are timed in turn. The
calls that reach the quantizers in one step are recorded, so that the quantizers can be measured alone on these inputs.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from vqkernels.dropin.swap import ADAPTERS, Report, swap_quantizers

from .timing import Timing, interleave
from .user_model import ModelError, UserModel, floating, one_line

WORTH_IT = 1.05  # measured gain below which the swap is said not to be worth it
_METHODS = ("forward", "encode", "decode")  # the ways into a quantizer


@dataclass(frozen=True)
class RecordedCall:
    """One call of a quantizer at `path`, with arguments that no longer belong to a graph."""

    path: str
    method: str
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    indices: int  # how many it returned: one per quantized row


@dataclass(frozen=True)
class Difference:
    """The difference of two runs. `floats`: the largest difference of floating tensors over the largest magnitude."""

    floats: float
    integers: int  # how many differ
    of: int

    def __str__(self) -> str:
        told_floats = f"{self.floats:.1e} of the largest value"
        return f"{told_floats}, {self.integers} of {self.of} integers differ" if self.of else told_floats


def known_quantizers(model: nn.Module) -> Report:
    """`swap_quantizers`, for a model that must hold one."""
    report = swap_quantizers(model)
    if not report:
        raise ModelError(f"no known quantizer was found; known are {', '.join(ADAPTERS)}")
    return report


class ModelPair:
    """A user's model as it is, and a copy whose quantizers are swapped, each in a holder, so that it may itself be one.

    Args:
        again: makes another model like it, where it cannot be copied: those with torch's older weight norm cannot.
        swap: replaces the quantizers below a module, in place.

    Raises:
        ModelError: in one sentence, where the model cannot be measured; or of `swap`.
    """

    def __init__(
        self, model: UserModel, again: Callable[[], UserModel], swap: Callable[[nn.Module], Report] = known_quantizers
    ) -> None:
        self.model = model
        self.original = nn.Sequential(model.model.train())
        self.trains = True  # while it is looked at; what is initialised from the first batch is initialised now
        self.trains = any(x.requires_grad for x in floating(self.output(self.original)))
        if self.trains:
            self.loss(self.original)
        else:
            self.original.eval()
        self.swapped = self._copy(again)
        self.report = swap(self.swapped)

    def _copy(self, again: Callable[[], UserModel]) -> nn.Sequential:
        try:
            return copy.deepcopy(self.original)
        except Exception:  # whatever a part of the model raises
            other = nn.Sequential(again().model).train(self.original.training)
        try:
            other.load_state_dict(self.original.state_dict())
        except Exception as error:
            raise ModelError(f"the model can neither be copied nor made twice: {one_line(error)}") from error
        return other

    def output(self, holder: nn.Sequential) -> Any:
        """The model's output, with the same random numbers for both models."""
        torch.manual_seed(0)
        try:
            with torch.set_grad_enabled(self.trains and torch.is_grad_enabled()):
                return holder[0](*self.model.inputs)
        except Exception as error:
            raise ModelError(f"the model failed: {one_line(error)}") from error

    def loss(self, holder: nn.Sequential) -> Tensor:
        output = self.output(holder)
        try:
            loss = self.model.loss(output)
        except ModelError:
            raise
        except Exception as error:
            raise ModelError(f"the loss failed: {one_line(error)}") from error
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            raise ModelError("the loss must be one number with a gradient")
        return loss.sum()

    def compare(self) -> dict[str, Difference]:
        """Compares outputs in eval mode, and the gradients of one step if there are any. Leaves both in train mode."""
        found = {}
        with torch.no_grad():
            outputs = [self.output(x.eval()) for x in (self.original, self.swapped)]
        found["outputs"] = difference(*outputs)
        if self.trains:
            gradients = []
            for holder in (self.original.train(), self.swapped.train()):
                state = copy.deepcopy(holder.state_dict())  # a forward in train mode may move the codebook
                parameters = [p for p in holder.parameters() if p.requires_grad]
                gradients.append(torch.autograd.grad(self.loss(holder), parameters, allow_unused=True))
                holder.load_state_dict(state)
            found["gradients"] = difference(*gradients)
        return found

    def step(self, holder: nn.Sequential) -> Callable[[], None]:
        """One training step; a forward if no output has a gradient."""
        if not self.trains:
            return lambda: self.output(holder)
        optimizer = torch.optim.Adam((p for p in holder.parameters() if p.requires_grad), lr=1e-5)

        def step() -> None:
            optimizer.zero_grad()
            self.loss(holder).backward()
            optimizer.step()

        return step

    def calls(self) -> list[RecordedCall]:
        """The calls that reach the swapped quantizers in one step, in order."""
        found: list[RecordedCall] = []
        paths = list(dict.fromkeys(entry.name for entry in self.report.swapped))
        state = copy.deepcopy(self.original.state_dict())  # a forward in train mode may move the codebook
        with _Watch(self.original, paths, found):
            self.output(self.original)
        self.original.load_state_dict(state)
        return found

    def alone(self, holder: nn.Sequential, calls: list[RecordedCall]) -> Callable[[], None]:
        """The recorded calls, forward and, where a step has one, backward, and nothing else."""

        def quantize() -> None:
            with torch.set_grad_enabled(self.trains):
                for call in calls:
                    output = getattr(holder.get_submodule(call.path), call.method)(*call.arguments, **call.options)
                    ends = [x for x in floating(output) if x.requires_grad]
                    if ends:
                        torch.autograd.backward(ends, [torch.full_like(x, 1 / max(x.numel(), 1)) for x in ends])

        return quantize

    @torch.no_grad()
    def differing(self, calls: list[RecordedCall]) -> tuple[int, int]:
        """Of the indices that the recorded calls give in eval mode, how many differ, and of how many."""
        differ = number = 0
        for holder in (self.original, self.swapped):
            holder.eval()
        for call in calls:
            outputs = []
            for holder in (self.original, self.swapped):
                torch.manual_seed(0)
                function = getattr(holder.get_submodule(call.path), call.method)
                outputs.append(_integers(function(*call.arguments, **call.options)))
            differ += sum(int((a != b).sum()) for a, b in zip(*outputs, strict=True))
            number += sum(a.numel() for a in outputs[0])
        for holder in (self.original, self.swapped):
            holder.train(self.trains)
        return differ, number

    def measure(self, threads: int, seconds: float, least: int, most: int) -> tuple[Timing, Timing]:
        """Times of whole steps, before and after the swap, in turn."""
        functions = {"before": self.step(self.original), "after": self.step(self.swapped)}
        times, _ = interleave(functions, threads, seconds, least, most)
        return times["before"], times["after"]


class _Watch:
    """Records the outermost calls of the modules at `paths`, by any method of `_METHODS`."""

    def __init__(self, holder: nn.Module, paths: list[str], found: list[RecordedCall]) -> None:
        self.modules = {path: holder.get_submodule(path) for path in paths}
        self.found, self.inside = found, False

    def __enter__(self) -> None:
        for path, module in self.modules.items():
            for method in _METHODS:
                if callable(getattr(module, method, None)):
                    module.__dict__[method] = self._watched(path, method, getattr(module, method))

    def __exit__(self, *_: object) -> None:
        for module in self.modules.values():
            for method in _METHODS:
                module.__dict__.pop(method, None)

    def _watched(self, path: str, method: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*arguments: Any, **options: Any) -> Any:
            if self.inside:
                return function(*arguments, **options)
            self.inside = True
            try:
                output = function(*arguments, **options)
            finally:
                self.inside = False
            rows = sum(x.numel() for x in _integers(output)[:1])
            given, named = pytree.tree_map_only(Tensor, _apart, (arguments, options))
            self.found.append(RecordedCall(path, method, given, named, rows))
            return output

        return watched


def _apart(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_(x.requires_grad)


def _integers(output: Any) -> list[Tensor]:
    leaves = pytree.tree_leaves(output)
    return [x for x in leaves if isinstance(x, Tensor) and not x.is_floating_point()]


def difference(first: Any, second: Any) -> Difference:
    largest = scale = 0.0
    for a, b in zip(floating(first), floating(second), strict=True):
        a, b = a.detach(), b.detach()
        finite = a.isfinite() & b.isfinite()
        same = finite | (a.isnan() & b.isnan()) | (a == b)
        apart = torch.where(finite, (a - b).abs(), 0.0).max() if a.numel() else a.new_zeros(())
        largest = max(largest, float(apart) if bool(same.all()) else float("inf"))
        scale = max(scale, float(torch.where(finite, a.abs(), 0.0).max()) if a.numel() else 0.0)
    pairs = [
        (a, b)
        for a, b in zip(pytree.tree_leaves(first), pytree.tree_leaves(second), strict=True)
        if isinstance(a, Tensor) and not a.is_floating_point()
    ]
    differ = sum(int((a != b).sum()) for a, b in pairs)
    return Difference(largest / scale if scale else largest, differ, sum(a.numel() for a, _ in pairs))
