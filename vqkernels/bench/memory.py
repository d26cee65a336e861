"""Peak memory of one call above its inputs, measured in a separate process. Linux only.

Writing to /proc/self/clear_refs resets the peak resident set, and VmHWM gives it. Each contender first runs on a few
rows, which allocates what is allocated once (threads, autograd, imports). Then its inputs are made, and its prepared
index if it has one. Only the memory above these counts, the result of the call included.
"""

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .cases import Case
from .contenders import CONTENDERS

# Larger blocks return to the system when they are freed, so that no contender reuses memory of another.
_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
_CLEAR = Path("/proc/self/clear_refs")

Job = tuple[Case, str]


def resident(field: str) -> float:
    """VmRSS (now) or VmHWM (peak) in MB."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) / 1000


def peak_above_inputs(case: Case, name: str) -> float:
    """MB at the peak of one call of the contender `name`."""
    contenders = {one.name: one for one in CONTENDERS[case.kind]}
    small = Case(case.kind, 64, min(case.codebook_size, 16), case.dim, levels=case.levels)
    contenders[name].prepare(*small.data())()
    return peak_of(contenders[name].prepare(*case.data()))


def peak_of(call: Callable[[], Any]) -> float:
    """MB at the peak of one call above what is resident before it. Call it once before, to allocate what is kept."""
    if sys.platform == "linux":
        getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)(0)
    before = resident("VmRSS")
    _CLEAR.write_text("5")
    kept = call()
    peak = resident("VmHWM") - before
    del kept
    return max(peak, 0.0)


def measure(jobs: list[Job], threads: int) -> dict[Job, float]:
    """MB by job, from one child process for all jobs. A failed job is missing; empty where peaks cannot be read."""
    if not jobs:
        return {}
    asked = {"threads": threads, "jobs": [[vars(case), name] for case, name in jobs]}
    return {jobs[number]: megabytes for number, megabytes in answers("vqkernels.bench.memory", asked)}


def answers(module: str, asked: dict[str, Any]) -> list[Any]:
    """The lists that `module` prints, run as a program with `asked` as its input and `asked["threads"]` threads.

    Empty where peaks cannot be measured.
    """
    if not os.access(_CLEAR, os.W_OK):
        return []
    done = subprocess.run(
        [sys.executable, "-m", module],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        env={**os.environ, **_ENVIRONMENT, "OMP_NUM_THREADS": str(asked["threads"])},
        check=False,
    )
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]


def _child() -> None:
    asked = json.load(sys.stdin)
    torch.set_num_threads(asked["threads"])
    for number, (case, name) in enumerate(asked["jobs"]):
        try:
            print(json.dumps([number, peak_above_inputs(Case(**case), name)]), flush=True)
        except Exception as error:  # the others still run
            print(f"{name}: {error}", file=sys.stderr)


if __name__ == "__main__":
    _child()
