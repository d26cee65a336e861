"""The run directory: atomic writes, what counts as a run, damaged files, the lock."""

import errno
import os
from pathlib import Path

import pytest
import torch

from vqkernels.training.checkpoint import ImageFormat, RunDirectory, read_export, write_atomically
from vqkernels.training.config import RunConfig
from vqkernels.training.errors import UserError

IMAGES = ImageFormat(1, 8, 8, ("cat", "dog"))


def state(step: int) -> dict:
    return {
        "config": RunConfig(data="digits").to_toml(),
        "stage": "vqvae",
        "step": step,
        "vqvae": {"weight": torch.full((2, 3), float(step))},
        "prior": {},
    }


def begun(path) -> RunDirectory:
    run = RunDirectory(path, resume=False)
    run.acquire()
    run.begin(RunConfig(data="digits"))
    run.release()
    return run


def test_a_failed_write_leaves_the_old_file(tmp_path):
    file = tmp_path / "file"
    write_atomically(file, lambda opened: opened.write(b"old"))

    def fail(opened):
        opened.write(b"half of the ne")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(file, fail)
    assert file.read_bytes() == b"old"
    write_atomically(file, lambda opened: opened.write(b"new"))
    assert file.read_bytes() == b"new" and os.listdir(tmp_path) == ["file"]


def test_state_and_export_come_back(tmp_path):
    run = begun(tmp_path / "run")
    assert run.load_state() is None
    run.save(state(7), IMAGES)
    loaded = RunDirectory(run.path, resume=True).load_state()
    assert loaded["step"] == 7 and torch.equal(loaded["vqvae"]["weight"], torch.full((2, 3), 7.0))
    export = read_export(run.path)
    assert (export.images, export.stage, export.step) == (IMAGES, "vqvae", 7)
    assert export.config == RunConfig(data="digits")
    assert torch.equal(export.tensors["vqvae.weight"], torch.full((2, 3), 7.0))


@pytest.mark.parametrize("file", ["state.pt", "model.safetensors"])
def test_a_failure_between_or_within_the_files_leaves_both_readable(tmp_path, monkeypatch, file):
    """Whichever replacement fails, each file is one checkpoint or the other, and `export` brings them together."""
    run = begun(tmp_path)
    run.save(state(1), IMAGES)
    replace = os.replace

    def failing(source, target):
        if str(target).endswith(file):
            raise OSError("killed here")
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="killed here"):
        run.save(state(2), IMAGES)
    monkeypatch.undo()
    resumed = RunDirectory(tmp_path, resume=True)
    loaded = resumed.load_state()
    assert loaded["step"] == (1 if file == "state.pt" else 2)
    assert read_export(tmp_path).step == 1
    resumed.begin(RunConfig(data="digits"))
    resumed.export(loaded, IMAGES)
    assert read_export(tmp_path).step == loaded["step"]
    assert not list(tmp_path.glob(".*.tmp"))


def test_what_counts_as_a_run(tmp_path):
    RunDirectory(tmp_path / "new", resume=False)
    assert not (tmp_path / "new").exists()  # looking writes nothing
    (tmp_path / "empty").mkdir()
    RunDirectory(tmp_path / "empty", resume=False)
    begun(tmp_path / "run")
    RunDirectory(tmp_path / "run", resume=True)
    with pytest.raises(UserError, match="already holds a run; continue it with --resume"):
        RunDirectory(tmp_path / "run", resume=False)
    for missing in ("new", "empty"):
        with pytest.raises(UserError, match="there is no run to resume in"):
            RunDirectory(tmp_path / missing, resume=True)


@pytest.mark.parametrize("name,text", [("notes.txt", "mine"), ("config.toml", '[package]\nname = "other"\n')])
@pytest.mark.parametrize("resume", [False, True])
def test_a_foreign_directory_is_refused_and_left_alone(tmp_path, name, text, resume):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match="is not empty and no run of vqkernels"):
        RunDirectory(tmp_path, resume=resume)
    assert os.listdir(tmp_path) == [name] and (tmp_path / name).read_text() == text


def test_a_file_is_no_run_directory(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file, not a run directory"):
        RunDirectory(tmp_path / "file", resume=False)


@pytest.mark.parametrize("kept", [0, 100, 1000])
def test_damaged_files_are_named(tmp_path, kept):
    run = begun(tmp_path)
    run.save(state(1), IMAGES)
    for file in (run.state_file, run.model_file):
        file.write_bytes(file.read_bytes()[: min(kept, file.stat().st_size - 1)])
    with pytest.raises(UserError, match=r"state\.pt is damaged"):
        run.load_state()
    with pytest.raises(UserError, match=r"model\.safetensors is damaged"):
        read_export(tmp_path)


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path):
    run = begun(tmp_path)
    torch.save({"format": "vqkernels-run-1", "step": os.system}, run.state_file)
    with pytest.raises(UserError, match="is damaged"):
        run.load_state()


def test_exports_of_others_are_refused(tmp_path):
    with pytest.raises(UserError, match="nowhere does not exist"):
        read_export(tmp_path / "nowhere")
    with pytest.raises(UserError, match="is not a run directory"):
        read_export(tmp_path)
    begun(tmp_path / "run")
    with pytest.raises(UserError, match="has no checkpoint yet"):
        read_export(tmp_path / "run")


def test_one_process_at_a_time(tmp_path):
    first = begun(tmp_path)
    second = RunDirectory(tmp_path, resume=True)
    first.acquire()
    with pytest.raises(UserError, match="another process is training in"):
        second.acquire()
    first.release()
    second.acquire()
    second.release()


def test_a_full_disk_is_one_sentence_and_loses_nothing(tmp_path):
    write_atomically(tmp_path / "x", lambda file: file.write(b"old"))

    def fill(file):
        file.write(b"ne")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UserError, match="the disk is full: .*x cannot be written, and is as it was before"):
        write_atomically(tmp_path / "x", fill)
    assert (tmp_path / "x").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_real_full_device_is_told_alike(tmp_path):
    """The error of the operating system itself, when what was written is flushed."""

    def write(file):
        with open("/dev/full", "wb") as full:
            full.write(b"x" * 10_000)

    with pytest.raises(UserError, match="the disk is full"):
        write_atomically(tmp_path / "x", write)
    assert not list(tmp_path.iterdir())
