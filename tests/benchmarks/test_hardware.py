"""The command for a machine with a GPU: rehearsed whole on the CPU, and its rule that nothing wrong is timed."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
STEPS = {"correctness", "accumulation", "grid", "model", "full model", "questions", "entropy", "entropy times", "cuda"}
STEPS |= {"cuda times"}


def command(out, *options, **environment):
    """Run it in a process of its own."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    arguments = [sys.executable, "-W", "ignore", "-m", "benchmarks.hardware", "--out", str(out), *options]
    kept |= {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.run(arguments, capture_output=True, text=True, env=kept, cwd=ROOT, check=False)


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    out = tmp_path_factory.mktemp("hardware")
    return command(out, "--dry-run", "--minutes", "20", TRITON_INTERPRET="1"), out


@pytest.mark.slow
def test_every_step_is_rehearsed_and_right(rehearsal):
    done, out = rehearsal
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert {path.name for path in out.iterdir()} == {f"{name}.json" for name in STEPS} | {"summary.txt"}
    for name in STEPS:
        written = json.loads((out / f"{name}.json").read_text())
        assert written["rows"]
        assert written["machine"]["dry run"] is True
        assert written["machine"]["kernels"]
        assert not any(row["what"] == "error" or ("problem" in row and name == "grid") for row in written["rows"])
    verdict = json.loads((out / "correctness.json").read_text())["rows"][-1]
    assert verdict["what"] == "verdict"
    assert verdict["ok"] is True


@pytest.mark.slow
def test_a_rehearsal_tells_no_times(rehearsal):
    done, out = rehearsal
    for path in [*out.iterdir()]:
        assert '"ms"' not in path.read_text()
        assert "scores/s" not in path.read_text()
    assert " ms" not in done.stdout


def test_nothing_is_timed_after_something_was_wrong(tmp_path, monkeypatch):
    import benchmarks.hardware.__main__ as room

    def wrong(setting):
        yield {"what": "a kernel", "ok": False}

    def never(setting):
        raise AssertionError("was timed")

    steps = (room.Stage("correctness", wrong, 1, False), room.Stage("grid", never, 1, True))
    monkeypatch.setattr(room, "STAGES", steps)
    monkeypatch.setattr(room, "rehearsal", lambda *_: room.Setting("cpu", True, 1e12))
    monkeypatch.setattr(room, "facts", lambda _: {"gpu": "none"})
    monkeypatch.setattr(sys, "argv", ["hardware", "--dry-run", "--out", str(tmp_path)])
    assert room.main() == 1
    summary = (tmp_path / "summary.txt").read_text()
    assert "grid: not run, since something before was wrong" in summary
    assert not (tmp_path / "grid.json").exists()


def test_the_full_model_is_rehearsed_with_the_losses_of_the_usual_one(monkeypatch):
    """Alone: with the package's own operators, every flag but those that compile."""
    import torch

    from benchmarks.hardware import models
    from benchmarks.hardware.setting import Setting

    setting = Setting(torch.device("cpu"), True, 1e12)
    rows = list(models.full_model(setting))
    assert [row["what"].partition(": ")[2] for row in rows] == [
        "VQ-VAE training step",
        "prior training step",
        "sampling",
    ]
    for row in rows[:2]:
        assert row["ok"], row
        assert {"usual", "no flag", "channels last", "bfloat16", "float16"} <= set(row["times"])
        assert all(entry == {"rehearsed": True} for entry in row["times"].values()), row
    monkeypatch.setattr(models, "usual_vqvae", lambda model: copy.deepcopy(model).apply(_moved))
    row = next(iter(models.full_model(setting)))
    assert row["ok"] is False and "times" not in row


def _moved(module):
    """Makes another model of it."""
    if hasattr(module, "bias") and module.bias is not None:
        module.bias.data.add_(1)


def test_an_error_and_the_clock_leave_complete_files(tmp_path, monkeypatch):
    import benchmarks.hardware.__main__ as room
    from benchmarks.hardware.results import Results

    def breaks(setting):
        yield {"what": "first"}
        raise RuntimeError("an illegal memory access\nat length")

    def endless(setting):
        while True:
            yield {"what": "again"}

    results, lines = Results(tmp_path, {"gpu": "none"}), []
    setting = room.Setting("cpu", True, room.time.monotonic() + 0.2)
    assert not room.run(room.Stage("breaks", breaks, 1, False), setting, results, lines)
    assert [row["what"] for row in json.loads((tmp_path / "breaks.json").read_text())["rows"]] == ["first", "error"]
    assert room.run(room.Stage("endless", endless, 0.5, False), setting, results, lines)
    assert json.loads((tmp_path / "endless.json").read_text())["rows"]
    assert any("cut short by the clock" in line for line in lines)


def test_without_a_gpu_it_says_so(tmp_path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = command(tmp_path)
    assert done.returncode == 2
    assert "torch sees no CUDA GPU" in done.stderr
    done = command(tmp_path, "--dry-run")
    assert done.returncode == 2
    assert "set TRITON_INTERPRET=1" in done.stderr
