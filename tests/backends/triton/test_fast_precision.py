"""The simulation behind the documented rate of wrong indices of precision="fast" is the kernels', and is kept."""

import json
from pathlib import Path

import pytest
import torch
from backends.triton import hostile

pytest.importorskip("triton")

from studies import fast_precision
from vqkernels import reference
from vqkernels.backends.triton import nearest

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("name", ["eight dimensions", "integer lattice", "duplicates", *hostile.slow(["gaussian"])])
def test_the_simulated_pass_is_the_kernels(name, device):
    if device.type == "cuda":
        pytest.skip("the simulation interprets the packing kernels")
    z, codebook = hostile.make(name)
    indices, _ = nearest.nearest(z[None, None], codebook[None], None, "euclidean", "fast")
    assert torch.equal(fast_precision.candidate_pass(z, codebook, fast_precision.fp32_product), indices[0, 0])


def test_wrong_indices_are_counted():
    z, codebook = torch.tensor([[0.0], [1.0], [2.0], [3.0]]), torch.tensor([[0.0], [4.0]])
    verdict = fast_precision.judge(torch.tensor([1, 0, 0, 0]), reference.nearest(z, codebook), z + 0.5, codebook)
    assert verdict == {"rows": 4, "wrong": 2, "rate": 0.5, "excess": 48.0}


def test_the_truncating_sum_cuts_off():
    q, p = torch.tensor([[1.0, 2.0**-24, 2.0**-24]]), torch.ones(1, 3)
    assert fast_precision.truncating_product(q, p).item() == 1.0
    assert fast_precision.truncating_product(-q, p).item() == -1.0
    assert fast_precision.truncating_product(q * 3, p).item() == 3.0


def test_the_committed_table_is_complete_and_named_where_it_is_quoted():
    table = json.loads(fast_precision.RESULT.read_text())
    cells = {(line["data"], line["codes"], line["dim"]) for line in table["cells"]}
    assert cells == {(data, *case) for data in fast_precision.DATA for case in fast_precision.CASES}
    for line in table["cells"]:
        assert line["triton"]["rows"] == line["cpu"]["rows"] == fast_precision.ROWS
        assert line["triton"]["rate"] <= 0.002 and line["cpu"]["rate"] <= 1e-4
    for path in ("docs/kernels.md", "vqkernels/ops/nearest.py"):
        assert "studies.fast_precision" in (ROOT / path).read_text()
