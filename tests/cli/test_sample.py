"""`vqkernels sample`: labels, repeatability, and the sentence for each mistake."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from vqkernels.cli.main import main
from vqkernels.training.config import PriorConfig, RunConfig, VQVAEConfig
from vqkernels.training.data import load_images
from vqkernels.training.loop import train
from vqkernels.training.model_building import load_models


def config(data: str) -> RunConfig:
    return RunConfig(
        data=data,
        held_out=0.0,
        vqvae=VQVAEConfig(hidden_channels=8, code_dim=4, codebook_size=8, downsamplings=1, steps=20),
        prior=PriorConfig(hidden_channels=8, num_layers=2, head_channels=8, steps=2),
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("sample") / "run"
    train(config("digits"), path)
    return path


def sample(run: Path, out: Path, *options: object) -> np.ndarray:
    assert main(["sample", "--run", str(run), "--out", str(out), *map(str, options)]) == 0
    with Image.open(out) as image:
        return np.asarray(image)


def test_one_row_per_label_repeatable_by_seed(run, tmp_path, capsys):
    first = sample(run, tmp_path / "a.png", "--labels", 3, 7, "--count", 4)
    assert "8 images are in" in capsys.readouterr().out
    assert first.shape == (2 * 50 + 2, 4 * 50 + 2)  # 8x8 images enlarged to 48, gaps of 2
    assert np.array_equal(first, sample(run, tmp_path / "b.png", "--labels", 3, 7, "--count", 4))
    assert not np.array_equal(first, sample(run, tmp_path / "c.png", "--labels", 3, 7, "--count", 4, "--seed", 1))


def test_all_classes_by_default(run, tmp_path):
    assert sample(run, tmp_path / "a.png", "--count", 2).shape == (10 * 50 + 2, 2 * 50 + 2)


def test_truncation_changes_the_samples(run, tmp_path):
    free = sample(run, tmp_path / "a.png", "--labels", 0, "--temperature", 2.0)
    certain = sample(run, tmp_path / "b.png", "--labels", 0, "--top-k", 1)
    tiles = [certain[2:50, 2 + 50 * column : 50 + 50 * column] for column in range(8)]
    assert all(np.array_equal(tile, tiles[0]) for tile in tiles)
    assert not np.array_equal(free, certain)


def test_arrays_hold_images_codes_and_labels(run, tmp_path):
    out = tmp_path / "a.npz"
    arguments = ["sample", "--run", str(run), "--out", str(out), "--labels", "3", "7", "--count", "2"]
    assert main(arguments) == 0
    arrays = np.load(out)
    assert arrays["images"].shape == (4, 8, 8, 1) and arrays["images"].dtype == np.uint8
    assert arrays["codes"].shape == (4, 4, 4) and arrays["labels"].tolist() == [3, 3, 7, 7]
    assert len(load_images(str(out), held_out=0.0).train) == 4  # data that training reads


def test_completing_an_image_keeps_its_upper_codes(run, tmp_path):
    digit = (load_digits().images[5] * 255 / 16).astype(np.uint8)
    Image.fromarray(digit).save(tmp_path / "digit.png")
    out = tmp_path / "a.npz"
    arguments = ["sample", "--run", str(run), "--out", str(out), "--complete", str(tmp_path / "digit.png")]
    arguments += ["--labels", "5", "--count", "6", "--temperature", "5"]
    vqvae, _, _ = load_models(run, torch.device("cpu"))
    kept = vqvae.encode(torch.from_numpy(digit)[None, None].float() / 127.5 - 1)[0].numpy()
    for rows, whole in ((0.5, 2), (0.0, 0), (1.0, 4), (0.6, 3)):
        assert main([*arguments, "--rows", str(rows)]) == 0
        codes = np.load(out)["codes"]
        assert (codes[:, :whole] == kept[:whole]).all()
        assert whole == 4 or not (codes[:, whole:] == kept[whole:]).all()
    grid = sample(run, tmp_path / "a.png", "--complete", tmp_path / "digit.png", "--labels", 5, 6, "--count", 3)
    assert grid.shape == (2 * 50 + 2, 4 * 50 + 2)
    first = np.repeat(np.repeat(digit, 6, 0), 6, 1)
    assert np.array_equal(grid[2:50, 2:50], first) and np.array_equal(grid[52:100, 2:50], first)


def test_an_image_of_another_size_is_refused(run, tmp_path, capsys):
    Image.fromarray(np.zeros((9, 8), dtype=np.uint8)).save(tmp_path / "x.png")
    arguments = ["sample", "--run", str(run), "--out", str(tmp_path / "a.png"), "--complete", str(tmp_path / "x.png")]
    assert main(arguments) == 2
    assert "--complete must be 8x8 like the images of the run" in capsys.readouterr().err


def test_guidance_reaches_the_samples(tmp_path):
    guided = dataclasses.replace(config("digits"), prior=PriorConfig(
        hidden_channels=8, num_layers=2, head_channels=8, steps=2, label_dropout=0.2))  # fmt: skip
    train(guided, tmp_path / "run")
    out = tmp_path / "a.png"
    plain = sample(tmp_path / "run", out)
    assert not np.array_equal(plain, sample(tmp_path / "run", out, "--guidance", 30))
    assert np.array_equal(plain, sample(tmp_path / "run", out, "--guidance", 1))


@pytest.mark.parametrize(
    "options,sentence",
    [
        (["--labels", "cat"], "there is no class 'cat'; the classes are: 0, 1, 2"),
        (["--count", "0"], "--count must be at least 1, but is 0"),
        (["--temperature", "0"], "--temperature must be positive, but is 0.0"),
        (["--top-k", "0"], "--top-k must be at least 1"),
        (["--top-p", "1.5"], "--top-p must be in (0, 1]"),
        (["--out", "picture.jpg"], "--out must be a .png file"),
        (["--out", "nowhere/x.png"], "the folder nowhere for --out does not exist"),
        (["--run", "nowhere"], "nowhere does not exist"),
        (["--guidance", "2"], "--guidance needs a prior trained with classes and prior.label_dropout above 0"),
        (["--rows", "1.5"], "--rows must be in [0, 1], but is 1.5"),
        (["--complete", "nowhere.png"], "the image nowhere.png for --complete does not exist"),
    ],
)
def test_mistakes_are_one_sentence(run, tmp_path, capsys, options, sentence):
    arguments = {"--run": str(run), "--out": str(tmp_path / "x.png"), **dict([options])}
    assert main(["sample", *(part for pair in arguments.items() for part in pair)]) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1 and not (tmp_path / "x.png").exists()


def test_a_prior_without_classes(tmp_path, capsys):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), dtype=np.uint8))
    train(config(str(tmp_path / "x.npy")), tmp_path / "run")
    assert sample(tmp_path / "run", tmp_path / "a.png", "--count", 3).shape == (52, 152, 3)
    arguments = ["sample", "--run", str(tmp_path / "run"), "--out", str(tmp_path / "b.png"), "--labels", "0"]
    assert main(arguments) == 2
    assert "trained without classes; leave --labels out" in capsys.readouterr().err
