"""Two gloo processes whose layers were built before the process group, where the peer no longer shares statistics."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from dropin import lucidrains_ranks

import vqkernels

SECONDS = 120  # a hang is a failure, not a wait


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    environment = {
        "PYTHONPATH": str(Path(vqkernels.__file__).parents[1]),
        "PATH": "/usr/bin:/bin",
        "OMP_NUM_THREADS": "1",
    }
    program = [sys.executable, lucidrains_ranks.__file__]
    processes = [
        subprocess.Popen(
            [*program, str(rank), "2", str(folder / "meeting"), str(folder / f"{rank}.pt")],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for process in processes:
            _, errors = process.communicate(timeout=SECONDS)
            assert process.returncode == 0, errors
    finally:
        for process in processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in lucidrains_ranks.LAYERS if name != "not synced"])
def test_ranks_hold_the_same_bits(name, ranks):
    one, other = (states[name] for states in ranks)
    assert all(value.equal(other[key]) and value.isfinite().all() for key, value in one.items())


@pytest.mark.slow
def test_ranks_together_are_one_process_with_the_joined_batch(ranks):
    alone = lucidrains_ranks.run(0, 1, lucidrains_ranks.build())
    for name in ("ema", "heads"):
        for key, value in alone[name].items():
            torch.testing.assert_close(ranks[0][name][key], value, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_layer_told_not_to_share_does_not(ranks):
    one, other = (states["not synced"]["_codebook.embed"] for states in ranks)
    assert not one.equal(other)
