"""`vqkernels compare`: the command, its files and its mistakes."""

from pathlib import Path

import numpy as np
import pytest
from training.comparison.conftest import synthetic
from training.report.test_report import check_self_contained

from vqkernels.cli.compare import CompareArguments, _command, chosen
from vqkernels.cli.main import main

QUICK = ["--steps", "4", "--prior-steps", "3", "--collapse-steps", "2", "--evaluated", "12", "--codebook-size", "16"]


@pytest.fixture
def source(tmp_path):
    images = synthetic(48)
    np.savez(tmp_path / "bars.npz", images=images.pixels.numpy(), labels=images.labels.numpy())
    return tmp_path / "bars.npz"


def test_the_command_writes_both_reports(source, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["compare", "--data", str(source), "--out", str(out), "--held-out", "0.25", *QUICK]) == 0
    output = capsys.readouterr()
    assert "bits per dimension" in output.out and str(out / "report.html") in output.out
    assert "training VQ-VAE (EMA), then its prior" in output.err
    text = (out / "report.html").read_text()
    check_self_contained(text)
    assert str(tmp_path) not in text and "vqkernels compare --data bars.npz --out out --held-out 0.25" in text
    markdown = (out / "report.md").read_text()
    assert str(tmp_path) not in markdown and "36 training images of bars.npz" in markdown
    assert str(tmp_path) not in (out / "results.json").read_text()
    assert (out / "curves.png").exists() and (out / "reconstructions.png").exists()


def test_mistakes_are_one_sentence(source, tmp_path, capsys):
    out = str(tmp_path / "out")
    assert main(["compare", "--data", str(tmp_path / "absent"), "--out", out]) == 2
    assert main(["compare", "--data", str(source), "--out", str(source)]) == 2
    assert main(["compare", "--data", str(source), "--out", out, "--steps", "-1"]) == 2
    assert main(["compare", "--data", str(source), "--out", out, "--train-images", "0"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 4 and all(line.startswith("vqkernels compare: ") for line in lines)
    assert "steps must be at least 1, but is -1" in lines[2]
    assert "train_images must be at least 1, but is 0" in lines[3]


@pytest.mark.parametrize(
    ("out", "said"), [(["--out", "/home/me/out/"], "--out out"), (["--out=/home/me/out"], "--out=out")]
)
def test_the_command_in_the_report_has_no_folder_of_this_machine(out, said):
    parsed = CompareArguments("/home/me/bars.npz", Path("/home/me/out"))
    written = _command(["--data=/home/me/bars.npz", *out, "--seed", "1"], parsed)
    assert written == f"vqkernels compare --data=bars.npz {said} --seed 1"


def test_options_replace_what_suits_the_images(tmp_path):
    settings = chosen(
        CompareArguments("x", tmp_path, steps=7, prior_steps=5, collapse_steps=3, train_images=9, seed=2), (1, 28, 28)
    )
    assert (settings.run.vqvae.steps, settings.run.prior.steps, settings.collapse.steps) == (7, 5, 3)
    assert settings.train_images == 9 and settings.run.seed == 2
    plain = chosen(CompareArguments("x", tmp_path), (1, 28, 28))
    assert plain.run.vqvae.steps > 7 and plain.train_images is None
