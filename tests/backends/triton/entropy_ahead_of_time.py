"""Compiles what the launchers of the entropy kernels would launch and prints one JSON object per program.

    python tests/backends/triton/entropy_ahead_of_time.py [--all] [--jobs N]

The sweeps know neither layout nor mask nor metric: they are compiled for every type that is multiplied and every way to
slice D, and at one D for every kind of size. What reads z and codebook and writes the gradients is compiled for every
dtype, layout, mask and metric on one chip. Results are kept in build/, as by ahead_of_time.py.

A process of its own: the tests' process runs Triton's interpreter, in which nothing can be compiled.
"""

import argparse
import hashlib
import inspect
import json
import multiprocessing
import re
from collections.abc import Iterable

import ahead_of_time as base
import regimes
import torch
from regimes import BRAIN, DOUBLE, FLOAT, HALF, Regime

from benchmarks.budgets.launches import CHIPS, Launch, compile_launch, recorded
from vqkernels.backends.triton.entropy import entropy, entropy_backward

SWEEPS = {"partition_kernel", "mean_kernel", "shift_kernel", "gradient_kernel"}
OURS = SWEEPS | {
    "entropy_rows_kernel", "entropy_codes_kernel", "partition_merge_kernel", "lift_kernel", "row_finish_kernel",
    "code_finish_kernel",
}  # fmt: skip
PRODUCTS = {"wgmma": r"\bwgmma\.mma_async", "tcgen05": r"\btcgen05\.mma", "mma.sync": r"\bmma\.sync"}
QUICK = (Regime(dim=32, masked=True, metric="dot"),)
DIMS = {FLOAT: (3, 64, 128, 257, 512), BRAIN: (3, 64, 257, 512), DOUBLE: (64, 257), HALF: (64,)}
# one row and one code; sizes and tiles per split that 16 divides or not
SIZES = ((1, 1), (101, 300), (4096, 16384), (2**27, 512))


def sweep_regimes() -> list[Regime]:
    shapes = [Regime(dim, z=kind, codebook=kind) for kind, dims in DIMS.items() for dim in dims]
    return shapes + [Regime(64, codes, rows) for rows, codes in SIZES]


def other_regimes() -> list[Regime]:
    """The covering design of the search, with the metrics that there are."""
    metrics = {"cosine": "dot"}
    calls = regimes.element_regimes((8, 0))
    return [one._replace(metric=metrics.get(one.metric, one.metric)) for one in calls]


def exercise(regime: Regime) -> None:
    """Forward and backward, on memory that is not there."""
    z, codebook, mask = regimes.operands(regime)
    _, _, *kept = entropy(z, codebook, mask, regime.metric, 0.5)
    grads = torch.empty(regime.heads, dtype=torch.float32, device="meta")
    entropy_backward(grads, grads, z, codebook, mask, *kept, regime.metric, 0.5, True)


def launches_of(chip: base.Capability, calls: Iterable[Regime], kernels: set[str]) -> dict[str, Launch]:
    found = {}
    for regime in calls:
        with recorded(chip) as launches:
            exercise(regime)
        found |= {one.key: one for one in launches if one.kernel.__name__ in kernels}
    return found


def everything(chip: base.Capability) -> dict[str, Launch]:
    sweeps = launches_of(chip, sweep_regimes(), SWEEPS)
    others = other_regimes() if chip == regimes.CROSSED else [Regime(), Regime(z=DOUBLE, codebook=BRAIN, masked=True)]
    return sweeps | launches_of(chip, others, OURS - SWEEPS)


def describe(launch: Launch, chip: base.Capability) -> dict:
    """What the tests want to know of one program."""
    program = compile_launch(launch, chip, disassemble=False)
    return {
        "kernel": program.name,
        "chip": list(chip),
        "sweep": program.name in SWEEPS,
        "constants": {name: value for name, value in launch.constants.items() if isinstance(value, int | str)},
        "operand": launch.signature.get("rows_packed", launch.signature.get("left_packed")),
        "registers": program.registers,
        "stack": program.stack,
        "shared": program.shared,
        "limit": CHIPS[chip][1],
        "products": sorted(name for name, pattern in PRODUCTS.items() if re.search(pattern, program.ptx)),
        "float64 products": len(re.findall(r"mma[a-z0-9_.]*\.f64", program.ptx)),
        "tf32": "tf32" in program.ptx,
        "atomics": len(re.findall(r"\b(?:atom|red)\.(?:global|shared)", program.ptx)),
    }


def cache_key(launch: Launch, chip: base.Capability) -> str:
    tools = inspect.getsource(describe), PRODUCTS
    return hashlib.sha256(repr((base.cache_key(launch, chip), tools)).encode()).hexdigest()[:24]


_work: list[tuple[Launch, base.Capability]] = []  # inherited by the workers


def _describe_nth(n: int) -> dict:
    return describe(*_work[n])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--jobs", type=int, default=multiprocessing.cpu_count())
    options = parser.parse_args()
    plan = {}
    for chip in CHIPS if options.all else [regimes.CROSSED]:
        launches = everything(chip) if options.all else launches_of(chip, QUICK, OURS)
        plan |= {cache_key(one, chip): (one, chip) for one in launches.values()}
    known = base.read_cache()
    missing = [key for key in plan if key not in known]
    _work.extend(plan[key] for key in missing)
    with multiprocessing.get_context("fork").Pool(max(1, min(options.jobs, len(missing)))) as pool:
        for n, described in enumerate(pool.imap(_describe_nth, range(len(missing)))):
            known[missing[n]] = described
            if n % 50 == 49 or n == len(missing) - 1:
                base.keep({key: known[key] for key in missing[: n + 1]})
    for key in plan:
        print(json.dumps(known[key]))


if __name__ == "__main__":
    main()
