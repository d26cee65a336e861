"""train: resuming to the same bits, what a run leaves behind, and the mistakes it refuses."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vqkernels.training import stages
from vqkernels.training.checkpoint import read_export
from vqkernels.training.config import PriorConfig, RunConfig, VQVAEConfig
from vqkernels.training.errors import UserError
from vqkernels.training.loop import train
from vqkernels.training.model_building import load_models


def tiny(data: str = "digits", **vqvae) -> RunConfig:
    return RunConfig(
        data=data,
        log_every=1,
        checkpoint_every=3,
        picture_every=100,
        vqvae=VQVAEConfig(
            **{
                "hidden_channels": 8,
                "code_dim": 4,
                "codebook_size": 8,
                "downsamplings": 1,
                "residual_blocks": 1,
                "steps": 8,
                "batch_size": 256,
                "ema_decay": 0.9,
                "learning_rate": 1e-3,
                "schedule": "cosine",
                **vqvae,
            }
        ),
        prior=PriorConfig(hidden_channels=8, num_layers=2, head_channels=8, dropout=0.2, steps=8, batch_size=256),
    )


def stop_after(steps: int):
    """A `should_stop` that says yes after so many steps."""
    done = []
    return lambda: done.append(None) or len(done) == steps


def weights(path: Path) -> dict[str, torch.Tensor]:
    return read_export(path).tensors


def lines(path: Path) -> list[tuple[str, int, float]]:
    read = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [(line["stage"], line["step"], line["loss"]) for line in read if "loss" in line]


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Path:
    """A run of both stages without interruption."""
    path = tmp_path_factory.mktemp("straight") / "run"
    assert train(tiny(), path).finished
    return path


@pytest.mark.parametrize("interruptions", [(4,), (8,), (12,), (1, 2, 3, 5)])
def test_an_interrupted_run_ends_in_the_same_bits(straight, tmp_path, interruptions):
    """Eight steps of each stage (an epoch has six), stopped within and between the stages."""
    path = tmp_path / "run"
    for number, steps in enumerate(interruptions):
        assert not train(tiny(), path, resume=number > 0, should_stop=stop_after(steps)).finished
    assert train(tiny(), path, resume=True).finished
    expected, found = weights(straight), weights(path)
    assert expected.keys() == found.keys() and any(name.startswith("prior.") for name in found)
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    assert lines(path) == lines(straight)


@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_steps_in_two_runs_are_the_steps_of_one(tmp_path, ema_decay):
    """N steps, then resumed with 2N: with a constant learning rate the same bits as 2N steps straight."""
    config = dataclasses.replace(tiny(ema_decay=ema_decay, schedule="constant"), seed=5)
    half = dataclasses.replace(config, vqvae=dataclasses.replace(config.vqvae, steps=4))
    train(config, tmp_path / "straight", stage="vqvae")
    train(half, tmp_path / "halves", stage="vqvae")
    train(config, tmp_path / "halves", stage="vqvae", resume=True)
    expected, found = weights(tmp_path / "straight"), weights(tmp_path / "halves")
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_codes_from_data_revival_and_a_likelihood_survive_an_interruption(tmp_path):
    config = tiny(init="kmeans", revive="rows", likelihood="gaussian")
    train(config, tmp_path / "straight", stage="vqvae")
    assert not train(config, tmp_path / "halves", stage="vqvae", should_stop=stop_after(4)).finished
    trained = train(config, tmp_path / "halves", stage="vqvae", resume=True)
    expected, found = weights(tmp_path / "straight"), weights(tmp_path / "halves")
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    assert bool(found["vqvae.quantizer.initialised"])
    assert trained.vqvae.bits_per_dim(trained.data.held_out.batch(slice(8))).isfinite().all()


def test_with_a_likelihood_both_stages_tell_bits_per_dim(tmp_path):
    """With the uniform prior log2 K bits a code; with the trained one what it gives, in the same units."""
    trained = train(tiny(likelihood="gaussian"), tmp_path)
    read = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    told = {line["stage"]: line for line in read if "held_out_bits_per_dim" in line}
    held_out = trained.data.held_out
    uniform = trained.vqvae.bits_per_dim(held_out.batch(slice(None))).mean()
    assert told["vqvae"]["held_out_bits_per_dim"] == pytest.approx(float(uniform), rel=1e-4)
    bits_per_code = told["prior"]["held_out_bits_per_code"]
    expected = float(uniform) + (bits_per_code - 3) * 16 / 64  # 8 codes; 4x4 of them for 8x8 pixels
    assert told["prior"]["held_out_bits_per_dim"] == pytest.approx(expected, rel=1e-4)


def test_stages_one_by_one_are_all_of_them(straight, tmp_path):
    train(tiny(), tmp_path, stage="vqvae")
    assert read_export(tmp_path).stage == "vqvae"
    with pytest.raises(UserError, match="has no prior yet"):
        load_models(tmp_path, torch.device("cpu"))
    train(tiny(), tmp_path, stage="prior", resume=True)
    assert all(torch.equal(value, weights(straight)[name]) for name, value in weights(tmp_path).items())


def test_lines_after_the_checkpoint_are_cut_off(tmp_path):
    """A run that dies between checkpoints has logged steps that it will do again."""

    def die():
        if len(lines(tmp_path)) == 5:
            raise KeyboardInterrupt
        return False

    with pytest.raises(KeyboardInterrupt):
        train(tiny(), tmp_path, stage="vqvae", should_stop=die)
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b'{"stage": "vqvae", "st')  # as a kill leaves it
    assert read_export(tmp_path).step == 3
    train(tiny(), tmp_path, stage="vqvae", resume=True)
    assert [step for _, step, _ in lines(tmp_path)] == list(range(1, 9))


def test_a_run_that_died_before_its_first_checkpoint_starts_again(straight, tmp_path):
    def die():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tiny(), tmp_path, should_stop=die)
    assert (tmp_path / "config.toml").exists() and not (tmp_path / "state.pt").exists()
    train(tiny(), tmp_path, resume=True)
    assert lines(tmp_path) == lines(straight)


def test_what_a_run_leaves_behind(straight):
    names = {path.name for path in straight.iterdir()}
    assert names == {".lock", "config.toml", "state.pt", "model.safetensors", "metrics.jsonl", "events", "pictures"}
    assert RunConfig.from_toml((straight / "config.toml").read_text(), "config.toml") == tiny()
    for name in ("reconstructions_000008.png", "samples_000008.png"):
        with Image.open(straight / "pictures" / name) as image:
            assert image.width > 300 and image.height > 300 and len(image.getcolors()) > 5
    assert all(list((straight / "events" / stage).glob("events.*")) for stage in ("vqvae", "prior"))
    last = [json.loads(line) for line in (straight / "metrics.jsonl").read_text().splitlines()][-1]
    assert last["stage"] == "prior" and last["step"] == 8 and 0 < last["held_out_nats_per_code"] < 2 * math.log(8)
    assert torch.load(straight / "state.pt", weights_only=True)["step"] == 8


def test_loaded_models_are_the_trained_ones(straight, tmp_path):
    trained = train(tiny(), tmp_path)
    vqvae, prior, export = load_models(straight, torch.device("cpu"))
    x = trained.data.held_out.batch(slice(4))
    assert torch.equal(vqvae(x)[0], trained.vqvae(x)[0])
    codes = vqvae.encode(x)
    assert torch.equal(prior(codes, torch.arange(4)), trained.prior(codes, torch.arange(4)))
    assert export.images.class_names == tuple("0123456789")


def test_unlabelled_images_of_odd_size_with_nothing_held_out(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (20, 7, 9, 3), dtype=np.uint8)
    np.save(tmp_path / "x.npy", images)
    config = dataclasses.replace(tiny(str(tmp_path / "x.npy"), steps=2), held_out=0.0)
    trained = train(config, tmp_path / "run")
    assert trained.prior.num_classes is None
    assert trained.vqvae(trained.data.train.batch(slice(2)))[0].shape == (2, 3, 7, 9)


def test_the_loss_falls(tmp_path):
    config = dataclasses.replace(tiny(steps=60, learning_rate=3e-3), checkpoint_every=60)
    train(config, tmp_path, stage="vqvae")
    losses = [loss for _, _, loss in lines(tmp_path)]
    assert np.mean(losses[-5:]) < 0.6 * np.mean(losses[:5])


def test_a_diverging_run_keeps_its_last_checkpoint(tmp_path):
    with pytest.raises(UserError, match=r"the loss of the vqvae is .* at step .* lower learning rate"):
        train(tiny(steps=60, learning_rate=1e30, schedule="constant", ema_decay=None), tmp_path)
    state = tmp_path / "state.pt"
    assert not state.exists() or all(value.isfinite().all() for value in weights(tmp_path).values())


@pytest.mark.parametrize(
    "change,sentence",
    [
        ({"seed": 1}, r"begun with another seed \(0, now 1\);"),
        ({"vqvae": {"code_dim": 5}}, r"begun with another vqvae\.code_dim \(4, now 5\);"),
        ({"prior": {"dropout": 0.5}}, r"begun with another prior\.dropout \(0\.2, now 0\.5\);"),
        ({"vqvae": {"steps": 100}}, r"begun with another vqvae\.steps \(8, now 100\);"),
    ],
)
def test_what_a_resumed_run_cannot_change(straight, change, sentence):
    before = (straight / "config.toml").read_bytes()
    config = tiny()
    for name, value in change.items():
        new = dataclasses.replace(getattr(config, name), **value) if isinstance(value, dict) else value
        config = dataclasses.replace(config, **{name: new})
    with pytest.raises(UserError, match=sentence):
        train(config, straight, resume=True)
    assert (straight / "config.toml").read_bytes() == before


def test_stages_out_of_order_are_refused(straight, tmp_path):
    with pytest.raises(UserError, match=r"the VQ-VAE of .* is frozen"):
        train(tiny(), straight, stage="vqvae", resume=True)
    with pytest.raises(UserError, match="trained on a finished VQ-VAE"):
        train(tiny(), tmp_path / "run", stage="prior")
    train(tiny(), tmp_path / "run", stage="vqvae", should_stop=stop_after(3))
    with pytest.raises(UserError, match="has done 3 of its 8 steps"):
        train(tiny(), tmp_path / "run", stage="prior", resume=True)


def test_other_images_are_refused(tmp_path):
    for name in ("a", "b"):
        np.save(tmp_path / f"{name}.npy", np.full((9, 8, 8), ord(name), dtype=np.uint8))
    train(tiny(str(tmp_path / "a.npy"), steps=1), tmp_path / "run", stage="vqvae")
    with pytest.raises(UserError, match=r"the images of .*b\.npy are not those"):
        train(tiny(str(tmp_path / "b.npy"), steps=1), tmp_path / "run", stage="vqvae", resume=True)


def test_sorted_held_out_images_are_evaluated_in_all_their_classes(tmp_path, monkeypatch):
    """The held-out images of a folder come class by class; an evaluation that looks at a few sees every class."""
    monkeypatch.setattr(stages, "EVALUATED", 10)
    labels = np.arange(100) // 10
    images = np.repeat(labels * 25, 64).reshape(100, 8, 8).astype(np.uint8)
    np.savez(tmp_path / "x.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    trained = train(tiny(str(tmp_path / "x.npz"), steps=1), tmp_path / "run", stage="vqvae")
    stage = stages.VQVAEStage(trained.vqvae, tiny().vqvae, trained.data, torch.device("cpu"))
    assert stage.held_out.labels.tolist() == list(range(10))
    assert stage.evaluate().keys() == {"held_out_reconstruction", "held_out_perplexity"}


def test_bad_data_leaves_no_directory(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        train(tiny("nowhere"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="the device nonsense is not available"):
        train(dataclasses.replace(tiny(), device="nonsense"), tmp_path / "run")
    with pytest.raises(UserError, match="backend must be one of"):
        train(dataclasses.replace(tiny(), backend="nonsense"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
