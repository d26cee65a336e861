"""The instruction budget: the committed table, the limits, and proof that one more instruction would be noticed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from benchmarks.budgets import search
from vqkernels.backends.triton import configs

ROOT = Path(__file__).parents[3]
TABLE = json.loads((ROOT / "benchmarks" / "results" / "instruction_budget.json").read_text())
# one more half-rate instruction per score would cost two cycles; what the counts move by between builds is less
TOLERANCE = 0.1


def measure(*chips, source=None):
    """The table as counted now, from the package or from a changed copy of its search kernel."""
    code = (
        "import json, sys; from benchmarks.budgets import search as b\n"
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
    return [
        name if kernel == "search_kernel" else f"{kernel} {name}"
        for kernel in ("search_kernel", "residual_search_kernel")
        for name, line in counted[kernel].items()
        if line["cycles"] > TABLE[kernel][name]["cycles"] + TOLERANCE
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


def test_every_tile_has_its_line():
    """Every entry of the table of tiles, for both epilogues, however D is sliced."""
    lines = TABLE["search_kernel"]
    names = {"many": "", "few": f" N<={configs.FEW_ROWS}"}
    entries = [
        f"sm_{family} {precision} D={8 if bucket == 16 else bucket}{names[size]}"
        for family, buckets in configs.TABLE.items()
        for bucket, sizes in buckets.items()
        for size in sizes
        for precision in ("fast", "exact")
    ]
    assert set(lines) == set(entries)
    assert all(line["cycles"] >= max(line["issue"], 2 * line["half_rate"]) - 0.002 for line in lines.values())


def test_the_chained_search_is_within_its_limits():
    """Its pass has the candidate pass's epilogue, and no more on top than smaller tiles cost."""
    lines = TABLE["residual_search_kernel"]
    shapes = {
        f"sm_{family} exact D={bucket}": f"{shape[0]}x{shape[1]}"
        for family, buckets in configs.CHAINED.items()
        for bucket, shape in buckets.items()
    }
    assert {name: line["tile"] for name, line in lines.items()} == shapes
    assert lines["sm_90 exact D=16"]["cycles"] <= 3.8
    assert lines["sm_90 exact D=64"]["cycles"] <= 4.4
    assert all(line["stack"] == 0 for line in lines.values())


def sass(*opcodes):
    """Machine code as the disassembler prints it; "name:" is a label, "BRA name" jumps there."""
    lines = []
    for at, one in enumerate(opcodes):
        label, _, target = one.partition(" ")
        lines.append(f".L_{label[:-1]}:" if label.endswith(":") else f" /*{at:04x}*/ {label} `(.L_{target}) ;")
    return "\n".join(lines)


SLICED = ("MOV", "o:", "FADD", "HMMA", "i:", "HMMA", "HMMA", "LDS", "BRA i", "FMNMX", "BRA o", "EXIT", "w:", "BRA w")


@pytest.mark.parametrize(("products", "trips"), [(3, 1), (7, 3)])
def test_a_sliced_tile_counts_its_inner_loop_as_often_as_it_runs(products, trips):
    counts = search.tile_pass(sass(*SLICED), products)
    assert counts == {"FADD": 1, "HMMA": 1 + 2 * trips, "LDS": trips, "BRA": 1 + trips, "FMNMX": 1}


def test_a_count_that_does_not_add_up_is_refused():
    assert search.tile_pass(sass(*SLICED), 2)["FMNMX"] == 0, "the whole tile in one loop"
    for products in (1, 4, 8):
        with pytest.raises(ValueError, match="do not add up"):
            search.tile_pass(sass(*SLICED), products)
    with pytest.raises(ValueError, match="no loop holds"):
        search.tile_pass(sass("MOV", "EXIT"), 4)
    with pytest.raises(ValueError, match="cannot make a tile of 4"):
        search.tile_pass(sass("i:", "HMMA", "BRA i", "EXIT"), 4)


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
    assert {f"sm_90 {mode} D={dim}" for mode in ("fast", "exact") for dim in (64, 256)} <= set(risen(counted))
