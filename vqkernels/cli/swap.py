"""`vqkernels swap`: what `swap_quantizers` would do to a user's model, whether results stay, and what it gains.

The model is built once and copied, and the quantizers of the copy are swapped. Both get the same inputs and random
numbers. Their outputs, losses and gradients are compared, then whole steps of both are timed in turn. Peak memory of a
step is measured in a separate process.
"""

import argparse
import sys
from collections.abc import Sequence

import torch

from vqkernels.bench import model_memory
from vqkernels.bench.model_pair import WORTH_IT, ModelPair
from vqkernels.bench.user_model import FACTORY_HELP, ModelError, load

_DESCRIPTION = """
Build your model, swap the quantizers of a copy, and report: what is swapped, how near the results stay, how much faster
a step is, and how much memory it needs. Your files do not change. To swap for good, add one line to your code:
  vqkernels.swap_quantizers(model)
"""
_HELP = f"""{FACTORY_HELP.rstrip()}
A step is forward, loss, backward and Adam; of a model that returns nothing with a gradient, forward in eval mode.
"""


def verdict(gain: float) -> str:
    """A line that says whether the swap is worth it."""
    if gain >= WORTH_IT:
        return f"worth it: a step is {gain:.2f}x as fast after the swap"
    return f"not worth it: a step is {gain:.2f}x as fast after the swap; we recommend it from {WORTH_IT:.2f}x on"


def run(arguments: Sequence[str]) -> int:
    """Report; returns 2 after a message if there is nothing to measure."""
    parser = argparse.ArgumentParser(
        prog="vqkernels swap",
        description=_DESCRIPTION,
        epilog=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="PACKAGE.MODULE:FACTORY", help="a function that makes your model; see below")
    parser.add_argument("--quick", action="store_true", help="two rounds: shows only that it runs")
    parser.add_argument("--seconds", type=float, default=30.0, help="time for the measurement, about (default: 30)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="number of CPU threads")
    options = parser.parse_args(arguments)
    if options.threads < 1 or options.seconds <= 0:
        parser.error("--threads and --seconds must be positive")
    if not all(options.model.partition(":")[::2]):
        parser.error(f"the model must be PACKAGE.MODULE:FACTORY, got '{options.model}'")
    torch.set_num_threads(options.threads)
    least, most = (2, 2) if options.quick else (5, 25)
    try:
        pair = ModelPair(load(options.model), lambda: load(options.model))
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
    peaks = model_memory.measure(options.model, options.threads)
    print(f"{kind:<10} {theirs} ms before, {ours} ms after; medians [quartiles] of {ours.rounds} rounds")
    print(f"{'memory':<10} {_memory(peaks, kind)}")
    print(f"{'verdict':<10} {verdict(theirs.median / ours.median)}")
    return 0


def _memory(peaks: model_memory.Peaks | None, kind: str) -> str:
    if peaks is None:
        return "not measured: it needs Linux, and a model that can be made again in another process"
    whole, alone = (f"{before:.0f} MB before, {after:.0f} MB after" for before, after in (peaks.step, peaks.quantizers))
    return f"{whole}: peak of a {kind} above the model; quantizers alone {alone}"


def _without_holder(line: str) -> str:
    return line.removeprefix("0.") if line.startswith("0.") else f"the model{line.removeprefix('0')}"
