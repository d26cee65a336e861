"""The instruction budget of the entropy kernels: the committed table, its limits, and that the count can be trusted."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from backends.triton.test_budget import needs_the_tables_triton

from benchmarks.budgets import entropy
from benchmarks.budgets.launches import Launch

ROOT = Path(__file__).parents[3]
LINES = json.loads((ROOT / "benchmarks" / "results" / "instruction_budget.json").read_text())["entropy"]
SWEEPS = ("partition", "mean", "shift", "gradient of z", "gradient of the codebook")
FORWARD, BACKWARD = SWEEPS[:2], SWEEPS[2:]
# one more FMA per score costs a cycle, one more half-rate instruction two; counts move by less between builds
TOLERANCE = 0.3


def measure(chips, dims, source=None):
    """The table as counted now, from the package or from a changed copy of it."""
    code = (
        "import json, sys; from benchmarks.budgets import entropy as b\n"
        "chips, dims = json.loads(sys.argv[1])\n"
        "print(json.dumps(b.table([tuple(c) for c in chips], tuple(dims))))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(str(p) for p in (source, ROOT) if p)
    command = [sys.executable, "-c", code, json.dumps([chips, dims])]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=source or ROOT, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def risen(counted):
    """Names whose issue slots or cycles per score exceed the committed table's."""
    return [
        name
        for name, line in counted.items()
        if any(line[what] > LINES[name][what] + TOLERANCE for what in ("issue", "cycles"))
    ]


def cycles(chip, kind, dim, names):
    return sum(LINES[f"sm_{chip} {kind} D={dim} {name}"]["cycles"] for name in names)


def test_every_sweep_has_its_line():
    assert set(LINES) == {
        f"sm_{chip} {kind} D={dim} {name}"
        for chip in (80, 90, 100)
        for kind in ("fp32", "bf16")
        for dim in entropy.DIMS
        for name in SWEEPS
    }
    assert all(line["stack"] == 0 for line in LINES.values())


def test_the_table_is_within_the_limits():
    """Forward, in 16 bits, two exponentials are all but the whole cost. In float32 the products are most of it: two of
    D channels forward, five backward."""
    for dim in (32, 64):
        assert cycles(90, "bf16", dim, FORWARD) <= 18
        assert cycles(90, "bf16", dim, BACKWARD) <= 42
    assert cycles(90, "fp32", 64, FORWARD) <= 1.4 * 2 * 64
    assert cycles(90, "fp32", 64, BACKWARD) <= 1.3 * 5 * 64
    for chip in (80, 90, 100):
        # the gradient of D = 256 is made in two slices of 128 channels, each with the logits anew
        assert LINES[f"sm_{chip} fp32 D=256 gradient of z"]["float32"] <= 2 * (256 + 128 + 12)
        assert LINES[f"sm_{chip} bf16 D=64 partition"]["special"] <= 1.15


@pytest.mark.slow
def test_the_count_does_not_rise_on_sm_90():
    needs_the_tables_triton()
    assert risen(measure([(9, 0)], [32])) == []


@pytest.mark.slow
def test_the_count_does_not_rise_elsewhere():
    needs_the_tables_triton()
    assert risen(measure([(8, 0), (10, 0)], [64])) == []
    assert risen(measure([(9, 0)], [64, 256])) == []


@pytest.mark.slow
def test_one_more_exponential_per_score_is_noticed(tmp_path):
    needs_the_tables_triton()
    for folder in ("vqkernels", "benchmarks"):
        subprocess.run(["cp", "-r", str(ROOT / folder), str(tmp_path / folder)], check=True)
    path = tmp_path / "vqkernels" / "backends" / "triton" / "entropy_forward.py"
    text = path.read_text()
    line = "        w = tl.exp2(t)\n"
    assert text.count(line) == 1
    path.write_text(text.replace(line, "        w = tl.exp2(t) + tl.exp2(t * 0.5) * 1e-9\n"))
    counted = measure([(9, 0)], [32], source=tmp_path)
    assert set(risen(counted)) == {f"sm_90 {kind} D=32 partition" for kind in ("fp32", "bf16")}


def sass(*opcodes):
    """Machine code as the disassembler prints it; "name:" is a label, "BRA name" jumps there."""
    lines = []
    for at, one in enumerate(opcodes):
        label, _, target = one.partition(" ")
        lines.append(f".L_{label[:-1]}:" if label.endswith(":") else f" /*{at:04x}*/ {label} `(.L_{target}) ;")
    return "\n".join(lines)


def test_a_count_without_all_products_is_refused():
    """A tile of 32 scores per warp, D = 4 in slices of 2: two FFMAs per slice and two more around the exponential."""
    constants = {"BM": 4, "BK": 8, "BD": 2, "PADDED": 4}
    one = Launch(None, {}, constants, {}, {"num_warps": 1}, None)
    program = ["MOV", "o:", "i:", "FFMA", "FFMA", "LDS", "BRA i", "FFMA", "MUFU.EX2", "BRA o", "EXIT"]
    counts = entropy.tile_counts(sass(*program), one, (9, 0))
    assert counts == {"FFMA": 5, "LDS": 2, "BRA": 3, "MUFU.EX2": 1}
    for wrong in (program[:3] + ["FADD", "FFMA"] + program[5:], program[:8] + ["FADD"] + program[9:]):
        with pytest.raises(ValueError, match="do not add up|FFMAs per score|no loop holds"):
            entropy.tile_counts(sass(*wrong), one, (9, 0))
