"""Everything to be learned from a few minutes on a GPU, in one command.

    python -m benchmarks.hardware --minutes 9 --out DIR [--wheels DIR]
    TRITON_INTERPRET=1 python -m benchmarks.hardware --dry-run --out DIR     (on a CPU: every stage, tiny, no times)

Needs torch, triton, numpy and the source tree, and no network. In this order: correctness, the accumulation model, the
entropy kernels, the CUDA C++ kernels where they were built (FORCE_CUDA=1 pip install -e .), the benchmark grid, the
VQ-VAE step, the full model beside the usual one, times of the entropy and the CUDA kernels, open questions. Nothing is
timed unless everything before was right. Each stage has its own file, rewritten after every row, so that a run
that is cut off leaves complete files; a summary comes last.
Returns 0 if everything that ran was right, 1 if not, 2 if there is nothing to run on.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.hardware.accumulation import accumulation
from benchmarks.hardware.correctness import correctness
from benchmarks.hardware.cuda import cuda_correctness, cuda_times
from benchmarks.hardware.entropy import entropy_correctness, entropy_times
from benchmarks.hardware.grid import grid
from benchmarks.hardware.models import full_model, model
from benchmarks.hardware.questions import questions
from benchmarks.hardware.results import Results
from benchmarks.hardware.setting import Setting, facts, on_gpu, rehearsal


class Stage(NamedTuple):
    """One stage: its rows, the share of the remaining time it may take, and whether it times anything."""

    name: str
    rows: Callable[[Setting], Iterator[dict[str, Any]]]
    share: float
    timed: bool


STAGES = (
    Stage("correctness", correctness, 0.6, False),
    Stage("accumulation", accumulation, 0.3, False),
    Stage("entropy", entropy_correctness, 0.2, False),
    Stage("cuda", cuda_correctness, 0.3, False),
    Stage("grid", grid, 0.6, True),
    Stage("model", model, 0.5, True),
    Stage("full model", full_model, 0.4, True),
    Stage("entropy times", entropy_times, 0.4, True),
    Stage("cuda times", cuda_times, 0.4, True),
    Stage("questions", questions, 1.0, True),
)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hardware", description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=9.0, help="stop after about this long")
    parser.add_argument("--out", type=Path, required=True, help="folder of the result files")
    parser.add_argument("--wheels", type=Path, help="folder of wheels of peers, installed without a network")
    parser.add_argument("--dry-run", action="store_true", help="rehearse on the CPU, in Triton's interpreter")
    options = parser.parse_args()
    try:
        setting = (rehearsal if options.dry_run else on_gpu)(options.minutes, options.wheels)
    except RuntimeError as error:
        print(f"benchmarks.hardware: {error}", file=sys.stderr)
        return 2
    results = Results(options.out, facts(setting))
    lines = [f"{name}: {value}" for name, value in results.facts.items()]
    right = True
    for stage in STAGES:
        if stage.timed and not right:
            lines.append(f"{stage.name}: not run, since something before was wrong")
        else:
            right = run(stage, setting, results, lines) and right
        results.summary("\n".join(lines) + "\n")
    print("\n".join(lines), flush=True)
    return 0 if right else 1


def run(stage: Stage, setting: Setting, results: Results, lines: list[str]) -> bool:
    """Run one stage within its share of the time; returns whether everything it looked at was right."""
    start, until = time.monotonic(), time.monotonic() + stage.share * max(setting.left(), 0)
    right, count, end = True, 0, "complete"
    rows = stage.rows(setting)
    try:
        for row in rows:
            row["after s"] = round(time.monotonic() - start, 1)
            results.add(stage.name, row)
            count += 1
            right = right and row.get("ok") is not False and "FALSIFIED" not in row.values()
            lines.extend(said(row))
            results.summary("\n".join(lines) + "\n")
            if time.monotonic() > until:
                end = "cut short by the clock"
                break
    except Exception as error:  # whatever a chip, a driver or a compiler may do: the files keep what came before
        right, end = False, f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"
        results.add(stage.name, {"what": "error", "error": end})
    lines.append(f"{stage.name}: {count} rows, {end}, {'nothing wrong' if right else 'SOMETHING WRONG'}")
    print(lines[-1], flush=True)
    return right


def said(row: dict[str, Any]) -> list[str]:
    """The row in the summary: what was wrong, and what was timed."""
    if "times" in row:
        shape = " ".join(f"{name}={row[name]}" for name in ("N", "K", "D") if name in row)
        parts = [f"{name} {entry['ms']:.3f} ms" for name, entry in row["times"].items() if "ms" in entry]
        return [f"{row['what']} {shape}: {', '.join(parts) or 'rehearsed'}"]
    if row.get("ok") is False or "FALSIFIED" in row.values():
        return [f"WRONG: {row}"]
    return []


if __name__ == "__main__":
    sys.exit(main())
