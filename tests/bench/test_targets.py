"""The goals: which figure decides each, met, missed or not measured; and the table that docs/speed.md shows."""

from pathlib import Path

import pytest

from vqkernels.bench import report
from vqkernels.bench.cases import Case, default_cases
from vqkernels.bench.run import Result
from vqkernels.bench.targets import targets
from vqkernels.bench.timing import Timing
from vqkernels.cli.bench import _MARKS, run

ROOT = Path(__file__).parents[2]
FACTS = {"processor": "P", "threads": "2", "SIMD level": "avx2", "torch": "T", "vqkernels": "V", "commit": "C"}
THEIRS = {
    "search": ("FAISS IndexFlatL2", "torch.mm alone"),
    "training": ("lucidrains EMA", "diffusers"),
    "residual": ("lucidrains",),
    "residual training": ("lucidrains",),
    "entropy": ("plain PyTorch",),
    "vqvae": ("one-hot layer",),
}


def result(case, name, seconds, **more):
    ours = name.startswith("vqkernels")
    competes = not ours and name != "torch.mm alone"
    return Result(case, name, "", ours, competes, Timing(seconds, seconds, seconds, 5), 1e9, **more)


def group(case: Case, ratio: float, **more):
    """Ours just above the multiply-add peak of 1e9, and everyone else `ratio` times as slow."""
    seconds = case.operations / 1.001e9
    ours = [result(case, "vqkernels", seconds, **more)]
    ours += [result(case, "vqkernels EMA", seconds, **more)] * (case.kind == "training")
    return case, ours + [result(case, name, ratio * seconds) for name in THEIRS[case.kind]]


def states(groups) -> dict[str, str]:
    return {x.what.partition(",")[0]: x.state for x in targets(groups)}


def test_nothing_is_claimed_of_what_was_not_measured():
    assert {x.state for x in targets([])} == {"not measured"}
    assert {x.state for x in targets([group(Case("search", 10, 10, 4), 100.0)])} == {"not measured"}


def test_everything_is_met():
    found = targets([group(case, 13.0, megabytes=0.5, wrong=0, checked=7) for case in default_cases()])
    states = ["met"] * 8 + ["no goal"] + ["met"] * 3 + ["not measured"] + ["met"] * 2
    assert [x.state for x in found] == states
    assert found[0].figure == "13.00x over 15 shapes" and found[5].figure == "13.00x over 3 shapes"
    assert found[0].goal == ">= 3x (floor 2.2x)"


@pytest.mark.parametrize(
    "ratio,mean,lowest,ema",
    [
        (2.5, "missed, above the floor", "met", "missed, BELOW THE FLOOR"),
        (1.1, "missed, BELOW THE FLOOR", "missed, above the floor", "missed, BELOW THE FLOOR"),
        (9.0, "met", "met", "missed, above the floor"),
    ],
)
def test_goals_and_floors(ratio, mean, lowest, ema):
    found = targets([group(case, ratio) for case in default_cases()])
    assert (found[0].state, found[1].state, found[5].state) == (mean, lowest, ema)


def test_the_lowest_is_one_shape_and_the_peak_is_that_of_the_run():
    cases = default_cases()
    groups = [group(case, 0.5 if case.dim == 4 else 4.0) for case in cases]
    found = targets(groups)
    assert found[1].figure == "0.50x over 15 shapes" and found[4].figure.startswith("0.50x")
    slow = [result(c, "vqkernels", 2 * c.operations / 1e9) for c in cases if c.kind == "search"]
    assert targets([(x.case, [x]) for x in slow])[3].figure == "0.50x over 3 shapes"


def test_memory_and_wrong_indices():
    case = default_cases()[0]
    limit = 8 * (case.rows + case.codebook_size) * case.dim / 1e6 + 1
    for megabytes, state in ((limit * 0.99, "met"), (limit * 1.01, "missed")):
        assert targets([group(case, 4.0, megabytes=megabytes)])[9].state == state
    assert targets([group(case, 4.0, wrong=1, checked=9)])[10].state == "missed"


def test_the_entropy_loss_is_held_against_plain_pytorch():
    case = next(case for case in default_cases() if case.kind == "entropy")
    for ratio, state in ((3.1, "met"), (1.5, "missed, above the floor"), (0.9, "missed, BELOW THE FLOOR")):
        assert targets([group(case, ratio)])[11].state == state
    for megabytes, figure, state in ((5.0, "1/20", "met"), (10.0, "1/10", "missed"), (2.0, "1/50", "met")):
        results = [
            result(case, "vqkernels", 1.0, megabytes=megabytes),
            result(case, "plain PyTorch", 2.0, megabytes=100.0),
        ]
        assert (targets([(case, results)])[12].figure, targets([(case, results)])[12].state) == (figure, state)


def test_the_report_states_them():
    told = report.text([x for case in default_cases()[:2] for x in group(case, 2.0)[1]], FACTS)
    assert "## Targets" in told and ">= 3x (floor 2.2x)" in told and "missed, BELOW THE FLOOR" in told
    assert "## In short" in told and "P, 2 threads, avx2, torch T, commit C; medians." in told


def test_the_table_goes_between_the_marks(tmp_path, capsys):
    page = tmp_path / "README.md"
    page.write_text(f"before\n{_MARKS[0]}\nold\n{_MARKS[1]}\nafter\n")
    assert run(["--quick", "--only", "vqvae", "--threads", "1", "--readme", str(page)]) == 0
    text = page.read_text()
    assert text.startswith(f"before\n{_MARKS[0]}\n") and text.endswith(f"|\n{_MARKS[1]}\nafter\n")
    assert "old" not in text and "one-hot layer" in text
    page.write_text("no marks")
    with pytest.raises(SystemExit):
        run(["--quick", "--readme", str(page)])
    assert "has no line '<!-- vqkernels bench -->'" in capsys.readouterr().err


def test_the_page_shows_a_committed_run():
    """The table between the marks is copied from the committed report, by `--readme`."""
    shown = (ROOT / "docs" / "speed.md").read_text().partition(_MARKS[0])[2].partition(_MARKS[1])[0].strip()
    assert shown
    assert shown in (ROOT / "benchmarks" / "results" / "cpu.md").read_text()
