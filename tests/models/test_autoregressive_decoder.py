"""The autoregressive decoder: a distribution of rounded images, draws that follow it, a likelihood like the others."""

import itertools

import pytest
import torch

from vqkernels.models import VAE, VQVAE, AutoregressiveDecoder
from vqkernels.models.vae import kl_from_standard_normal


def small(channels=1, levels=3, **options) -> AutoregressiveDecoder:
    torch.manual_seed(0)
    decoder = AutoregressiveDecoder(
        channels, levels=levels, **{"features": 2, "hidden_channels": 4, "num_layers": 2, "head_channels": 4, **options}
    )
    for parameter in decoder.parameters():  # far from uniform
        parameter.data.mul_(3.0)
    return decoder


def all_images(channels, levels, size):
    count = channels * size[0] * size[1]
    values = torch.tensor(list(itertools.product(range(levels), repeat=count)), dtype=torch.float64)
    return (values * (2 / (levels - 1)) - 1).view(-1, channels, *size)


@pytest.mark.parametrize("channels,levels,size", [(1, 3, (2, 2)), (2, 2, (2, 2)), (3, 2, (1, 2))])
def test_the_probabilities_of_all_images_sum_to_one(channels, levels, size):
    decoder, x = small(channels, levels).double(), all_images(channels, levels, size)
    features = torch.randn(1, 2, *size, dtype=torch.float64)
    total = decoder.log_prob(features.expand(len(x), -1, -1, -1), x).exp().sum()
    assert abs(float(total.detach()) - 1) < 1e-9


@pytest.mark.parametrize("channels", [1, 2])
def test_draws_follow_the_probabilities(channels):
    decoder = small(channels, 2).eval()
    x, features = all_images(channels, 2, (1, 2)).float(), torch.randn(1, 2, 1, 2)
    expected = decoder.log_prob(features.expand(len(x), -1, -1, -1), x).exp().detach()
    drawn = decoder.sample(features.expand(4000, -1, -1, -1), torch.Generator().manual_seed(1))
    found = torch.stack([(drawn == image).flatten(1).all(1).float().mean() for image in x])
    assert abs(float(found.sum()) - 1) < 1e-6
    assert float((found - expected).abs().max()) < 0.03


def test_the_channels_of_a_pixel_are_told_apart():
    """Exchanging the channels of an image is not the same image."""
    decoder = small(2, 3).double()
    x, features = all_images(2, 3, (1, 1)), torch.zeros(1, 2, 1, 1, dtype=torch.float64)
    first = decoder.log_prob(features.expand(len(x), -1, -1, -1), x)
    second = decoder.log_prob(features.expand(len(x), -1, -1, -1), x.flip(1))
    assert float((first - second).abs().max().detach()) > 1e-3


@pytest.mark.parametrize("levels", [2, 16, 17, 256])
def test_levels_are_the_nearest_ones(levels):
    decoder = small(1, levels)
    values = torch.linspace(-1, 1, levels)
    x = values.repeat(3, 1)[:, None]  # (3, 1, 1? levels) rows of all levels
    x = x.view(3, 1, 1, levels)
    assert torch.equal(decoder.to_levels(x)[0, 0], torch.arange(levels))
    assert torch.equal(decoder.to_levels(x + 0.9 / (levels - 1)), decoder.to_levels(x))


def test_the_scanned_digits_lose_nothing_at_17_levels():
    pixels = torch.tensor([round(k * 255 / 16) for k in range(17)]).view(1, 1, 1, 17)
    assert small(1, 17).to_levels(pixels.float() / 127.5 - 1).flatten().tolist() == list(range(17))


def test_the_score_is_the_likelihood_and_the_expectation_of_every_pixel():
    decoder = small(1, 3).double()
    x, features = all_images(1, 3, (1, 2)), torch.randn(1, 2, 1, 2, dtype=torch.float64)
    features = features.expand(len(x), -1, -1, -1)
    log_prob, expected = decoder.score(features, x)
    torch.testing.assert_close(log_prob, decoder.log_prob(features, x))
    weights = log_prob.exp()
    first = (weights * x[:, 0, 0, 0]).sum()  # nothing is before it, so it is the same for all images
    torch.testing.assert_close(expected[:, 0, 0, 0], first.expand(len(x)).detach(), rtol=1e-6, atol=1e-8)
    given = x[:, 0, 0, 0] == x[0, 0, 0, 0]
    second = (weights * x[:, 0, 0, 1])[given].sum() / weights[given].sum()
    torch.testing.assert_close(expected[0, 0, 0, 1], second.detach(), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("channels", [1, 3])
def test_both_autoencoders_take_it(channels):
    x = torch.rand(3, channels, 6, 5) * 2 - 1
    options = {"hidden_channels": 4, "code_dim": 2, "downsamplings": 1}
    vqvae = VQVAE(channels, codebook_size=4, likelihood=small(channels), **options)
    vae = VAE(channels, likelihood=small(channels), **options)
    for model in (vqvae, vae):
        reconstruction, latents, losses = model(x)
        assert reconstruction.shape == x.shape
        losses.total.backward()
        assert [name for name, p in model.named_parameters() if p.grad is None] == []
        assert model.bits_per_dim(x).shape == (3,)
        assert model.decode(latents.detach(), (6, 5)).shape == x.shape
        assert any(name.startswith("likelihood.pixelcnn.") for name in model.state_dict())
    indices = vqvae.encode(x)
    bits = -vqvae.log_prob(x, indices) / (x[0].numel() * torch.tensor(2.0).log()) + 2.0 * 9 / x[0].numel()
    torch.testing.assert_close(vqvae.bits_per_dim(x), bits.detach())


def test_the_vaes_likelihood_of_given_latents_is_that_of_its_bound():
    model, x = VAE(1, hidden_channels=4, code_dim=2, likelihood=small()), torch.rand(2, 1, 8, 8) * 2 - 1
    mean, log_variance = model.posterior(x)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(5))
    bound = model.log_prob(x, mean + (0.5 * log_variance).exp() * noise)
    bound = bound - kl_from_standard_normal(mean, log_variance).sum((1, 2, 3))
    bits = model.bits_per_dim(x, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(-bound.detach() / (64 * torch.tensor(2.0).log()), bits)


def test_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match="levels must be between 2 and 256, but is 1"):
        small(levels=1)
    with pytest.raises(ValueError, match="features must be at least 1, but is 0"):
        small(features=0)
    with pytest.raises(ValueError, match=r"parameters must be \(B, 2, H, W\), but have shape"):
        small().log_prob(torch.zeros(1, 3, 2, 2), torch.zeros(1, 1, 2, 2))
    with pytest.raises(ValueError, match="the likelihood must be of 3 channels, but is of 1"):
        VQVAE(3, likelihood=small())
    with pytest.raises(ValueError, match="log_prob needs a likelihood"):
        VQVAE(1).log_prob(torch.zeros(1, 1, 8, 8), torch.zeros(1, 2, 2, dtype=torch.int64))
