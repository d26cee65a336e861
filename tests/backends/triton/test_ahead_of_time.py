"""What the compiler makes of every kernel that `auto` can launch, for sm_80, sm_90 and sm_100, without a GPU."""

import copy
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from backends.triton import regimes

from vqkernels.backends.triton import configs

SCRIPT = Path(__file__).with_name("ahead_of_time.py")
PRODUCT = {(8, 0): "mma.sync", (9, 0): "wgmma", (10, 0): "tcgen05"}


def lines_of(*options):
    """What the script prints, one object per line."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), *options]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module", params=["quick", pytest.param("all", marks=pytest.mark.slow)])
def programs(request):
    """One description per compiled program."""
    return lines_of(*(["--all"] if request.param == "all" else []))


@pytest.fixture(scope="module")
def every_program():
    return lines_of("--all")


def unreached(programs):
    """Entries of the table of tiles, by epilogue, that no compiled program has."""
    chips = {configs.family(chip): list(chip) for chip in PRODUCT}
    reached = {
        (p["chip"][0], configs.dim_bucket(c["PADDED"]), c["GROUPS"], c["BM"], c["BK"], *p["options"].values())
        for p in programs
        if p["kernel"] == "search_kernel" and (c := p["constants"])
    }
    return [
        (family, bucket, size, groups)
        for family, buckets in configs.TABLE.items()
        for bucket, sizes in buckets.items()
        for size, shape in sizes.items()
        for groups in (False, True)
        if (chips.get(family, [0])[0], bucket, groups, *shape) not in reached
    ]


@pytest.mark.slow
def test_every_entry_of_the_table_of_tiles_is_compiled(every_program):
    assert unreached(every_program) == []


@pytest.mark.slow
def test_an_entry_that_is_not_compiled_is_noticed(every_program, monkeypatch):
    """A new architecture, a new D bucket, a new size bucket, another shape: each in turn."""
    table = configs.TABLE
    for family, bucket, size, shape in (
        (120, 64, "many", (128, 32, 4, 3)),
        (90, 96, "many", (128, 128, 4, 3)),
        (90, 64, "huge", (256, 128, 8, 3)),
        (90, 64, "few", (64, 64, 4, 3)),
    ):
        changed = copy.deepcopy(table)
        changed.setdefault(family, {}).setdefault(bucket, {})[size] = shape
        monkeypatch.setattr(configs, "TABLE", changed)
        assert unreached(every_program) == [(family, bucket, size, False), (family, bucket, size, True)]


@pytest.mark.slow
def test_every_shape_of_the_chained_search_is_compiled(every_program):
    reached = {
        (p["chip"][0], c["PADDED"], c["BM"], c["BK"], *p["options"].values())
        for p in every_program
        if p["kernel"] == "residual_search_kernel" and (c := p["constants"])
    }
    expected = {
        (chip[0], bucket, *shape) for chip in PRODUCT for bucket, shape in configs.CHAINED[configs.family(chip)].items()
    }
    assert expected <= reached
    metrics = {p["constants"]["METRIC"] for p in every_program if p["kernel"] == "residual_search_kernel"}
    assert metrics == {"euclidean", "dot", "cosine"}


def test_the_regimes_cover_the_table_and_every_pair():
    """Without compiling: every size bucket has its searches, every D bucket its D, every pair of values a regime."""
    for chip in PRODUCT:
        table = configs.TABLE[configs.family(chip)]
        searched = {
            (configs.dim_bucket(configs.padded_dim(r.dim)), configs.size_bucket(r.rows))
            for r in regimes.search_regimes(chip)
        }
        assert searched == {(bucket, size) for bucket, sizes in table.items() for size in sizes}
        elements = regimes.element_regimes(chip)
        for a, b in itertools.combinations(regimes.AXES, 2):
            pairs = {(getattr(r, a), getattr(r, b)) for r in elements}
            assert pairs >= set(itertools.product(regimes.AXES[a], regimes.AXES[b])), (a, b)
    triples = {(r.z, r.codebook, r.metric) for r in regimes.element_regimes(regimes.CROSSED)}
    assert len(triples) == 4 * 4 * 3


@pytest.mark.slow
def test_the_compiler_sees_all_that_a_wider_sweep_would_show_it():
    """Every type, alignment and constant of every single argument."""
    assert lines_of("--unseen") == []


def test_every_kernel_compiles_for_every_chip(programs):
    kernels = {program["kernel"] for program in programs}
    assert kernels == {
        "centre_kernel", "extent_kernel", "pack_codes_kernel", "pack_rows_kernel", "search_kernel", "merge_kernel",
        "resolve_kernel", "rescore_kernel", "gather_kernel", "key_kernel", "grad_kernel", "partial_kernel",
        "total_kernel", "residual_search_kernel", "subtract_kernel", "compose_kernel", "residual_grad_kernel",
        "residual_partial_kernel", "residual_total_kernel",
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
        if program["kernel"] in ("search_kernel", "residual_search_kernel"):
            assert program["matrix"] == [PRODUCT[tuple(program["chip"])]], program


def test_no_tf32_anywhere(programs):
    assert [program for program in programs if program["tf32"]] == []


def test_the_contract_is_evaluated_without_contraction(programs):
    contracts = {"rescore_kernel", "residual_search_kernel"}
    rescoring = [program for program in programs if program["kernel"] in contracts]
    assert {program["kernel"] for program in rescoring} == contracts
    for program in rescoring:
        assert program["double_fma"] == 0, program
        if program["constants"]["METRIC"] != "cosine":  # its root and division are built from them
            assert program["machine_double_fma"] == 0, program


def test_no_float_atomics(programs):
    assert [program for program in programs if program["float_atomics"] > 0] == []
