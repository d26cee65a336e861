"""SIGKILL at random points: the run resumes every time, and ends in the weights of a run that nobody killed."""

import multiprocessing
import random
import time
from pathlib import Path

import pytest
import torch
from training import killed_run

from vqkernels.training.checkpoint import read_export

KILLS = 20


def checkpoint(path: Path) -> tuple[str, int] | None:
    """Stage and step of a run's last checkpoint; None before the first."""
    if not (path / "model.safetensors").exists():
        return None
    export = read_export(path)
    return export.stage, export.step


@pytest.mark.slow
def test_twenty_kills_change_no_bit(tmp_path):
    processes = multiprocessing.get_context("forkserver")  # torch is imported once
    processes.set_forkserver_preload(["vqkernels.training.loop", "torch._dynamo"])
    whole = processes.Process(target=killed_run.straight, args=(tmp_path / "straight",))
    whole.start()
    draws, stopped_at = random.Random(0), set()
    for number in range(KILLS):
        begun, tells = processes.Pipe(duplex=False)
        process = processes.Process(target=killed_run.go_on, args=(tmp_path / "killed", tells))
        process.start()
        assert begun.poll(120)
        while number % 2 and process.is_alive() and checkpoint(tmp_path / "killed") in stopped_at:
            time.sleep(0.01)  # on a slow machine too, every second run writes a checkpoint before it is killed
        time.sleep(draws.uniform(0.0, 0.25))
        assert process.is_alive(), "the run ended before it was killed often enough"
        process.kill()
        process.join()
        stopped_at.add(checkpoint(tmp_path / "killed"))
    last = processes.Process(target=killed_run.go_on, args=(tmp_path / "killed", tells))
    last.start()
    for process in (last, whole):
        process.join()
        assert process.exitcode == 0
    expected, found = (read_export(tmp_path / name).tensors for name in ("straight", "killed"))
    assert expected.keys() == found.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    assert len(stopped_at) > KILLS // 4, "the kills came at the same place again and again"
