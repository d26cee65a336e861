"""Two processes that share every batch: the losses of one, one run directory, and one sentence for a mistake."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vqkernels.training.batches import Batches
from vqkernels.training.checkpoint import read_export
from vqkernels.training.distributed import Ranks
from vqkernels.training.errors import UserError

OPTIONS = {
    "data": "digits",
    "log-every": 1,
    "checkpoint-every": 50,
    "picture-every": 1000,
    "vqvae.hidden-channels": 16,
    "vqvae.code-dim": 4,
    "vqvae.codebook-size": 16,
    "vqvae.downsamplings": 1,
    "vqvae.batch-size": 64,
    "prior.hidden-channels": 8,
    "prior.num-layers": 2,
    "prior.head-channels": 16,
    "prior.batch-size": 64,
    "prior.steps": 20,
}


def vqkernels(processes: int, *arguments: object, **options: object) -> subprocess.CompletedProcess:
    given = [part for name, value in (OPTIONS | options).items() for part in (f"--{name}", str(value))]
    launch = (
        ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--standalone", "--local-addr=127.0.0.1"]
        if processes > 1
        else []
    )
    command = [sys.executable, *launch, "-m", "vqkernels", "train", *given, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def losses(run: Path, stage: str) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["stage"] == stage and "loss" in line]


@pytest.mark.slow
@pytest.mark.parametrize("codebook", [{}, {"vqvae.ema-decay": 0.9}], ids=["gradient", "averages"])
def test_two_processes_have_the_losses_of_one(tmp_path, codebook):
    for processes in (1, 2):
        done = vqkernels(processes, "--out", tmp_path / str(processes), **{"vqvae.steps": 100}, **codebook)
        assert done.returncode == 0, done.stderr
    one, two = (losses(tmp_path / name, "vqvae") for name in ("1", "2"))
    assert len(one) == len(two) == 100
    torch.testing.assert_close(torch.tensor(two), torch.tensor(one), rtol=2e-3, atol=1e-5)
    torch.testing.assert_close(torch.tensor(two[:10]), torch.tensor(one[:10]), rtol=1e-5, atol=1e-6)
    one, two = (losses(tmp_path / name, "prior") for name in ("1", "2"))
    assert len(one) == len(two) == 20
    torch.testing.assert_close(torch.tensor(two), torch.tensor(one), rtol=0.05, atol=0)  # of codes that differ a little


@pytest.mark.slow
def test_two_processes_train_in_mixed_precision_as_one_does(tmp_path):
    for processes in (1, 2):
        steps = {"vqvae.steps": 20, "vqvae.ema-decay": 0.9, "prior.steps": 5}
        done = vqkernels(processes, "--out", tmp_path / str(processes), amp="bfloat16", **steps)
        assert done.returncode == 0, done.stderr
    for stage, count in (("vqvae", 20), ("prior", 5)):
        one, two = (losses(tmp_path / name, stage) for name in ("1", "2"))
        assert len(one) == len(two) == count
        torch.testing.assert_close(torch.tensor(two), torch.tensor(one), rtol=2e-2, atol=0)


@pytest.mark.slow
def test_a_run_of_two_processes_resumes_to_the_same_bits(tmp_path):
    for run, lengths in (("straight", (40,)), ("halves", (20, 40))):
        for number, steps in enumerate(lengths):
            resume = ["--resume"] if number else []
            arguments = ("--out", tmp_path / run, "--stage", "vqvae", *resume)
            done = vqkernels(2, *arguments, **{"vqvae.steps": steps, "vqvae.ema-decay": 0.9})
            assert done.returncode == 0, done.stderr
    expected, found = (read_export(tmp_path / run).tensors for run in ("straight", "halves"))
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


@pytest.mark.slow
def test_a_mistake_is_told_once(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    done = vqkernels(2, "--out", tmp_path)
    assert done.returncode != 0
    assert done.stderr.count("is not empty and no run of vqkernels") == 1
    assert "training/loop.py" not in done.stderr  # torchrun has a traceback of its own
    done = vqkernels(2, "--out", tmp_path / "odd", **{"vqvae.batch-size": 63})
    assert "a batch of 63 images cannot be shared by 2 processes equally" in done.stderr


def test_a_process_gets_its_part_of_a_batch():
    ranks = Ranks(0, 1, torch.device("cpu"))
    assert torch.equal(ranks.share(torch.arange(5)), torch.arange(5))
    ranks.rank, ranks.number = 1, 3
    assert torch.equal(ranks.share(torch.arange(6)), torch.tensor([2, 3]))
    with pytest.raises(UserError, match="a batch of 7 images cannot be shared by 3 processes equally"):
        ranks.share(torch.arange(7))


@pytest.mark.parametrize("number", [1, 2, 3, 6])
def test_processes_read_an_epoch_once_in_a_new_order_whatever_their_number(number):
    """The parts are disjoint and make up the batch of one process; a step needs nothing of the steps before it."""
    alone = Batches(60, 12, seed=3)
    epochs = []
    for epoch in range(2):
        seen = []
        for step in range(5 * epoch, 5 * epoch + 5):
            parts = []
            for rank in range(number):
                ranks = Ranks(0, 1, torch.device("cpu"))
                ranks.rank, ranks.number = rank, number
                parts.append(ranks.share(Batches(60, 12, seed=3).indices(step)))  # as one that has just resumed
            assert torch.equal(torch.cat(parts), alone.indices(step))
            seen += parts
        epochs.append(torch.cat(seen))
        assert epochs[-1].sort().values.tolist() == list(range(60))
    assert not torch.equal(*epochs)
