"""The gain of a user's model: predicted from the time that its quantizer takes, then measured after a swap.

There are three steps. One forward pass with hooks records how every quantizer is called. The calls are timed alone,
forward and backward, with the model's quantizer and with its counterpart; with the time of a whole step, Amdahl's law
gives the prediction. Then whole steps of two copies of the model, which differ only in the quantizers, are timed in
turn. A step is forward, loss, backward and Adam.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .quantizers import Found, UnknownQuantizer, find
from .subject import ModelError, Subject, floating, one_line
from .timing import Timing, interleave

WORTH_IT = 1.05  # below this measured gain the report says "not worth it"


@dataclass(frozen=True)
class Call:
    """One recorded call of the quantizer at `path`."""

    path: str
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    @property
    def z(self) -> Tensor:
        return self.arguments[0]


@dataclass(frozen=True)
class Prediction:
    """Seconds of a step with the slower quantizers, and of all calls of the slow and of the fast ones in it."""

    step: Timing
    slow: Timing
    fast: Timing

    @property
    def share(self) -> float:
        """Part of a step that is spent in the quantizers."""
        return min(1.0, self.slow.median / self.step.median)

    @property
    def gain(self) -> float:
        """Amdahl: 1 / (1 - share + share / speedup)."""
        return 1 / (1 - self.share + self.share * self.fast.median / self.slow.median)


@dataclass(frozen=True)
class Measurement:
    """Times of a whole step with either kind of quantizer."""

    slow: Timing
    fast: Timing

    @property
    def gain(self) -> float:
        return self.slow.median / self.fast.median


class _Holder(nn.Module):
    """Holds the model, so that a model which is itself a quantizer can be replaced too."""

    model: nn.Module

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


class Pair:
    """Two copies of a model that differ only in their quantizers. The slow one has the peer's, or the one-hot layer."""

    def __init__(self, subject: Subject) -> None:
        """Raises: ModelError, with the reason, if the model cannot be measured."""
        self.subject = subject
        try:
            first, second = (_Holder(copy.deepcopy(subject.model).train()) for _ in range(2))
        except Exception as error:
            raise ModelError(f"the model cannot be copied: {one_line(error)}") from error
        try:
            paths = [one.path for one in find(first)]
            if not paths:
                raise ModelError("no quantizer was found in the model: --help says which are known")
            self._pass(first, "the model")  # what is initialised from the first batch is initialised now
            self.calls = self._record(first, paths)
            if not self.calls:
                raise ModelError("the forward pass calls no quantizer")
            second.load_state_dict(first.state_dict())
            self.found: list[Found] = find(first)
            self.ours = all(one.ours for one in self.found)
            if not self.ours and any(one.ours for one in self.found):
                raise ModelError("the model mixes layers of vqkernels with others: leave one kind")
            for one in self.found:
                parent, _, name = one.path.rpartition(".")
                setattr(second.get_submodule(parent), name, one.counterpart())
            self.slow, self.fast = (second, first) if self.ours else (first, second)
            self.rows, self.differing = self._compare()
            self._pass(second, "with its quantizers swapped, the model")
        except UnknownQuantizer as error:
            raise ModelError(str(error)) from error

    def _pass(self, holder: _Holder, name: str) -> Tensor:
        try:
            loss = self.subject.loss(holder.model(*self.subject.inputs))
        except (ModelError, UnknownQuantizer):
            raise
        except Exception as error:
            raise ModelError(f"{name} failed: {one_line(error)}") from error
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            raise ModelError("the loss must be one number with a gradient")
        return loss

    def _record(self, holder: _Holder, paths: list[str]) -> list[Call]:
        calls: list[Call] = []

        def watch(path: str) -> Any:
            def hook(_: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
                if not arguments or not isinstance(arguments[0], Tensor):
                    raise ModelError(f"the quantizer at '{path}' is not called with z as its first argument")
                z = arguments[0].detach().clone().requires_grad_(arguments[0].requires_grad)
                calls.append(Call(path, (z, *arguments[1:]), options))

            return holder.get_submodule(path).register_forward_pre_hook(hook, with_kwargs=True)

        handles = [watch(path) for path in paths]
        self._pass(holder, "the model")
        for handle in handles:
            handle.remove()
        return calls

    def _compare(self) -> tuple[list[int], int]:
        """Rows of each recorded call, and how many of all get different codes from slow and fast quantizers."""
        rows, differing = [], 0
        with torch.no_grad():
            for call in self.calls:
                pair = [holder.get_submodule(call.path) for holder in (self.slow, self.fast)]
                first, second = (_indices(m.eval()(*call.arguments, **call.options)) for m in pair)
                rows.append(first.numel())
                differing += int((first != second).sum())
                for quantizer in pair:
                    quantizer.train()
        return rows, differing

    def step(self, holder: _Holder) -> Callable[[], None]:
        """One training step."""
        optimizer = torch.optim.Adam(holder.parameters(), lr=1e-5)

        def step() -> None:
            optimizer.zero_grad()
            self._pass(holder, "the model").sum().backward()
            optimizer.step()

        return step

    def alone(self, holder: _Holder) -> Callable[[], None]:
        """Only the recorded calls of the quantizers, forward and backward."""

        def quantize() -> None:
            for call in self.calls:
                call.z.grad = None
                outputs = floating(holder.get_submodule(call.path)(*call.arguments, **call.options))
                outputs = [x for x in outputs if x.requires_grad]
                if outputs:
                    torch.autograd.backward(outputs, [torch.full_like(x, 1 / x.numel()) for x in outputs])

        return quantize

    def shapes(self) -> list[str]:
        """One line per quantizer: its class, its path, and the N, K, D of its calls."""
        lines = []
        for one in self.found:
            size, dim = one.codebook.shape
            rows = [str(n) for n, call in zip(self.rows, self.calls, strict=True) if call.path == one.path]
            times = f"{len(rows)} call{'s' * (len(rows) != 1)} a step"
            lines.append(f"{one.kind} at {one.path}: N={', '.join(dict.fromkeys(rows))} K={size} D={dim}, {times}")
        return lines


def _indices(output: Any) -> Tensor:
    leaves = [x for x in pytree.tree_leaves(output) if isinstance(x, Tensor) and not x.is_floating_point()]
    if not leaves:
        raise ModelError("a quantizer returns no indices")
    return leaves[0].flatten()


def predict(pair: Pair, threads: int, seconds: float, least: int = 5, most: int = 25) -> Prediction:
    """Times the slow model's step and both kinds of quantizer alone."""
    contenders = {"step": pair.step(pair.slow), "slow": pair.alone(pair.slow), "fast": pair.alone(pair.fast)}
    times, _ = interleave(contenders, threads, seconds, least, most)
    return Prediction(times["step"], times["slow"], times["fast"])


def measure(pair: Pair, threads: int, seconds: float, least: int = 5, most: int = 25) -> Measurement:
    """Times whole steps of both models in turn."""
    contenders = {"slow": pair.step(pair.slow), "fast": pair.step(pair.fast)}
    times, _ = interleave(contenders, threads, seconds, least, most)
    return Measurement(times["slow"], times["fast"])


def report(pair: Pair, prediction: Prediction, measurement: Measurement) -> str:
    """Prediction, measurement and verdict, one line each."""
    names = ("one-hot layer", "vqkernels") if pair.ours else ("yours", "vqkernels")
    p, m = prediction, measurement
    worth = m.gain >= WORTH_IT
    verdict = f"{'worth it' if worth else 'not worth it'}: a step is {m.gain:.2f}x as fast with vqkernels"
    if not worth:
        verdict += f"; we recommend it from {WORTH_IT:.2f}x on"
    return "\n".join(
        [
            f"predicted  {p.gain:.2f}x  the quantizer takes {p.share:.0%} of a step of {_ms(p.step)} ms: {names[0]} "
            f"{_ms(p.slow)} ms, vqkernels {_ms(p.fast)} ms ({p.slow.median / p.fast.median:.1f}x)",
            f"measured   {m.gain:.2f}x  a step takes {_ms(m.slow)} ms with {names[0]}, {_ms(m.fast)} ms with "
            f"vqkernels; {m.slow.rounds} rounds in turn",
            f"indices    {pair.differing} of {sum(pair.rows)} differ before training",
            f"verdict    {verdict}",
        ]
    )


def _ms(timing: Timing) -> str:
    low, middle, high = (1e3 * x for x in (timing.low, timing.median, timing.high))
    digits = 1 if middle >= 10 else 3
    return f"{middle:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
