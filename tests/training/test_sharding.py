"""FSDP2 with two processes: the losses of one, checkpoints of one, and runs that go on in any way."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training import sharded_runs

import vqkernels
from vqkernels.training.checkpoint import read_export
from vqkernels.training.config import RunConfig, VQVAEConfig
from vqkernels.training.errors import UserError
from vqkernels.training.loop import train

SECONDS = 300  # a hang is a failure, not a wait


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> Path:
    """The runs of two processes."""
    folder = tmp_path_factory.mktemp("sharded")
    program = [sys.executable, sharded_runs.__file__]
    environment = {"PYTHONPATH": str(Path(vqkernels.__file__).parents[1]), "PATH": "/usr/bin:/bin"}
    environment["OMP_NUM_THREADS"] = "1"
    processes = [
        subprocess.Popen(
            [*program, str(rank), "2", str(folder / "meeting"), str(folder)],
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
    return folder


def losses(run: Path, stage: str) -> torch.Tensor:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return torch.tensor([line["loss"] for line in lines if line["stage"] == stage and "loss" in line])


@pytest.mark.slow
@pytest.mark.parametrize("codebook", sharded_runs.CODEBOOKS)
def test_sharded_weights_have_the_losses_of_one_process(sharded, tmp_path, codebook):
    """And one process goes on from their checkpoint, with the optimizer's state."""
    train(sharded_runs.config(codebook), tmp_path / "one")
    expected, found = losses(tmp_path / "one", "vqvae"), losses(sharded / codebook, "vqvae")
    assert len(expected) == len(found) == sharded_runs.STEPS[codebook]
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=1e-5)
    torch.testing.assert_close(found[:10], expected[:10], rtol=1e-5, atol=1e-6)
    expected, found = losses(tmp_path / "one", "prior"), losses(sharded / codebook, "prior")
    assert len(expected) == len(found) == 20
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0)  # of codes that differ a little
    whole, gathered = read_export(tmp_path / "one").tensors, read_export(sharded / codebook).tensors
    assert {name: x.shape for name, x in whole.items()} == {name: x.shape for name, x in gathered.items()}

    shutil.copytree(sharded / codebook, tmp_path / "goes on")
    assert train(sharded_runs.changed(codebook), tmp_path / "goes on", resume=True).finished
    assert len(losses(tmp_path / "goes on", "prior")) == 22
    steps = [
        torch.load(run / "state.pt")["optimizer"]["state"][0]["step"]
        for run in (tmp_path / "one", tmp_path / "goes on")
    ]
    assert steps == [20, 22]


@pytest.mark.slow
def test_a_sharded_run_resumes_to_the_same_bits(sharded):
    expected, found = (read_export(sharded / run).tensors for run in ("averages", "halves"))
    names = [name for name in expected if name.startswith("vqvae.")]
    assert names and [name for name in names if not torch.equal(expected[name], found[name])] == []
    for rank in range(2):  # the whole model is in every process at the end
        left = torch.load(sharded / f"left_{rank}.pt", weights_only=True)
        assert [name for name in names if not torch.equal(found[name], left[name.removeprefix("vqvae.")])] == []


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_loss_that_is_not_finite_ends_all_processes_with_one_sentence(sharded, parallel):
    told = [(sharded / f"{parallel}_{rank}.txt").read_text() for rank in range(2)]
    assert told[0].startswith("Diverged: the loss of the vqvae is ") and told[1].startswith("ReportedElsewhere: ")
    saved = list((sharded / parallel).glob("diverged_vqvae_*.safetensors"))
    assert len(saved) == 1 and str(saved[0]) in told[0]
    assert len(load_file(saved[0])["pixels"]) == 64  # the batch of both


@pytest.mark.parametrize("option", [{"init": "kmeans"}, {"revive": "rows"}])
def test_a_trained_codebook_that_would_be_written_to_is_not_sharded(option):
    with pytest.raises(
        UserError, match="parallel fsdp drops what a step writes into a codebook that is trained by its"
    ):
        RunConfig(data="digits", parallel="fsdp", vqvae=VQVAEConfig(**option)).check()
    RunConfig(data="digits", parallel="fsdp", vqvae=VQVAEConfig(ema_decay=0.9, **option)).check()
