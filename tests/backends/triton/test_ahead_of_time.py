"""What the compiler makes of every kernel that `auto` can launch, for sm_80, sm_90 and sm_100, without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
SCRIPT = Path(__file__).with_name("ahead_of_time.py")
PRODUCT = {(8, 0): "mma.sync", (9, 0): "wgmma", (10, 0): "tcgen05"}


@pytest.fixture(scope="module", params=["quick", pytest.param("all", marks=pytest.mark.slow)])
def programs(request):
    """One description per compiled program."""
    command = [sys.executable, str(SCRIPT)] + (["--all"] if request.param == "all" else [])
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_kernel_compiles_for_every_chip(programs):
    kernels = {program["kernel"] for program in programs}
    assert kernels == {
        "centre_kernel", "extent_kernel", "pack_codes_kernel", "pack_rows_kernel", "search_kernel", "merge_kernel",
        "resolve_kernel", "rescore_kernel", "gather_kernel", "key_kernel", "grad_kernel", "partial_kernel",
        "total_kernel",
    }  # fmt: skip
    for chip in PRODUCT:
        assert {program["kernel"] for program in programs if tuple(program["chip"]) == chip} == kernels


def test_nothing_spills(programs):
    assert [program for program in programs if program["stack"] > 0] == []


def test_shared_memory_fits_the_chip(programs):
    assert [program for program in programs if program["shared"] > program["limit"]] == []
    # the sm_80 shapes also serve sm_86, sm_89 and sm_120, which have 99 KiB
    assert [p for p in programs if p["chip"] == [8, 0] and p["shared"] > 99 * 1024] == []


def test_the_product_runs_on_the_chips_own_tensor_cores(programs):
    for program in programs:
        if program["kernel"] == "search_kernel":
            assert program["matrix"] == [PRODUCT[tuple(program["chip"])]], program


def test_no_tf32_anywhere(programs):
    assert [program for program in programs if program["tf32"]] == []


def test_the_contract_is_evaluated_without_contraction(programs):
    rescoring = [program for program in programs if program["kernel"] == "rescore_kernel"]
    assert rescoring
    for program in rescoring:
        assert program["double_fma"] == 0, program
        if program["constants"]["METRIC"] != "cosine":  # its root and division are built from them
            assert program["machine_double_fma"] == 0, program


def test_no_float_atomics(programs):
    assert [program for program in programs if program["float_atomics"] > 0] == []
