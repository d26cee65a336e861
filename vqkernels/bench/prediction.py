"""The gain of a user's own model: predicted from the time that its quantizers take, then measured with them replaced.

The calls that reach the quantizers in one step are timed alone, with the model's quantizers and with what replaces them
(counterparts.py): Amdahl's law makes the prediction of that and of the time of a whole step. Then whole steps of both
models are timed in turn. A step is forward, loss, backward and Adam.
"""

from collections.abc import Callable
from dataclasses import dataclass

from . import counterparts
from .model_pair import WORTH_IT, ModelPair
from .timing import Timing, interleave
from .user_model import ModelError, UserModel


@dataclass(frozen=True)
class Prediction:
    """Seconds: of a step with the slower quantizers, and of all their calls in it, theirs and their counterparts'."""

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


class Comparison:
    """A user's model with its quantizers and with their counterparts.

    Of the two holders `fast` has the layers of vqkernels; `ours` says whether these are the model's own. `differing` of
    `indices` differ before training.

    Raises:
        ModelError: in one sentence, where the model cannot be measured.
    """

    def __init__(self, model: UserModel, again: Callable[[], UserModel]) -> None:
        self.pair = pair = ModelPair(model, again, counterparts.replace)
        if not pair.trains:
            raise ModelError("the model returns no floating tensor with a gradient: return (model, inputs, loss)")
        self.calls = pair.calls()
        if not self.calls:
            raise ModelError("the forward pass calls no quantizer")
        self.differing, self.indices = pair.differing(self.calls)
        self.ours = pair.report.swapped[0].old == counterparts.OURS
        self.slow, self.fast = (pair.swapped, pair.original) if self.ours else (pair.original, pair.swapped)

    def quantizers(self) -> list[str]:
        """One line per quantizer: what it is, where, and the N, K, D of its calls."""
        lines = []
        for entry in self.pair.report.swapped:
            rows = [str(call.indices) for call in self.calls if call.path == entry.name]
            size = counterparts.size(self.pair.original.get_submodule(entry.name))
            codes = " K={} D={}".format(*size) if size else ""
            times = f"{len(rows)} call{'s' * (len(rows) != 1)} a step"
            path = f"model{entry.name.removeprefix('0')}"
            lines.append(f"{entry.old} at {path}: N={', '.join(dict.fromkeys(rows))}{codes}, {times}")
        return lines

    def predict(self, threads: int, seconds: float, least: int = 5, most: int = 25) -> Prediction:
        """Times the slow model's step and both kinds of quantizers alone."""
        functions = {"step": self.pair.step(self.slow)}
        functions |= {
            name: self.pair.alone(holder, self.calls) for name, holder in (("slow", self.slow), ("fast", self.fast))
        }
        return Prediction(**interleave(functions, threads, seconds, least, most)[0])

    def measure(self, threads: int, seconds: float, least: int = 5, most: int = 25) -> Measurement:
        """Times whole steps of both models in turn."""
        functions = {"slow": self.pair.step(self.slow), "fast": self.pair.step(self.fast)}
        return Measurement(**interleave(functions, threads, seconds, least, most)[0])

    def report(self, prediction: Prediction, measurement: Measurement) -> str:
        """What was predicted, what was measured, and whether it is worth it."""
        theirs = "one-hot layer" if self.ours else "yours"
        p, m = prediction, measurement
        verdict = f"{'worth it' if m.gain >= WORTH_IT else 'not worth it'}: a step is {m.gain:.2f}x as fast with "
        verdict += "vqkernels"
        if m.gain < WORTH_IT:
            verdict += f", and below {WORTH_IT:.2f}x we would not change a model"
        return "\n".join(
            [
                f"predicted  {p.gain:.2f}x  the quantizer takes {p.share:.0%} of a step of {p.step} ms: {theirs} "
                f"{p.slow} ms, vqkernels {p.fast} ms ({p.slow.median / p.fast.median:.1f}x)",
                f"measured   {m.gain:.2f}x  a step takes {m.slow} ms with {theirs}, {m.fast} ms with vqkernels; "
                f"{m.slow.rounds} rounds in turn",
                f"indices    {self.differing} of {self.indices} differ before training",
                f"verdict    {verdict}",
            ]
        )
