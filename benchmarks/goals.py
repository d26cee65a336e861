"""What this package set out to reach on two cores, and what a run reached: every goal, met or not.

    vqkernels bench --out benchmarks/results          measures
    python -m benchmarks.goals                        judges benchmarks/results/cpu.csv, the file of that run
    python -m benchmarks.goals --write                also writes benchmarks/results/goals.md

Only the cases of a full run count. Returns 1 where a figure is below its floor.
"""

import argparse
import csv
import math
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from vqkernels.bench.cases import Case, default_cases
from vqkernels.bench.entropy_peers import PLAIN
from vqkernels.bench.peers import SEARCH
from vqkernels.bench.report import markdown

RESULTS = Path(__file__).parent / "results"
SEARCHING = {peer.name for peer in SEARCH if peer.searches and not peer.ours}

Row = dict[str, str]  # a line of the CSV
Rows = dict[str, Row]  # those of one case, by contender
Figure = Callable[[Case, Rows], float | None]  # of one case; None where it was not measured


def mean(values: Iterable[float]) -> float:
    """The geometric mean."""
    logarithms = [math.log(x) for x in values]
    return math.exp(sum(logarithms) / len(logarithms))


class Goal(NamedTuple):
    """A figure over all cases that have it, what it should be, and the least that it must be."""

    what: str
    figure: Figure
    over_cases: Callable[[Iterable[float]], float]
    goal: float | None
    floor: float | None = None
    at_most: bool = False


class Outcome(NamedTuple):
    """What became of a goal; `figure` is None where no case has it."""

    goal: Goal
    figure: float | None
    cases: int

    @property
    def state(self) -> str:
        if self.figure is None or self.goal.goal is None:
            return "not measured" if self.figure is None else "no goal was set"
        if self.goal.at_most:
            return "goal met" if self.figure <= self.goal.goal else "goal missed"
        return state(self.figure, self.goal.goal, self.goal.floor)


def state(value: float, goal: float, floor: float | None) -> str:
    """Whether a figure that should be large reaches its goal, or at least its floor where it has one."""
    if value >= goal:
        return "goal met"
    if floor is None:
        return "goal missed"
    return "floor met, goal missed" if value >= floor else "floor missed"


def number(rows: Rows, contender: str, column: str) -> float | None:
    text = rows.get(contender, {}).get(column, "")
    return float(text) if text else None


def times(kind: str, others: Iterable[str], ours: str = "vqkernels", **only: Iterable[int]) -> Figure:
    """How many times as long as ours the fastest of the others takes, in cases of one kind whose fields are `only`."""

    def figure(case: Case, rows: Rows) -> float | None:
        if case.kind != kind or any(getattr(case, field) not in allowed for field, allowed in only.items()):
            return None
        theirs = [x for x in (number(rows, name, "median_ms") for name in others) if x]
        mine = number(rows, ours, "median_ms")
        return min(theirs) / mine if theirs and mine else None

    return figure


def of_peak(case: Case, rows: Rows) -> float | None:
    """GFLOP/s over those of the multiply-add peak."""
    shape = case.rows, case.codebook_size, case.dim
    if case.codebook != "gaussian" or shape not in ((16384, 8192, 32), (16384, 8192, 256), (32768, 1024, 64)):
        return None
    rate, peak = (number(rows, "vqkernels", column) for column in ("gflops", "peak_gflops"))
    return rate / peak if rate and peak else None


def memory(case: Case, rows: Rows) -> float | None:
    """Our peak over (N + K) D floats twice and 1 MB; over four times and 1 MB for a training step."""
    if case.kind not in ("search", "training"):
        return None
    limit = (8 if case.kind == "search" else 16) * (case.rows + case.codebook_size) * case.dim / 1e6 + 1
    held = [number(rows, name, "megabytes") for name, row in rows.items() if row["ours"] == "1"]
    return max((x / limit for x in held if x is not None), default=None)


def entropy_memory(case: Case, rows: Rows) -> float | None:
    """Our peak over that of plain PyTorch."""
    ours, theirs = (number(rows, name, "megabytes") for name in ("vqkernels", PLAIN))
    return ours / theirs if case.kind == "entropy" and ours is not None and theirs else None


def wrong(case: Case, rows: Rows) -> float | None:
    counted = [int(row["wrong"]) for row in rows.values() if row["ours"] == "1" and row["wrong"]]
    return sum(counted) if counted else None


GOALS = (
    Goal("search: best peer / ours, geometric mean", times("search", SEARCHING), mean, 3.0, 2.2),
    Goal("search: best peer / ours, lowest", times("search", SEARCHING), min, 1.2, 1.0),
    Goal("search: torch.mm alone / ours, geometric mean", times("search", ["torch.mm alone"]), mean, 2.0),
    Goal("search: of the multiply-add peak, lowest", of_peak, min, 1.0),
    Goal("search: FAISS / ours at D = 8 and 4, lowest", times("search", ["FAISS IndexFlatL2"], dim=(4, 8)), min, 1.5),
    Goal(
        "training step: lucidrains EMA / ours by EMA, lowest",
        times("training", ["lucidrains EMA"], "vqkernels EMA"), min, 12.0, 8.0,
    ),
    Goal("training step: diffusers / ours by gradient, lowest", times("training", ["diffusers"]), min, 4.0),
    Goal("VQ-VAE step at K=8192: one-hot / ours", times("vqvae", ["one-hot layer"], codebook_size=[8192]), min, 2.2),
    Goal("VQ-VAE step at K=512: one-hot / ours", times("vqvae", ["one-hot layer"], codebook_size=[512]), min, None),
    Goal("peak memory over 8 (N + K) D bytes + 1 MB (training step: 16), largest", memory, max, 1.0, at_most=True),
    Goal("wrong indices", wrong, sum, 0.0, at_most=True),
    Goal("entropy loss: plain PyTorch / ours, lowest", times("entropy", [PLAIN]), min, 3.0, 1.0),
    Goal("entropy loss: of the peak memory of plain PyTorch, largest", entropy_memory, max, 1 / 20, at_most=True),
    Goal("residual, 8 levels: lucidrains / ours", times("residual", ["lucidrains"], dim=[128]), min, 8.0, 5.0),
    Goal(
        "residual training, 8 levels: lucidrains / ours",
        times("residual training", ["lucidrains"], dim=[128]), min, 8.0, 5.0,
    ),
)  # fmt: skip


def read(path: Path) -> dict[Case, Rows]:
    """The cases of a full run that a CSV of `vqkernels bench` holds."""
    known, found = set(default_cases()), {}
    with path.open(newline="") as stream:
        for row in csv.DictReader(stream):
            sizes = (int(row[name]) for name in ("rows", "codebook_size", "dim"))
            case = Case(row["kind"], *sizes, row["codebook"], int(row["levels"]))
            if case in known:
                found.setdefault(case, {})[row["contender"]] = row
    return found


def judge(measured: dict[Case, Rows]) -> list[Outcome]:
    """Every goal, in the order in which they were set."""
    outcomes = []
    for goal in GOALS:
        values = [x for case, rows in measured.items() if (x := goal.figure(case, rows)) is not None]
        outcomes.append(Outcome(goal, goal.over_cases(values) if values else None, len(values)))
    return outcomes


def table(outcomes: list[Outcome]) -> str:
    lines = []
    for goal, figure, cases in outcomes:
        wanted = "-" if goal.goal is None else f"{'<=' if goal.at_most else '>='} {goal.goal:g}"
        wanted += "" if goal.floor is None else f" (floor {goal.floor:g})"
        measured = "-" if figure is None else f"{figure:.3g}"
        lines.append([goal.what, wanted, measured, str(cases), Outcome(goal, figure, cases).state])
    return "\n".join(markdown(("on 2 cores", "goal", "measured", "cases", ""), lines)) + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, default=RESULTS / "cpu.csv", help="of another run than the committed one")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/goals.md")
    options = parser.parse_args(arguments)
    outcomes = judge(read(options.csv))
    print(table(outcomes))
    if options.write:
        (RESULTS / "goals.md").write_text(table(outcomes))
    return int(any(outcome.state == "floor missed" for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
