"""`--prior pixelcnn|transformer`: training, resuming and sampling with both, and runs from before the choice."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from sklearn.datasets import load_digits

from vqkernels.cli.main import main
from vqkernels.models import PixelCNN, TransformerPrior
from vqkernels.training.checkpoint import read_export
from vqkernels.training.config import RunConfig
from vqkernels.training.loop import train
from vqkernels.training.model_building import load_models

TINY = [
    *("--data", "digits", "--vqvae.hidden-channels", "8", "--vqvae.code-dim", "4", "--vqvae.codebook-size", "8"),
    *("--vqvae.downsamplings", "1", "--vqvae.residual-blocks", "1", "--vqvae.steps", "4"),
    *("--prior.hidden-channels", "8", "--prior.num-layers", "2", "--prior.head-channels", "8", "--prior.steps", "4"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A tiny run with a transformer."""
    path = tmp_path_factory.mktemp("prior") / "run"
    options = ["--prior", "transformer", "--prior.label-dropout", "0.2", "--prior.num-heads", "2"]
    assert main(["train", *TINY, *options, "--out", str(path)]) == 0
    return path


def arrays(run: Path, out: Path, *options: object) -> dict[str, np.ndarray]:
    assert main(["sample", "--run", str(run), "--out", str(out), *map(str, options)]) == 0
    return dict(np.load(out))


def fails(capsys, *arguments: object) -> str:
    """The one line that a failing command prints."""
    assert main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1, captured.err
    return captured.err


def test_the_checkpoint_says_which_prior_it_holds(run):
    export = read_export(run)
    assert export.config.prior.model == "transformer" and 'model = "transformer"' in (run / "config.toml").read_text()
    _, prior, _ = load_models(run, torch.device("cpu"))
    assert isinstance(prior, TransformerPrior) and not prior.training and prior.num_heads == 2
    assert torch.equal(prior.head.weight, export.tensors["prior.head.weight"])
    assert (len(prior.row_embedding), len(prior.column_embedding)) == (4, 4)  # 8x8 images, halved once
    assert len(list((run / "pictures").glob("samples_*.png"))) == 1


def test_samples_of_a_transformer_repeat_and_follow_their_options(run, tmp_path):
    first = arrays(run, tmp_path / "a.npz", "--labels", 3, 7, "--count", 4)
    assert first["images"].shape == (8, 8, 8, 1) and first["codes"].shape == (8, 4, 4)
    assert first["labels"].tolist() == [3] * 4 + [7] * 4
    again = arrays(run, tmp_path / "b.npz", "--labels", 3, 7, "--count", 4)
    assert np.array_equal(first["codes"], again["codes"])
    for option in (("--seed", 1), ("--top-k", 1), ("--guidance", 500)):
        other = arrays(run, tmp_path / "c.npz", "--labels", 3, 7, "--count", 4, *option)
        assert not np.array_equal(first["codes"], other["codes"]), option


def test_a_transformer_completes_an_image(run, tmp_path):
    digit = (load_digits().images[5] * 255 / 16).astype(np.uint8)
    Image.fromarray(digit).save(tmp_path / "digit.png")
    vqvae, _, _ = load_models(run, torch.device("cpu"))
    kept = vqvae.encode(torch.from_numpy(digit)[None, None].float() / 127.5 - 1)[0].numpy()
    codes = arrays(run, tmp_path / "a.npz", "--complete", tmp_path / "digit.png", "--labels", 5, "--count", 6)["codes"]
    assert (codes[:, :2] == kept[:2]).all() and not (codes[:, 2:] == kept[2:]).all()


def test_a_resumed_run_keeps_its_prior(run, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(run, out)
    assert main(["train", "--out", str(out), "--resume", "--prior.steps", "5"]) == 0
    assert (read_export(out).step, read_export(out).config.prior.model) == (5, "transformer")
    capsys.readouterr()
    sentence = "was begun with another prior.model (transformer, now pixelcnn); a resumed run cannot change it"
    assert sentence in fails(capsys, "train", "--out", out, "--resume", "--prior", "pixelcnn")


def test_a_finished_vqvae_may_get_either_prior(tmp_path):
    out = tmp_path / "run"
    assert main(["train", *TINY, "--stage", "vqvae", "--out", str(out)]) == 0
    assert main(["train", "--out", str(out), "--resume", "--prior", "transformer"]) == 0
    assert isinstance(load_models(out, torch.device("cpu"))[1], TransformerPrior)


def test_an_interrupted_transformer_ends_in_the_same_bits(run, tmp_path):
    """Dropout and dropped labels included."""
    config = read_export(run).config
    config = dataclasses.replace(config, prior=dataclasses.replace(config.prior, steps=6, dropout=0.3))
    train(config, tmp_path / "straight")
    asked: list[int] = []
    interrupted = train(config, tmp_path / "cut", should_stop=lambda: asked.append(1) or len(asked) == 7)
    assert not interrupted.finished and read_export(tmp_path / "cut").stage == "prior"
    train(config, tmp_path / "cut", resume=True)
    expected, found = read_export(tmp_path / "straight").tensors, read_export(tmp_path / "cut").tensors
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_run_from_before_the_choice_has_a_pixelcnn(tmp_path):
    """The keys that an old run lacks are taken out of all three places."""
    out = tmp_path / "run"
    assert main(["train", *TINY, "--out", str(out)]) == 0

    def without_the_choice(text: str) -> str:
        lines = [line for line in text.splitlines() if not line.startswith(("model =", "num_heads ="))]
        assert len(lines) == len(text.splitlines()) - 2
        return "\n".join(lines) + "\n"

    (out / "config.toml").write_text(without_the_choice((out / "config.toml").read_text()))
    with safe_open(out / "model.safetensors", framework="pt") as opened:
        header, tensors = opened.metadata(), {name: opened.get_tensor(name) for name in opened.keys()}
    save_file(tensors, out / "model.safetensors", {**header, "config": without_the_choice(header["config"])})
    state = torch.load(out / "state.pt", weights_only=True)
    torch.save({**state, "config": without_the_choice(state["config"])}, out / "state.pt")

    assert isinstance(load_models(out, torch.device("cpu"))[1], PixelCNN)
    assert arrays(out, tmp_path / "a.npz", "--count", 2)["codes"].shape == (20, 4, 4)
    assert main(["train", "--out", str(out), "--resume", "--prior.steps", "5"]) == 0
    assert (read_export(out).step, read_export(out).config.prior.model) == (5, "pixelcnn")


def test_mistakes_are_one_sentence(tmp_path, capsys):
    options = ["--prior", "transformer", "--prior.num-heads", "3"]
    sentence = "prior.hidden_channels must be a multiple of prior.num_heads, 3, but is 8"
    assert sentence in fails(capsys, "train", *TINY, *options, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()
    config = tmp_path / "old.toml"
    config.write_text(RunConfig(data="digits").to_toml().replace('"pixelcnn"', '"pixelrnn"'))
    sentence = "prior.model must be one of 'pixelcnn', 'transformer', but is 'pixelrnn'"
    assert sentence in fails(capsys, "train", "--config", config, "--out", tmp_path / "run")
    assert main(["train", *TINY, "--prior.num-heads", "3", "--prior.steps", "1", "--out", str(tmp_path / "run")]) == 0
