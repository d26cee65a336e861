"""Peak memory of a step of a user's model before and after the swap, and of its quantizers alone. Linux only.

One process makes the model and its swapped copy. Every call first runs once, which allocates what is allocated once
(threads, the optimizer's state). The second run counts: its memory above the models, their optimizer and its inputs.
"""

import json
import sys
from dataclasses import dataclass

import torch

from .memory import answers, peak_of
from .model_pair import ModelPair
from .user_model import load


@dataclass(frozen=True)
class Peaks:
    """MB, before and after the swap."""

    step: tuple[float, float]
    quantizers: tuple[float, float]  # all their calls of one step, one after another


def measure(spec: str, threads: int) -> Peaks | None:
    """The peaks of the model named by `PACKAGE.MODULE:FACTORY`; None where they cannot be measured."""
    found = answers("vqkernels.bench.model_memory", {"threads": threads, "spec": spec})
    return Peaks(*(tuple(pair) for pair in found[-1])) if found else None


def _child() -> None:
    asked = json.load(sys.stdin)
    torch.set_num_threads(asked["threads"])
    pair = ModelPair(load(asked["spec"]), lambda: load(asked["spec"]))
    holders, calls = (pair.original, pair.swapped), pair.calls()
    functions = [pair.step(holder) for holder in holders] + [pair.alone(holder, calls) for holder in holders]
    peaks = []
    for function in functions:
        function()
        peaks.append(peak_of(function))
    print(f"\n{json.dumps([peaks[:2], peaks[2:]])}", flush=True)


if __name__ == "__main__":
    _child()
