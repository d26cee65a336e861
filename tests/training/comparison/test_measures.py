"""Figures of a contender, each computed a second way from the trained models in the run directories."""

import dataclasses
import math

import pytest
import torch

from vqkernels.models import VAE
from vqkernels.training.checkpoint import ImageFormat, RunDirectory
from vqkernels.training.comparison.contenders import CONTINUOUS, EMA, GRADIENT
from vqkernels.training.comparison.measures import features, measure_vae
from vqkernels.training.comparison.run import SHOWN
from vqkernels.training.config import read_config
from vqkernels.training.model_building import build_vae, load_models

CPU = torch.device("cpu")
FOLDERS = {GRADIENT: "vq_vae_gradient", EMA: "vq_vae_ema", CONTINUOUS: "vae"}


def figures(compared, name):
    return next(x for x in compared[1].figures if x.name == name)


def evaluated(data):
    """The held-out images that are measured: 30 of 40, evenly spread."""
    chosen = torch.arange(30) * 40 // 30
    return data.held_out.batch(chosen), data.held_out.labels[chosen]


def trained_vae(out) -> VAE:
    folder = out / "runs" / FOLDERS[CONTINUOUS]
    vae = build_vae(read_config(folder / "config.toml"), ImageFormat(1, 8, 8, ()), CPU)
    state = RunDirectory(folder, resume=True).load_state()
    assert state is not None
    vae.load_state_dict(state["vae"])
    return vae.eval()


@pytest.mark.parametrize("name", [GRADIENT, EMA])
@torch.no_grad()
def test_the_vqvaes_likelihoods(compared, data, name):
    vqvae, prior, _ = load_models(compared[0] / "runs" / FOLDERS[name], CPU)
    (x, _), found = evaluated(data), figures(compared, name).likelihoods
    codes = vqvae.encode(x)
    given = -vqvae.likelihood.log_prob(vqvae.decoder(vqvae.quantizer.decode(codes)), x).double().mean() / math.log(2)
    assert found.given_latents == pytest.approx(float(given) / 64, rel=1e-5)
    assert found.rate == pytest.approx(16 * 3 / 64)  # 4x4 codes out of 8, of 64 pixels
    assert found.bound == pytest.approx(float(vqvae.bits_per_dim(x).double().mean()), rel=1e-5)
    assert found.best_bound == pytest.approx(float(vqvae.bits_per_dim(x, prior).double().mean()), rel=1e-5)
    nats = torch.nn.functional.cross_entropy(prior(codes), codes, reduction="sum") / len(x)
    assert found.best_rate == pytest.approx(float(nats) / math.log(2) / 64, rel=1e-5)


@torch.no_grad()
def test_the_vaes_likelihoods(compared, data):
    vae, (x, _) = trained_vae(compared[0]), evaluated(data)
    found, use = figures(compared, CONTINUOUS).likelihoods, figures(compared, CONTINUOUS).use
    mean, log_variance = vae.posterior(x)
    q, p = torch.distributions.Normal(mean, (0.5 * log_variance).exp()), torch.distributions.Normal(0.0, 1.0)
    nats = float(torch.distributions.kl_divergence(q, p).double().sum()) / len(x)
    assert use.kl_per_image == pytest.approx(nats, rel=1e-4)
    assert found.rate == pytest.approx(nats / math.log(2) / 64, rel=1e-4)
    bounds = [float(vae.bits_per_dim(x, generator=torch.Generator().manual_seed(s)).double().mean()) for s in range(20)]
    noise = max(bounds) - min(bounds)
    assert min(bounds) - noise <= found.bound <= max(bounds) + noise
    assert found.given_latents + found.rate == pytest.approx(found.bound)
    weighted = [
        float(vae.bits_per_dim(x, samples=3, generator=torch.Generator().manual_seed(s)).double().mean())
        for s in range(20)
    ]
    noise = max(weighted) - min(weighted)
    assert found.best_rate is None and min(weighted) - noise <= found.best_bound <= max(weighted) + noise


@pytest.mark.parametrize("name", [GRADIENT, EMA])
@torch.no_grad()
def test_the_use_of_the_codes(compared, data, name):
    vqvae, _, _ = load_models(compared[0] / "runs" / FOLDERS[name], CPU)
    codes, use = vqvae.encode(evaluated(data)[0]).flatten(), figures(compared, name).use
    frequency = torch.bincount(codes, minlength=8).double() / len(codes)
    assert use.perplexity == pytest.approx(float(torch.special.entr(frequency).sum().exp()), rel=1e-5)
    assert use.codes_in_use == pytest.approx(len(codes.unique()) / 8)
    assert use.kl_per_image == pytest.approx(16 * math.log(8))
    assert use.active_units is None and use.of == 8


def test_the_use_of_the_units(compared, data):
    vae, use = trained_vae(compared[0]), figures(compared, CONTINUOUS).use
    with torch.no_grad():
        means = vae.posterior(evaluated(data)[0])[0].flatten(1)
    assert use.active_units == int((means.numpy().var(0, ddof=1) > 0.01).sum())
    assert use.of == 64 and use.perplexity is None and use.codes_in_use is None
    spread_out = dataclasses.replace(data.held_out, pixels=data.held_out.pixels)
    with torch.no_grad():
        vae.encoder[-1].weight.mul_(100.0)
    assert measure_vae(vae, spread_out, 1)[1].active_units > (use.active_units or 0)


@torch.no_grad()
def test_reconstructions_and_their_error(compared, data):
    out, found, pictures = compared
    x, _ = evaluated(data)
    for name in (GRADIENT, EMA):
        vqvae, _, _ = load_models(out / "runs" / FOLDERS[name], CPU)
        again = vqvae(x)[0].clamp(-1, 1)
        assert figures(compared, name).squared_error == pytest.approx(float((again - x).square().mean()), rel=1e-4)
        shown = data.held_out.batch(torch.arange(SHOWN) * 40 // SHOWN)
        torch.testing.assert_close(pictures.originals, shown)
        torch.testing.assert_close(pictures.reconstructions[name], vqvae(shown)[0].clamp(-1, 1))
    vae = trained_vae(out)
    again = vae.likelihood.mean(vae.decoder(vae.posterior(x)[0])).clamp(-1, 1)
    assert figures(compared, CONTINUOUS).squared_error == pytest.approx(float((again - x).square().mean()), rel=1e-4)


def test_all_contenders_have_the_same_sizes(compared):
    """The VAE's last encoder layer is twice as wide, and the VQ-VAEs have a codebook: nothing else differs."""
    sizes = {x.name: x.parameters for x in compared[1].figures}
    assert sizes[GRADIENT] == sizes[EMA]
    assert sizes[CONTINUOUS]["decoder"] == sizes[EMA]["decoder"] > 0
    assert sizes[CONTINUOUS]["encoder"] - sizes[EMA]["encoder"] == 4 * (8 + 1)
    assert sizes[EMA]["quantizer"] == 8 * 4 and sizes[CONTINUOUS]["quantizer"] == 0
    assert sizes[EMA]["prior"] > 0 and sizes[CONTINUOUS]["prior"] == 0


def test_all_contenders_have_the_same_budget(compared):
    configs = [read_config(compared[0] / "runs" / folder / "config.toml") for folder in FOLDERS.values()]
    assert configs[0].differences(configs[1]) == ["vqvae.ema_decay"]
    assert configs[0].differences(configs[2]) == []
    assert [configs[k].vqvae.ema_decay for k in range(3)] == [None, 0.99, None]


def test_features_of_the_probe_are_of_the_codes_alone(compared, data):
    vqvae, _, _ = load_models(compared[0] / "runs" / FOLDERS[EMA], CPU)
    x, _ = evaluated(data)
    expected = vqvae.quantizer.codebook[vqvae.encode(x)].permute(0, 3, 1, 2).flatten(1)
    torch.testing.assert_close(features(vqvae, x), expected)
