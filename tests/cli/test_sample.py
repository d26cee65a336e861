"""`vqkernels sample`: labels, repeatability, and the sentence for each mistake."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vqkernels.cli.main import main
from vqkernels.training.config import PriorConfig, RunConfig, VQVAEConfig
from vqkernels.training.loop import train


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
