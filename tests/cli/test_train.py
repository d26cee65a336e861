"""`vqkernels train`: options, the sentence for each mistake, and what a kill leaves."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from vqkernels.cli.main import main
from vqkernels.training.checkpoint import read_export
from vqkernels.training.config import RunConfig

TINY = [
    *("--vqvae.hidden-channels", "8", "--vqvae.code-dim", "4", "--vqvae.codebook-size", "8"),
    *("--vqvae.downsamplings", "1", "--vqvae.residual-blocks", "1", "--vqvae.steps", "4"),
    *("--prior.hidden-channels", "8", "--prior.num-layers", "2", "--prior.head-channels", "8", "--prior.steps", "4"),
]

KILLED = ["--data", "digits", *TINY, "--vqvae.hidden-channels", "64", "--vqvae.steps", "40", "--stage", "vqvae"]
KILLED += ["--checkpoint-every", "1", "--log-every", "1"]


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Path:
    """The run that is killed elsewhere, left in peace."""
    out = tmp_path_factory.mktemp("straight") / "run"
    assert main(["train", *KILLED, "--out", str(out)]) == 0
    return out


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "vqkernels", *map(str, arguments)]


def fails(capsys, *arguments: object) -> str:
    """The one line that a failing command prints."""
    assert main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1, captured.err
    return captured.err


def test_trains_resumes_and_reads_its_own_configuration(tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["train", "--data", "digits", "--out", str(out), "--stage", "vqvae", *TINY]) == 0
    assert f"its pictures are in {out / 'pictures'}" in capsys.readouterr().out
    assert (read_export(out).stage, read_export(out).step) == ("vqvae", 4)
    assert main(["train", "--out", str(out), "--resume", "--vqvae.steps", "6"]) == 0
    assert (read_export(out).stage, read_export(out).step) == ("prior", 4)
    assert read_export(out).config.vqvae.steps == 6

    twin = tmp_path / "twin"
    assert main(["train", "--config", str(out / "config.toml"), "--out", str(twin), "--seed", "9"]) == 0
    config = RunConfig.from_toml((twin / "config.toml").read_text(), "twin")
    assert config.differences(read_export(out).config) == ["seed"]


def test_mistakes_are_one_sentence_and_leave_nothing(tmp_path, capsys):
    out, folder = tmp_path / "run", tmp_path / "images"
    assert "the data nowhere does not exist" in fails(capsys, "train", "--data", "nowhere", "--out", out)
    folder.mkdir()
    assert f"the folder {folder} holds no images" in fails(capsys, "train", "--data", folder, "--out", out)
    Image.new("L", (6, 4)).save(folder / "a.png")
    Image.new("L", (5, 4)).save(folder / "b.png")
    assert "a.png is 6x4, but " in fails(capsys, "train", "--data", folder, "--out", out)
    (folder / "b.png").write_bytes((folder / "a.png").read_bytes()[:50])
    assert f"the image {folder / 'b.png'} cannot be read" in fails(capsys, "train", "--data", folder, "--out", out)
    assert "vqvae.code_dim must be at least 1" in fails(
        capsys, "train", "--data", "digits", "--out", out, "--vqvae.code-dim", 0
    )
    assert "no run to resume" in fails(capsys, "train", "--data", "digits", "--out", out, "--resume")
    assert "cannot be read" in fails(capsys, "train", "--config", tmp_path / "no.toml", "--out", out)
    assert not out.exists()


def test_foreign_and_used_directories_are_refused(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("years of work")
    sentence = "is not empty and no run of vqkernels; choose a new directory"
    assert sentence in fails(capsys, "train", "--data", "digits", "--out", tmp_path)
    assert sentence in fails(capsys, "train", "--out", tmp_path, "--resume")
    assert os.listdir(tmp_path) == ["thesis.txt"]
    assert main(["train", "--data", "digits", "--out", str(tmp_path / "run"), "--stage", "vqvae", *TINY]) == 0
    capsys.readouterr()
    assert "already holds a run" in fails(capsys, "train", "--data", "digits", "--out", tmp_path / "run")


def test_a_mistake_in_a_real_process_exits_with_2_and_no_traceback(tmp_path):
    (tmp_path / "mine.txt").write_text("")
    done = subprocess.run(
        command("train", "--data", "digits", "--out", tmp_path), capture_output=True, text=True, timeout=300
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"vqkernels train: {tmp_path} is not empty and no run of vqkernels; choose a new directory\n"
    )


def test_sigterm_writes_a_checkpoint(tmp_path):
    out = tmp_path / "run"
    arguments = ["--data", "digits", "--out", out, *TINY, "--vqvae.steps", 100_000, "--log-every", 5]
    process = subprocess.Popen(command("train", *arguments), stderr=subprocess.PIPE, text=True)
    wait_for(lambda: steps_logged(out) >= 10, process)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=300)
    assert process.returncode == 1 and "continue with --resume" in error
    assert read_export(out).step >= steps_logged(out) >= 10


@pytest.mark.parametrize("half_written", ["state.pt", "model.safetensors"])
def test_a_run_killed_while_writing_a_checkpoint_resumes_to_the_same_bits(straight, tmp_path, half_written):
    """SIGKILL at a moment when a half-written file lies in the run directory; it may take more than one try."""
    out, resume = tmp_path / "run", []
    for _ in range(5):
        process = subprocess.Popen(command("train", *KILLED, *resume, "--out", out), stderr=subprocess.DEVNULL)
        begun, resume = steps_logged(out), ["--resume"]
        wait_for(lambda: steps_logged(out) > begun + 2 and left(out, half_written), process)  # noqa: B023
        process.kill()
        assert process.wait() == -signal.SIGKILL
        assert 0 < read_export(out).step < 40  # whole, whatever the moment
        if left(out, half_written):
            break
    else:
        pytest.fail("every kill came too late to leave a half-written file")
    assert main(["train", *KILLED, "--resume", "--out", str(out)]) == 0
    expected, found = read_export(straight).tensors, read_export(out).tensors
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert logged(out) == list(range(1, 41)) and not list(out.glob(".*.tmp"))


def left(out: Path, name: str) -> list[Path]:
    """Half-written files of this name."""
    return list(out.glob(f".{name}.*.tmp"))


def wait_for(condition, process: subprocess.Popen, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < end, "the moment never came"


def logged(out: Path) -> list[int]:
    """The steps in metrics.jsonl, of lines with a loss; a line that is being written is left out."""
    file = out / "metrics.jsonl"
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    return [json.loads(line)["step"] for line in lines if '"loss"' in line]


def steps_logged(out: Path) -> int:
    return max(logged(out), default=0)
