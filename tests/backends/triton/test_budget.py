"""The instruction budget: the committed table, the limits, and proof that one more instruction would be noticed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[3]
TABLE = json.loads((ROOT / "benchmarks" / "results" / "instruction_budget.json").read_text())
# one more half-rate instruction per score would cost two cycles; what the counts move by between builds is less
TOLERANCE = 0.1


def measure(*chips, source=None):
    """The table as counted now, from the package or from a changed copy of its search kernel."""
    code = (
        "import json, sys; from benchmarks import triton_budget as b\n"
        "chips = [tuple(c) for c in json.loads(sys.argv[1])]\n"
        "print(json.dumps(b.table(chips)))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(str(p) for p in (source, ROOT) if p)
    command = [sys.executable, "-c", code, json.dumps(chips)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=source or ROOT, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def risen(counted):
    """Names whose cycles per score exceed the committed table's."""
    before = TABLE["search_kernel"]
    return [
        name
        for name, line in counted["search_kernel"].items()
        if line.get("cycles", 0) > before[name].get("cycles", float("inf")) + TOLERANCE
    ]


def needs_the_tables_triton():
    import triton

    if triton.__version__ != TABLE["triton"]:
        pytest.skip(f"the table was counted with Triton {TABLE['triton']}, here is {triton.__version__}")


def test_the_table_is_within_the_limits():
    lines = TABLE["search_kernel"]
    assert lines["sm_90 fast D=64"]["tile"] == lines["sm_90 exact D=64"]["tile"] == "128x128"
    assert lines["sm_90 fast D=64"]["cycles"] <= 5.5
    assert lines["sm_90 exact D=64"]["cycles"] <= 3.8
    assert all(line["stack"] == 0 for line in lines.values())


def test_the_count_does_not_rise_on_sm_90():
    needs_the_tables_triton()
    assert risen(measure((9, 0))) == []


@pytest.mark.slow
def test_the_count_does_not_rise_elsewhere():
    needs_the_tables_triton()
    assert risen(measure((8, 0), (10, 0))) == []


@pytest.mark.slow
def test_one_more_selection_per_score_is_noticed(tmp_path):
    """A copy of the package whose inner loop selects every score once more: one FSEL each, the condition is hoisted."""
    needs_the_tables_triton()
    for folder in ("vqkernels", "benchmarks"):
        subprocess.run(["cp", "-r", str(ROOT / folder), str(tmp_path / folder)], check=True)
    path = tmp_path / "vqkernels" / "backends" / "triton" / "search.py"
    text = path.read_text()
    line = "        t = half[None, :] - product * scale[:, None]\n"
    assert text.count(line) == 1
    path.write_text(text.replace(line, line + "        t = tl.where((scale > 0.5)[:, None], t, 1.0)\n"))
    counted = measure((9, 0), source=tmp_path)
    assert {"sm_90 fast D=64", "sm_90 exact D=64"} <= set(risen(counted))
