"""The budget of the CUDA search: the committed table, its limits, and that one more instruction would be noticed."""

import json
import re
import shutil

import pytest

pytest.importorskip("triton")

from benchmarks.budgets import cuda
from benchmarks.budgets import cuda_search as budget

TABLE = json.loads(budget.TABLE.read_text())
LINES = TABLE["kernels"]
TOLERANCE = 0.1  # cycles per score; one more half-rate instruction per score would be two
NAMES = ("search D=16", "search D=32", "search D=64", "search D=128", "search D>128, a slice of 64")


def needs_the_tables_nvcc():
    if cuda.nvcc() is None:
        pytest.skip("nvcc is not found")
    if cuda.release() != TABLE["nvcc"]:
        pytest.skip(f"the table was counted with nvcc {TABLE['nvcc']}, here is {cuda.release()}")


def exceeding(counted):
    """What costs more than the committed table says."""
    return [
        f"{name}: {key} {value}, was {LINES[name][key]}"
        for name, found in counted["kernels"].items()
        for key, value in found.items()
        if value > LINES[name][key] + (TOLERANCE if key in ("cycles", "epilogue", "issue", "half_rate") else 0)
    ]


def test_the_table_is_within_the_limits():
    kernels = (*NAMES, "pack", "resolve", "rescore", "gather", "finish")
    assert set(LINES) == {f"{chip} {name}" for chip in budget.CHIPS for name in kernels}
    assert all(found["stack"] == 0 for found in LINES.values()), "nothing spills"
    for name in NAMES:
        assert LINES[f"sm_90a {name}"]["epilogue"] <= 5.5
    for dim in (16, 32, 64):
        assert LINES[f"sm_90a search D={dim}"]["cycles"] <= 5.5, "products and operand loads included"
    for chip in budget.CHIPS:
        for name in NAMES:
            found = LINES[f"{chip} {name}"]
            assert found["shared"] <= 99 * 1024, "what sm_86 and sm_89 have"
            # two blocks of 128 threads per multiprocessor, by registers (in units of eight) and by shared memory
            assert 2 * 128 * -(-found["registers"] // 8) * 8 <= 65536
            assert found["cycles"] >= max(found["issue"], 2 * found["half_rate"]) - 0.002
    # 32 rows by 64 codes of a warp: two products of 16 rows by eight of eight codes, per 16 channels
    assert [LINES[f"sm_90a {name}"]["products"] for name in NAMES] == [16, 32, 64, 128, 64]


def test_the_count_does_not_rise_on_sm_90():
    needs_the_tables_nvcc()
    assert exceeding(budget.table(("sm_90a",), sources=("search",))) == []


@pytest.mark.slow
def test_the_count_does_not_rise_elsewhere():
    needs_the_tables_nvcc()
    assert exceeding(budget.table()) == []


@pytest.mark.slow
def test_one_more_selection_per_score_is_noticed(tmp_path):
    """A copy of the sources whose reduction selects every score once more."""
    needs_the_tables_nvcc()
    shutil.copytree(budget.ROOT / "csrc", tmp_path / "csrc")
    path = tmp_path / "csrc" / "cuda" / "search.h"
    score = r"lowest = fminf\(lowest, (fmaf\(.*?\]\.(?:first|next)\))\);"
    text, found = re.subn(score, r"lowest = fminf(lowest, scale[h] > 0.5f ? \1 : 1.0f);", path.read_text())
    assert found == 2
    path.write_text(text)
    noticed = exceeding(budget.table(("sm_90a",), tmp_path, ("search",)))
    assert {f"sm_90a search D={dim}" for dim in (16, 32, 64)} <= {one.split(":")[0] for one in noticed}
