"""Compiles what the launchers would launch and prints what came out, one JSON object per program.

    python tests/backends/triton/ahead_of_time.py [--all] [--jobs N]
    python tests/backends/triton/ahead_of_time.py --unseen     compiles nothing: what a wider sweep of calls would show
                                                               the compiler and the regimes do not

Results are kept in build/, keyed by kernel source, arguments, chip, Triton version and the code that reads the
results.

A process of its own: the tests' process runs Triton's interpreter, in which nothing can be compiled.
"""

import argparse
import fcntl
import hashlib
import inspect
import json
import multiprocessing
import os
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)
sys.path.insert(0, str(Path(__file__).parents[3]))
sys.path.insert(0, str(Path(__file__).parent))

import regimes
import torch
import triton
from regimes import Regime

from benchmarks.budgets.launches import CHIPS, Launch, compile_launch, recorded
from benchmarks.budgets.machine_code import MATRIX, instructions
from vqkernels.backends.triton.nearest import nearest
from vqkernels.backends.triton.quantize import lookup, quantize, quantize_backward
from vqkernels.backends.triton.residual import residual_quantize, residual_quantize_backward
from vqkernels.backends.triton.statistics import statistics

CACHE = Path(__file__).parents[3] / "build" / "ahead_of_time.json"
OF_A_SEARCH = {"search_kernel", "resolve_kernel", "merge_kernel"}
OF_RESIDUALS = {
    "residual_search_kernel", "subtract_kernel", "compose_kernel", "residual_grad_kernel", "residual_partial_kernel",
    "residual_total_kernel",
}  # fmt: skip
OF_INTEREST = {"search_kernel", "rescore_kernel", "residual_search_kernel"}  # whose machine code the tests look at
Capability = tuple[int, int]


def exercise(regime: Regime) -> None:
    """Call every entry point once, on memory that is not there."""
    z, codebook, mask = regimes.operands(regime)
    wide = torch.float64 in (regime.z, regime.codebook)
    nearest(z, codebook, mask, regime.metric, "fast")
    _, indices, *_ = quantize(z, codebook, mask, regime.metric, "exact", regime.statistics)
    statistics(z, indices, regime.codes, mask)
    lookup(z, codebook, indices, not regime.statistics)
    one = torch.ones((), dtype=torch.float64 if wide else torch.float32, device="meta")
    quantize_backward(z, one, one, z, codebook, indices, regime.gradient, True)


def exercise_residual(regime: Regime) -> None:
    """Call the entry points of residual quantization once; in "fast" too with a single code."""
    z, codebooks, levels = regimes.stacks(regime)
    wide = torch.float64 in (regime.z, regime.codebook)
    _, indices, *_ = residual_quantize(z, codebooks, levels, regime.metric, "exact", regime.statistics)
    if regime.codes == 1:
        residual_quantize(z, codebooks, levels, regime.metric, "fast", regime.statistics)
    losses = torch.ones(codebooks.shape[:2], dtype=torch.float64 if wide else torch.float32, device="meta")
    residual_quantize_backward(z, losses, losses, z, codebooks, indices, regime.gradient, True)


def launches_of(
    capability: Capability,
    calls: Iterable[Regime],
    kernels: set[str] | None = None,
    exercise: Callable[[Regime], None] = exercise,
) -> dict[str, Launch]:
    """The launches of some calls on a chip, each once."""
    found = {}
    for regime in calls:
        with recorded(capability) as launches:
            exercise(regime)
        found |= {one.key: one for one in launches if kernels is None or one.kernel.__name__ in kernels}
    return found


def everything(capability: Capability) -> dict[str, Launch]:
    """The covering design for one chip. The candidate pass knows neither dtypes nor metric: its own regimes suffice."""
    of_searches = launches_of(capability, regimes.search_regimes(capability), OF_A_SEARCH)
    others = launches_of(capability, regimes.element_regimes(capability))
    of_residuals = launches_of(capability, regimes.CHAINED + regimes.BY_LEVEL, OF_RESIDUALS, exercise_residual)
    others = {key: one for key, one in others.items() if one.kernel.__name__ != "search_kernel"}
    return of_searches | others | of_residuals


def representative(capability: Capability) -> dict[str, Launch]:
    """Every kernel at least once."""
    of_residuals = launches_of(capability, regimes.QUICK_RESIDUAL, OF_RESIDUALS, exercise_residual)
    return launches_of(capability, regimes.QUICK) | of_residuals


def seen(launches: Iterable[Launch]) -> set[str]:
    """What the compiler is shown about single arguments: type, divisibility by 16, value of a constant. The number of
    channels is open-ended, so it is only told apart as far as it changes the code's structure."""
    facts = set()
    for one in launches:
        name, positions = one.kernel.__name__, {p.name: i for i, p in enumerate(one.kernel.params)}
        for argument, kind in one.signature.items():
            value = one.constants.get(argument)
            if argument == "DIM" or (argument == "PADDED" and value > 128):
                value = "a number"
            divisible = (positions[argument],) in one.attributes
            facts.add(f"{name}({argument}: {kind}{' = ' + str(value) if kind == 'constexpr' else ''}, {divisible})")
    return facts


def describe(launch: Launch, capability: Capability) -> dict:
    """What the tests want to know of one program."""
    program = compile_launch(launch, capability, launch.kernel.__name__ in OF_INTEREST)
    names = {opcode.split(".")[0] for opcode, _ in instructions(program.sass)[0]}
    return {
        "kernel": program.name,
        "chip": list(capability),
        "constants": {name: value for name, value in launch.constants.items() if isinstance(value, int | str)},
        "options": {name: launch.options.get(name) for name in ("num_warps", "num_stages")},
        "types": {name: kind for name, kind in launch.signature.items() if kind.startswith("*")},
        "registers": program.registers,
        "stack": program.stack,
        "shared": program.shared,
        "limit": CHIPS[capability][1],
        "matrix": sorted({MATRIX[name] for name in names & MATRIX.keys()}),
        "tf32": "TF32" in program.sass or "tf32" in program.ptx,
        "double_fma": len(re.findall(r"\bfma\.rn\.f64", program.ptx)),
        "machine_double_fma": program.sass.count("DFMA"),
        "float_atomics": len(re.findall(r"(?:atom|red)\.[a-z.]*\.(?:add|max|min)[a-z.]*\.f(?:16|32|64)", program.ptx)),
    }


def cache_key(launch: Launch, capability: Capability) -> str:
    """Everything that can change what `describe` says."""
    tools = [inspect.getsource(tool) for tool in (describe, compile_launch, instructions)] + sorted(OF_INTEREST)
    parts = (launch.kernel.cache_key, launch.key, capability, triton.__version__, tools, MATRIX, CHIPS)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:24]


def read_cache() -> dict[str, dict]:
    return json.loads(CACHE.read_text()) if CACHE.exists() else {}


def keep(described: dict[str, dict]) -> None:
    """Add to the cache; others may be adding too."""
    CACHE.parent.mkdir(exist_ok=True)
    with CACHE.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        new = CACHE.with_suffix(".new")
        new.write_text(json.dumps(read_cache() | described))
        new.replace(CACHE)


_work: list[tuple[Launch, Capability]] = []  # inherited by the workers: launches hold kernels, which cannot be pickled


def _describe_nth(n: int) -> dict:
    return describe(*_work[n])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--unseen", action="store_true")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    if options.unseen:
        for chip in CHIPS:
            wider = launches_of(chip, regimes.sweep(chip))
            for fact in sorted(seen(wider.values()) - seen(everything(chip).values())):
                print(json.dumps({"chip": list(chip), "unseen": fact}))
        return
    plan = {}
    for chip in CHIPS:
        launches = everything(chip) if options.all else representative(chip)
        plan |= {cache_key(one, chip): (one, chip) for one in launches.values()}
    known = read_cache()
    missing = [key for key in plan if key not in known]
    _work.extend(plan[key] for key in missing)
    with multiprocessing.get_context("fork").Pool(max(1, min(options.jobs, len(missing)))) as pool:
        for n, described in enumerate(pool.imap(_describe_nth, range(len(missing)))):
            known[missing[n]] = described
            if n % 50 == 49 or n == len(missing) - 1:
                keep({key: known[key] for key in missing[: n + 1]})
    for key in plan:
        print(json.dumps(known[key]))


if __name__ == "__main__":
    main()
