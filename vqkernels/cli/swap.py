"""`vqkernels swap`: what `swap_quantizers` would do to somebody's model, whether results stay, and what it gains.

The model is built once and copied; the quantizers of the copy are swapped. Both get the same inputs and random numbers:
their outputs, losses and gradients are compared, then whole steps of both are timed in turn.
"""

import argparse
import copy
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from vqkernels.bench.model import WORTH_IT
from vqkernels.bench.subject import ModelError, Subject, floating, load, told
from vqkernels.bench.timing import Timing, interleave
from vqkernels.dropin.swap import ADAPTERS, Report, swap_quantizers

_DESCRIPTION = """
Builds your model, swaps the quantizers of a copy, and reports what is swapped, whether the results stay the same, and
how much faster a step is. Your files stay as they are: the swap itself is one line of your code,
  vqkernels.swap_quantizers(model)
"""
_HELP = """
PACKAGE.MODULE:FACTORY is imported from here or from what is installed. FACTORY() returns the model, or (model, inputs),
or (model, inputs, loss):
  inputs  a tensor, or a tuple of the arguments of one forward pass; where missing, model.example_inputs() gives them
  loss    a function from what the model returns to a 0-d tensor; where missing, model.example_loss(output), and where
          that is missing too, the sum of the mean squares of all floating tensors that the model returns
A step is forward, loss, backward and Adam; of a model that returns nothing with a gradient, forward in eval mode.
"""


@dataclass(frozen=True)
class Difference:
    """How far two runs are apart: of floating tensors, the largest difference over the largest magnitude."""

    floats: float
    integers: int  # how many differ
    of: int

    def __str__(self) -> str:
        told_floats = f"{self.floats:.1e} of the largest value"
        return f"{told_floats}, {self.integers} of {self.of} integers differ" if self.of else told_floats


class Pair:
    """A model as it is, and a copy whose quantizers are swapped, each in a holder, so that it may itself be one.

    Args:
        again: makes another model like it, where it cannot be copied: those with torch's older weight norm cannot.

    Raises:
        ModelError: in one sentence, where the model cannot be measured or holds no known quantizer.
    """

    def __init__(self, subject: Subject, again: Callable[[], Subject]) -> None:
        self.subject = subject
        self.theirs = nn.Sequential(subject.model.train())
        self.trains = True  # while it is looked at; what is initialised from the first batch is initialised now
        self.trains = any(x.requires_grad for x in floating(self.output(self.theirs)))
        if self.trains:
            self.loss(self.theirs)
        else:
            self.theirs.eval()
        self.ours = self._copy(again)
        self.report: Report = swap_quantizers(self.ours)
        if not self.report:
            raise ModelError(f"no known quantizer was found; known are {', '.join(ADAPTERS)}")

    def _copy(self, again: Callable[[], Subject]) -> nn.Sequential:
        try:
            return copy.deepcopy(self.theirs)
        except Exception:  # whatever a part of the model raises
            other = nn.Sequential(again().model).train(self.theirs.training)
        try:
            other.load_state_dict(self.theirs.state_dict())
        except Exception as error:
            raise ModelError(f"the model can neither be copied nor made twice: {told(error)}") from error
        return other

    def output(self, holder: nn.Sequential) -> Any:
        """What the model returns, with the random numbers of both the same."""
        torch.manual_seed(0)
        try:
            with torch.set_grad_enabled(self.trains and torch.is_grad_enabled()):
                return holder[0](*self.subject.inputs)
        except Exception as error:
            raise ModelError(f"the model failed: {told(error)}") from error

    def loss(self, holder: nn.Sequential) -> Tensor:
        output = self.output(holder)
        try:
            loss = self.subject.loss(output)
        except ModelError:
            raise
        except Exception as error:
            raise ModelError(f"the loss failed: {told(error)}") from error
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            raise ModelError("the loss must be one number with a gradient")
        return loss.sum()

    def compare(self) -> dict[str, Difference]:
        """Outputs in eval mode, and the gradients of one step where there are any; then both are in train mode."""
        found = {}
        with torch.no_grad():
            outputs = [self.output(x.eval()) for x in (self.theirs, self.ours)]
        found["outputs"] = _difference(*outputs)
        if self.trains:
            gradients = []
            for holder in (self.theirs.train(), self.ours.train()):
                state = copy.deepcopy(holder.state_dict())  # a forward in train mode may move the codebook
                parameters = [p for p in holder.parameters() if p.requires_grad]
                gradients.append(torch.autograd.grad(self.loss(holder), parameters, allow_unused=True))
                holder.load_state_dict(state)
            found["gradients"] = _difference(*gradients)
        return found

    def step(self, holder: nn.Sequential) -> Callable[[], None]:
        """One training step; a forward where nothing has a gradient."""
        if not self.trains:
            return lambda: self.output(holder)
        optimizer = torch.optim.Adam((p for p in holder.parameters() if p.requires_grad), lr=1e-5)

        def step() -> None:
            optimizer.zero_grad()
            self.loss(holder).backward()
            optimizer.step()

        return step

    def measure(self, threads: int, seconds: float, least: int, most: int) -> tuple[Timing, Timing]:
        """Times of whole steps, theirs and ours, in turn."""
        contenders = {"theirs": self.step(self.theirs), "ours": self.step(self.ours)}
        times, _ = interleave(contenders, threads, seconds, least, most)
        return times["theirs"], times["ours"]


def _difference(first: Any, second: Any) -> Difference:
    largest = scale = 0.0
    for a, b in zip(floating(first), floating(second), strict=True):
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


def verdict(gain: float) -> str:
    """Whether the swap is worth it, in one sentence."""
    if gain >= WORTH_IT:
        return f"worth it: a step is {gain:.2f}x as fast after the swap"
    return f"not worth it: a step is {gain:.2f}x as fast, and below {WORTH_IT:.2f}x we would not change a model"


def run(arguments: Sequence[str]) -> int:
    """Report; returns 2, after one sentence, where there is nothing to measure."""
    parser = argparse.ArgumentParser(
        prog="vqkernels swap",
        description=_DESCRIPTION,
        epilog=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="PACKAGE.MODULE:FACTORY", help="see below")
    parser.add_argument("--quick", action="store_true", help="two rounds: whether it runs, not how fast")
    parser.add_argument("--seconds", type=float, default=30.0, help="to spend on timing, about")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args(arguments)
    if options.threads < 1 or options.seconds <= 0:
        parser.error("--threads and --seconds must be positive")
    if not all(options.model.partition(":")[::2]):
        parser.error(f"the model must be PACKAGE.MODULE:FACTORY, got '{options.model}'")
    torch.set_num_threads(options.threads)
    least, most = (2, 2) if options.quick else (5, 25)
    try:
        pair = Pair(load(options.model), lambda: load(options.model))
        print("\n".join(_without_holder(str(entry)) for entry in pair.report), flush=True)
        if not pair.report.swapped:
            raise ModelError("no quantizer was swapped")
        for name, difference in pair.compare().items():
            print(f"{name:<10} {difference}", flush=True)
        theirs, ours = pair.measure(options.threads, options.seconds, least, most)
    except ModelError as error:
        print(f"vqkernels swap: {error}", file=sys.stderr)
        return 2
    kind = "step" if pair.trains else "forward"
    print(f"{kind:<10} {_ms(theirs)} ms before, {_ms(ours)} ms after; medians [quartiles] of {ours.rounds} rounds")
    print(f"{'verdict':<10} {verdict(theirs.median / ours.median)}")
    return 0


def _without_holder(line: str) -> str:
    return line.removeprefix("0.") if line.startswith("0.") else f"the model{line.removeprefix('0')}"


def _ms(timing: Timing) -> str:
    low, middle, high = (1e3 * x for x in (timing.low, timing.median, timing.high))
    digits = 1 if middle >= 10 else 3
    return f"{middle:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
