"""The measures of collapse, on models whose use of their latents is known."""

import math

import pytest
import torch

from vqkernels.models import VAE, VQVAE, AutoregressiveDecoder
from vqkernels.training.comparison.collapse import DecoderAlone, grey, measure_collapse, others
from vqkernels.training.data import ImageData
from vqkernels.training.images import ImageSet

LEVELS = 4
OPTIONS = {"hidden_channels": 4, "code_dim": 2, "downsamplings": 1, "residual_blocks": 0}


def decoder() -> AutoregressiveDecoder:
    torch.manual_seed(0)
    return AutoregressiveDecoder(1, levels=LEVELS, features=4, hidden_channels=4, num_layers=2, head_channels=4)


def images(count=24) -> ImageSet:
    generator = torch.Generator().manual_seed(0)
    return ImageSet(torch.randint(256, (count, 1, 8, 8), generator=generator).to(torch.uint8), None)


@torch.enable_grad()
def models():
    alone = DecoderAlone(decoder())
    vae = VAE(1, likelihood=decoder(), **OPTIONS)
    vqvae = VQVAE(1, likelihood=decoder(), codebook_size=8, init="kmeans", **OPTIONS)
    vqvae(images().batch(slice(None)))  # the codes begin as those of the images
    with torch.no_grad():
        for model in (vae, vqvae):
            for layer in model.likelihood.pixelcnn.layers:
                layer.condition.weight.mul_(5.0)
    return alone.eval(), vae.eval(), vqvae.eval()


def test_every_image_gets_the_latents_of_another():
    for count in (2, 3, 50):
        partner = others(count)
        assert sorted(partner.tolist()) == list(range(count))
        assert not (partner == torch.arange(count)).any()


@torch.no_grad()
def test_figures_are_those_of_the_models():
    alone, vae, vqvae = models()
    held_out = images()
    x, partner = held_out.batch(slice(None)), others(24)
    found = measure_collapse(alone, vae, vqvae, held_out)
    bit, zeros = math.log(2), torch.zeros(24, 4, 8, 8)
    assert found.alone == pytest.approx(-float(alone.likelihood.log_prob(zeros, x).mean()) / bit, rel=1e-5)
    codes = vqvae.encode(x)
    for name, given in {"vqvae_given_codes": codes, "vqvae_shuffled": codes[partner]}.items():
        of_image = vqvae.likelihood.log_prob(vqvae.decoder(vqvae.quantizer.decode(given)), x)
        assert getattr(found, name) == pytest.approx(-float(of_image.mean()) / bit, rel=1e-5)
    assert found.vqvae_gain == found.vqvae_shuffled - found.vqvae_given_codes
    mean, log_variance = vae.posterior(x)
    q, p = torch.distributions.Normal(mean, (0.5 * log_variance).exp()), torch.distributions.Normal(0.0, 1.0)
    assert found.vae_kl == pytest.approx(float(torch.distributions.kl_divergence(q, p).sum()) / 24 / bit, rel=1e-4)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(0))
    latents = mean + (0.5 * log_variance).exp() * noise
    for name, given in {"vae_given_latents": latents, "vae_shuffled": latents[partner]}.items():
        of_image = vae.likelihood.log_prob(vae.decoder(given), x)
        assert getattr(found, name) == pytest.approx(-float(of_image.mean()) / bit, rel=1e-5)
    assert found.codes_cost == 16 * 3 and found.codebook_size == 8
    frequency = torch.bincount(codes.flatten(), minlength=8) / codes.numel()
    assert found.perplexity == pytest.approx(float(torch.special.entr(frequency).sum().exp()), rel=1e-5)
    assert (found.levels, found.dimensions, found.units) == (LEVELS, 64, 32)
    assert found.active_units == int((mean.flatten(1).var(0) > 0.01).sum())


@torch.no_grad()
def test_shuffled_latents_change_what_a_decoder_that_reads_them_says():
    alone, vae, vqvae = models()
    found = measure_collapse(alone, vae, vqvae, images())
    assert abs(found.vqvae_gain) > 1e-3 and abs(found.vae_gain) > 1e-3


@torch.no_grad()
def test_a_decoder_that_ignores_its_latents_shows_as_collapse():
    alone, vae, vqvae = models()
    vae.encoder[-1].weight.zero_()
    vae.encoder[-1].bias.zero_()
    for model in (vae, vqvae):
        for layer in model.likelihood.pixelcnn.layers:
            layer.condition.weight.zero_()
    found = measure_collapse(alone, vae, vqvae, images())
    assert found.vae_kl == 0 and found.active_units == 0
    assert found.vae_gain == 0 and found.vqvae_gain == 0
    assert found.vae_given_latents == pytest.approx(found.alone)  # the same PixelCNN, and nothing to condition on
    assert found.vqvae_given_codes == pytest.approx(found.alone)


def test_colors_become_grey_and_grey_stays():
    pixels = torch.tensor([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]], dtype=torch.uint8)
    colors = ImageSet(pixels[:, :, None, None], None)
    found = grey(ImageData(colors, colors, ()))
    assert found.train.pixels.flatten().tolist() == [76, 150, 29, 255]
    assert grey(found).train.pixels is found.train.pixels
