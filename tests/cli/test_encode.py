"""`vqkernels encode` and `decode`: there and back, continued, shared by processes; the sentence for each mistake."""

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vqkernels.cli.main import main
from vqkernels.training.acceleration import SpeedConfig
from vqkernels.training.checkpoint import RunDirectory, read_export
from vqkernels.training.code_shards import CodesDirectory
from vqkernels.training.config import RunConfig, VQVAEConfig
from vqkernels.training.data import load_images
from vqkernels.training.errors import UserError
from vqkernels.training.loop import train
from vqkernels.training.model_building import load_vqvae
from vqkernels.training.pictures import to_pixels

CPU = torch.device("cpu")


def make_run(path: Path, data: str = "digits", seed: int = 0) -> Path:
    vqvae = VQVAEConfig(hidden_channels=8, code_dim=4, codebook_size=8, downsamplings=1, residual_blocks=1, steps=20)
    train(RunConfig(data=data, held_out=0.0, seed=seed, vqvae=vqvae), path, stage="vqvae")
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("encode") / "run")


@pytest.fixture(scope="module")
def digits() -> np.ndarray:
    return load_images("digits", held_out=0.0).train.pixels


def encode(run, out, *options) -> int:
    return main(["encode", "--run", str(run), "--out", str(out), *map(str, options)])


def decode(run, codes, out) -> int:
    return main(["decode", "--run", str(run), "--codes", str(codes), "--out", str(out)])


def everything(path) -> torch.Tensor:
    directory = CodesDirectory(path)
    return torch.cat([directory.read(shard).codes for shard in range(directory.index.shards)])


@pytest.mark.parametrize("container", ["npy", "parquet"])
def test_codes_and_images_are_the_models_own(run, digits, tmp_path, capsys, container):
    options = ("--data", "digits", "--container", container, "--shard-images", 700)
    assert encode(run, tmp_path / "codes", *options) == 0
    assert "1797 images of 4x4 codes are in" in capsys.readouterr().out
    vqvae, _ = load_vqvae(run, CPU)
    codes = vqvae.encode(digits.float() / 127.5 - 1)
    found = everything(tmp_path / "codes")
    assert (found != codes).float().mean() < 1e-3  # chunks of another size round the encoder otherwise
    labels = torch.cat([CodesDirectory(tmp_path / "codes").read(shard).labels for shard in range(3)])
    assert torch.equal(labels, load_images("digits", held_out=0.0).train.labels)
    assert decode(run, tmp_path / "codes", tmp_path / "images.npy") == 0
    images = np.load(tmp_path / "images.npy")
    assert images.shape == (1797, 8, 8, 1)
    with torch.no_grad():
        expected = to_pixels(vqvae.decode(found, (8, 8)))[:, 0].numpy()
    assert np.abs(images[..., 0].astype(int) - expected).max() <= 1


def test_a_run_trained_with_cuda_graphs_is_encoded_on_the_cpu(run, digits, tmp_path):
    """How the steps of training were computed asks nothing of the machine that reads the run."""
    shutil.copytree(run, tmp_path / "run")
    export = read_export(run)
    config = dataclasses.replace(export.config, speed=SpeedConfig(compile=True, cuda_graphs=True))
    state = {"config": config.to_toml(), "stage": "vqvae", "step": 20, "prior": {}}
    state["vqvae"] = {name.removeprefix("vqvae."): x for name, x in export.tensors.items()}
    RunDirectory(tmp_path / "run", resume=True).export(state, export.images)
    for name, source in (("expected", run), ("found", tmp_path / "run")):
        assert encode(source, tmp_path / name, "--data", "digits", "--device", "cpu") == 0
    assert torch.equal(everything(tmp_path / "found"), everything(tmp_path / "expected"))


def test_decoding_to_a_folder_names_the_classes(run, tmp_path):
    np.savez(tmp_path / "d.npz", images=np.zeros((3, 8, 8), np.uint8), labels=np.array([1, 0, 1]))
    assert encode(run, tmp_path / "codes", "--data", tmp_path / "d.npz") == 0
    assert decode(run, tmp_path / "codes", tmp_path / "images") == 0
    written = sorted(str(x.relative_to(tmp_path / "images")) for x in (tmp_path / "images").rglob("*.png"))
    assert written == ["0/00000001.png", "1/00000000.png", "1/00000002.png"]


def test_it_goes_on_where_it_was(run, tmp_path):
    options = ("--data", "digits", "--shard-images", 500)
    assert encode(run, tmp_path / "codes", *options) == 0
    before = {x.name: x.stat().st_mtime_ns for x in (tmp_path / "codes").iterdir()}
    codes = everything(tmp_path / "codes")
    (tmp_path / "codes" / "codes-000002.npy").unlink()
    assert encode(run, tmp_path / "codes", *options) == 0
    changed = {x.name for x in (tmp_path / "codes").iterdir() if before.get(x.name) != x.stat().st_mtime_ns}
    assert changed == {"codes-000002.npy", "labels-000002.npy"}
    assert torch.equal(everything(tmp_path / "codes"), codes)


def test_processes_share_the_shards(run, tmp_path, monkeypatch, capsys):
    options = ("--data", "digits", "--shard-images", 300)
    assert encode(run, tmp_path / "alone", *options) == 0
    for rank in ("1", "0", "2"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "3")
        assert encode(run, tmp_path / "shared", *options) == 0
    assert "rank 2: 597 of 1797 images encoded" in capsys.readouterr().out
    assert torch.equal(everything(tmp_path / "alone"), everything(tmp_path / "shared"))


def test_the_split_that_was_asked_for(run, tmp_path):
    pixels = np.arange(4, dtype=np.uint8)[:, None, None] * np.full((4, 8, 8), 60, np.uint8)
    np.savez(tmp_path / "d.npz", x_train=pixels[:3], x_test=pixels[3:])
    numbers = {}
    for split in ("all", "train", "test"):
        assert encode(run, tmp_path / split, "--data", tmp_path / "d.npz", "--split", split) == 0
        numbers[split] = everything(tmp_path / split)
    assert torch.equal(numbers["all"], torch.cat([numbers["train"], numbers["test"]]))
    assert [len(numbers[split]) for split in ("all", "train", "test")] == [4, 3, 1]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--data", "nowhere"), "the data nowhere does not exist"),
        (("--data", "digits", "--split", "test"), "the data digits has no test split"),
        (("--data", "digits", "--shard-images", 0), "--shard-images must be at least 1, but is 0"),
    ],
)
def test_mistakes_are_one_sentence(run, tmp_path, capsys, options, sentence):
    assert encode(run, tmp_path / "codes", *options) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"vqkernels encode: {sentence}") and error.count("\n") == 1


def test_images_of_other_channels_are_refused(run, tmp_path, capsys):
    np.save(tmp_path / "rgb.npy", np.zeros((2, 8, 8, 3), np.uint8))
    assert encode(run, tmp_path / "codes", "--data", tmp_path / "rgb.npy") == 2
    assert "is rgb, not grey" in capsys.readouterr().err


def test_codes_of_another_model_are_not_decoded(run, tmp_path, capsys):
    other = make_run(tmp_path / "other", seed=3)
    assert encode(run, tmp_path / "codes", "--data", "digits") == 0
    assert decode(other, tmp_path / "codes", tmp_path / "x.npy") == 2
    assert "are of another model: that of the run 'run'" in capsys.readouterr().err
    assert not (tmp_path / "x.npy").exists()
    (tmp_path / "codes" / "codes-000000.npy").unlink()
    assert decode(run, tmp_path / "codes", tmp_path / "x.npy") == 2
    assert "1 of 1 shards are missing; finish it with 'vqkernels encode'" in capsys.readouterr().err
    assert decode(run, tmp_path / "codes", tmp_path / "none" / "x.npy") == 2
    assert "for --out does not exist" in capsys.readouterr().err


def test_an_unreadable_image_is_named_and_nothing_is_lost(run, tmp_path, capsys):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(6):
        Image.new("L", (8, 8), 40 * number).save(folder / f"{number}.png")
    whole = (folder / "4.png").read_bytes()
    (folder / "4.png").write_bytes(whole[:30])
    assert encode(run, tmp_path / "codes", "--data", folder, "--shard-images", 2) == 2
    assert "4.png cannot be read" in capsys.readouterr().err
    (folder / "4.png").write_bytes(whole)
    assert encode(run, tmp_path / "codes", "--data", folder, "--shard-images", 2) == 0
    assert len(everything(tmp_path / "codes")) == 6


def test_threads_that_read_ahead_keep_the_order(run, digits, tmp_path, monkeypatch):
    """Every later piece is read sooner than the one before it."""
    from vqkernels.training import shard_encoding
    from vqkernels.training.images import ArraySource

    assert encode(run, tmp_path / "codes", "--data", "digits", "--shard-images", 100) == 0
    read, begun = ArraySource.read, []

    def late(self, start, stop):
        begun.append(start)
        time.sleep(0.03 * (3 - (start // 100) % 4))
        return read(self, start, stop)

    monkeypatch.setattr(shard_encoding, "READERS", 4)
    monkeypatch.setattr(ArraySource, "read", late)
    assert encode(run, tmp_path / "late", "--data", "digits", "--shard-images", 100) == 0
    assert len(begun) == 18
    assert torch.equal(everything(tmp_path / "codes"), everything(tmp_path / "late"))


def test_a_shard_that_cannot_be_written_ends_the_run(run, tmp_path, capsys, monkeypatch):
    """It is written by a thread of its own; what was whole before it stays, and the run can be continued."""
    write = CodesDirectory.write

    def full(self, shard, *rest):
        if shard == 2:
            raise UserError("the disk is full")
        write(self, shard, *rest)

    options = ("--data", "digits", "--shard-images", 300)
    monkeypatch.setattr(CodesDirectory, "write", full)
    assert encode(run, tmp_path / "codes", *options) == 2
    assert "the disk is full" in capsys.readouterr().err
    assert CodesDirectory(tmp_path / "codes").missing() == [2, 3, 4, 5]
    monkeypatch.undo()
    assert encode(run, tmp_path / "codes", *options) == 0
    assert CodesDirectory(tmp_path / "codes").missing() == []


@pytest.mark.slow
def test_a_killed_process_loses_and_doubles_nothing(run, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (60_000, 8, 8), dtype=np.uint8)
    np.save(tmp_path / "images.npy", images)
    options = ["--run", str(run), "--data", str(tmp_path / "images.npy"), "--shard-images", "1024"]
    command = [sys.executable, "-m", "vqkernels", "encode", *options, "--out"]
    subprocess.run([*command, str(tmp_path / "whole")], check=True, capture_output=True)
    kills = 0
    for wait in (3, 8, 14, 23):  # shards
        process = subprocess.Popen(
            [*command, str(tmp_path / "killed")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while process.poll() is None and len(list((tmp_path / "killed").glob("codes-*"))) < wait:
            time.sleep(0.001)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.wait()
    assert kills >= 2
    subprocess.run([*command, str(tmp_path / "killed")], check=True, capture_output=True)
    assert torch.equal(everything(tmp_path / "whole"), everything(tmp_path / "killed"))


@pytest.mark.slow
def test_memory_does_not_grow_with_the_images(run, tmp_path):
    """The high-water mark of 200,000 images is that of 2,000, but for what shards and the file's pages add."""
    code = (
        "import resource, sys; from vqkernels.cli.main import main; status = main(sys.argv[1:]);"
        "print(status, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    peaks = []
    for count in (2_000, 200_000):
        np.save(tmp_path / f"{count}.npy", np.zeros((count, 8, 8), np.uint8))
        arguments = [
            "encode",
            "--run",
            str(run),
            "--data",
            str(tmp_path / f"{count}.npy"),
            "--out",
            str(tmp_path / str(count)),
        ]
        done = subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True, text=True)
        status, peak = done.stdout.splitlines()[-1].split()
        assert status == "0"
        peaks.append(int(peak))
    mapped = 200_000 * 64 // 1024  # kB of the file, whose pages count while they are mapped
    assert peaks[1] - peaks[0] < 20_000 + mapped
