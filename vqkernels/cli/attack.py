"""`vqkernels attack`: searches for a wrong index in every backend of this machine. Needs torch alone."""

import argparse
import sys
from collections.abc import Sequence

import torch

from vqkernels.backends import registry
from vqkernels.verification.attack import attack

_DESCRIPTION = """
Search for a wrong index in every backend: run hostile inputs, compare every index with the contract, and stop at the
first difference with a minimal case. The exit status is then 1.
"""


def run(arguments: Sequence[str]) -> int:
    """Search; returns 0 if every index was right, 1 after printing a minimal case of a wrong one, 2 for a mistake."""
    parser = argparse.ArgumentParser(prog="vqkernels attack", description=_DESCRIPTION)
    parser.add_argument("--minutes", type=float, default=1.0, help="how long to search (default: 1)")
    parser.add_argument("--backend", action="append", help="only this backend; give it again for a second one")
    parser.add_argument("--device", default="cpu", help="device of the inputs: cpu, cuda, cuda:1 (default: cpu)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the inputs (default: 0)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="number of CPU threads")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    try:
        device = torch.device(options.device)
        if device.type == "cuda" and not torch.cuda.is_available():
            raise RuntimeError(f"--device {options.device} needs a GPU, but torch sees no CUDA GPU")
        backends = [
            registry.resolve(name, device, "nearest")
            for name in options.backend or registry.available(device, "nearest")
        ]
    except (RuntimeError, ValueError) as error:
        print(f"vqkernels attack: {error}", file=sys.stderr)
        return 2
    print(
        f"attacking {', '.join(backends)} on {options.device} for {options.minutes:g} minutes, seed {options.seed}",
        flush=True,
    )
    live = sys.stderr.isatty()
    progress = None
    for progress in attack(options.minutes, backends, seed=options.seed, device=options.device):
        if live:
            print(
                f"\r{progress.seconds:6.0f} s  {progress.cases} cases, {progress.rows:.2e} rows",
                end="",
                file=sys.stderr,
            )
    if live:
        print(file=sys.stderr)
    if progress is None:
        print("the time was too short for a single case: raise --minutes")
        return 0
    print(f"{progress.cases} cases, {progress.rows} rows, {progress.scores:.2e} scores in {progress.seconds:.0f} s")
    if progress.failure is not None:
        print(progress.failure)
        return 1
    print("no wrong index found")
    return 0
