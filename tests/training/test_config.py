"""RunConfig: TOML there and back, and errors that name the key."""

import dataclasses

import pytest

from vqkernels.training.config import PriorConfig, RunConfig, VQVAEConfig, read_config
from vqkernels.training.errors import UserError


def test_toml_there_and_back():
    config = RunConfig(
        data="digits", seed=3, vqvae=VQVAEConfig(ema_decay=0.99, residual_channels=7), prior=PriorConfig(steps=5)
    )
    assert RunConfig.from_toml(config.to_toml(), "text") == config
    assert RunConfig.from_toml(RunConfig(data="x").to_toml(), "text").vqvae.ema_decay is None


def test_absent_keys_have_their_defaults():
    read = RunConfig.from_toml('data = "digits"\n[vqvae]\ncode_dim = 8\nbeta = 1', "text")
    assert read == RunConfig(data="digits", vqvae=VQVAEConfig(code_dim=8, beta=1))


@pytest.mark.parametrize(
    "text,sentence",
    [
        ("data = ", "text is not valid TOML"),
        ("seed = 1", "text names no data"),
        ('data = "d"\nsteps = 5', "unknown key steps"),
        ('data = "d"\n[prior]\nbeta = 5', "unknown key prior.beta"),
        ('data = "d"\n[vqvae]\nsteps = "many"', "vqvae.steps must be a whole number, but is 'many'"),
        ('data = "d"\n[vqvae]\nsteps = true', "vqvae.steps must be a whole number, but is True"),
        ('data = "d"\n[vqvae]\nema_decay = "x"', "vqvae.ema_decay must be a number, but is 'x'"),
        ('data = "d"\ncolor = "blue"', "color must be one of 'auto', 'grey', 'rgb', 'rgba', but is 'blue'"),
        ('data = "d"\nprior = 3', "prior must be a table, but is 3"),
        ('data = "d"\nformat = "vqkernels-run-9"', "another version"),
    ],
)
def test_mistakes_in_toml_are_named(text, sentence):
    with pytest.raises(UserError, match=sentence):
        RunConfig.from_toml(text, "text")


def test_an_unreadable_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none\.toml cannot be read"):
        read_config(tmp_path / "none.toml")


@pytest.mark.parametrize(
    "stage,change,sentence",
    [
        (None, {"held_out": 1.0}, "held_out must be"),
        (None, {"log_every": 0}, "log_every must be at least 1"),
        ("vqvae", {"steps": 0}, "vqvae.steps must be at least 1, but is 0"),
        ("vqvae", {"ema_decay": 1.5}, "vqvae.ema_decay must be at least 0 and less than 1, but is 1.5"),
        ("vqvae", {"learning_rate": float("nan")}, "vqvae.learning_rate must be positive"),
        ("vqvae", {"downsamplings": 0}, "vqvae.downsamplings must be at least 1"),
        ("prior", {"dropout": 1.0}, "prior.dropout must be"),
    ],
)
def test_values_out_of_range_are_named(stage, change, sentence):
    config = RunConfig(data="digits")
    if stage is not None:
        change = {stage: dataclasses.replace(getattr(config, stage), **change)}
    with pytest.raises(UserError, match=sentence):
        dataclasses.replace(config, **change).check()


def test_differences_are_named_by_path():
    config = RunConfig(data="digits")
    other = dataclasses.replace(config, seed=1, prior=PriorConfig(dropout=0.5))
    assert config.differences(other) == ["seed", "prior.dropout"]
