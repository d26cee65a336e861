"""What the compiler makes of every entropy kernel for sm_80, sm_90 and sm_100, without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).with_name("entropy_ahead_of_time.py")
TENSOR_CORE = {80: "mma.sync", 90: "wgmma", 100: "tcgen05"}


@pytest.fixture(scope="module", params=["quick", pytest.param("all", marks=pytest.mark.slow)])
def programs(request):
    """One description per compiled program."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), *(["--all"] if request.param == "all" else [])]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_kernel_compiles_for_every_chip(programs):
    kernels = {
        "entropy_rows_kernel", "entropy_codes_kernel", "partition_kernel", "partition_merge_kernel", "mean_kernel",
        "shift_kernel", "lift_kernel", "gradient_kernel", "row_finish_kernel", "code_finish_kernel",
    }  # fmt: skip
    for chip in {tuple(program["chip"]) for program in programs}:
        assert {program["kernel"] for program in programs if tuple(program["chip"]) == chip} == kernels


def test_nothing_spills(programs):
    assert [program for program in programs if program["stack"] > 0] == []


def test_shared_memory_fits_the_chip(programs):
    assert [program for program in programs if program["shared"] > program["limit"]] == []
    # the sm_80 shapes also serve sm_86, sm_89 and sm_120, which have 99 KiB
    assert [p for p in programs if p["chip"] == [8, 0] and p["shared"] > 99 * 1024] == []


def test_float32_is_never_multiplied_as_tf32(programs):
    assert [program for program in programs if program["tf32"]] == []
    singles = [program for program in programs if program["operand"] == "*fp32"]
    assert singles
    assert [program for program in singles if program["products"]] == [], "float32 on a tensor core"


def test_sixteen_bits_are_multiplied_by_the_chips_own_tensor_cores(programs):
    for program in programs:
        if program["operand"] in ("*fp16", "*bf16"):
            major, minor = program["chip"]
            assert program["products"] == [TENSOR_CORE[10 * major + minor]], program


def test_float64_is_multiplied_as_float64(programs):
    for program in programs:
        if program["operand"] == "*fp64" and program["products"]:
            assert program["float64 products"] > 0, program


def test_no_atomics(programs):
    assert [program for program in programs if program["atomics"] > 0] == []
