"""VAE: any image size, the bound and its terms by other ways, importance weighting, samples, active units."""

import math

import pytest
import torch

from vqkernels.models import VAE
from vqkernels.models.likelihoods import KINDS
from vqkernels.models.vae import active_units, kl_from_standard_normal


def small(**options) -> VAE:
    torch.manual_seed(0)
    return VAE(**{"in_channels": 3, "hidden_channels": 8, "code_dim": 4, **options})


def images(batch=2, size=(8, 8), channels=3):
    pixels = torch.randint(256, (batch, channels, *size), generator=torch.Generator().manual_seed(1))
    return pixels.float() / 127.5 - 1


@pytest.mark.parametrize("likelihood", KINDS)
@pytest.mark.parametrize("size", [(8, 8), (9, 13)])
def test_reconstruction_has_the_size_of_the_image(likelihood, size):
    model, x = small(likelihood=likelihood), images(size=size)
    reconstruction, latents, losses = model(x)
    assert reconstruction.shape == x.shape
    assert latents.shape == (2, 4, *model.latent_size(size))
    assert all(term.shape == () and term.isfinite() for term in losses)
    losses.total.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_the_divergence_is_torchs():
    mean, log_variance = torch.randn(5, 3), torch.randn(5, 3)
    q = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    expected = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0))
    torch.testing.assert_close(kl_from_standard_normal(mean, log_variance), expected)


def test_losses_are_the_bound_per_dimension():
    model, x = small(kl_weight=0.5), images()
    torch.manual_seed(3)
    _, latents, losses = model(x)
    mean, log_variance = model.posterior(x)
    error = -model.likelihood.log_prob(model.decoder(latents), x).sum() / x.numel()
    kl = kl_from_standard_normal(mean, log_variance).sum() / x.numel()
    torch.testing.assert_close(losses.reconstruction, error)
    torch.testing.assert_close(losses.kl, kl)
    torch.testing.assert_close(losses.total, error + 0.5 * kl)


def test_bits_per_dim_is_the_loss_in_other_units():
    model, x = small(), images()
    torch.manual_seed(3)
    losses = model(x)[2]
    generator = torch.Generator().manual_seed(3)
    bits = model.bits_per_dim(x, generator=generator)
    assert bits.shape == (2,)
    torch.testing.assert_close(bits.mean(), losses.total / math.log(2), rtol=1e-4, atol=1e-4)


def test_importance_weighted_bounds_tighten_and_their_weights_are_densities():
    """One weight is log p(x | z) + log p(z) - log q(z | x) with torch's densities; the mean over many beats one."""
    model, x = small().double(), images(size=(4, 4)).double()
    seeds = iter(range(1000, 3000))
    two = torch.stack(
        [model.bits_per_dim(x, samples=2, generator=torch.Generator().manual_seed(next(seeds))) for _ in range(100)]
    )
    many = torch.stack(
        [model.bits_per_dim(x, samples=64, generator=torch.Generator().manual_seed(next(seeds))) for _ in range(10)]
    )
    assert (many.mean(0) < two.mean(0)).all()
    generator = torch.Generator().manual_seed(7)
    mean, log_variance = model.posterior(x)
    weights = []
    for _ in range(2):
        noise = torch.randn(mean.shape, dtype=mean.dtype, generator=generator)
        z = mean + (0.5 * log_variance).exp() * noise
        q, p = torch.distributions.Normal(mean, (0.5 * log_variance).exp()), torch.distributions.Normal(0.0, 1.0)
        weight = model.likelihood.log_prob(model.decoder(z), x) + (p.log_prob(z) - q.log_prob(z)).sum((1, 2, 3))
        weights.append(weight)
    expected = -(torch.logsumexp(torch.stack(weights), 0) - math.log(2)) / (x[0].numel() * math.log(2))
    found = model.bits_per_dim(x, samples=2, generator=torch.Generator().manual_seed(7))
    torch.testing.assert_close(found, expected.detach())


def test_samples_have_the_size_asked_for_and_repeat():
    model = small()
    first, second = (model.sample((3, 9, 11), generator=torch.Generator().manual_seed(1)) for _ in range(2))
    assert first.shape == (3, 3, 9, 11)
    assert torch.equal(first, second)


def test_active_units_counts_what_varies_over_the_data():
    means = torch.zeros(50, 2, 2, 2)
    means[:, 0, 0, 0] = torch.linspace(-1, 1, 50)
    means[:, 1, 1, 1] = 0.001 * torch.linspace(-1, 1, 50)
    means[:, 1] += 100.0
    assert int(active_units(means)) == 1


def test_an_unused_latent_costs_nothing():
    """Where the encoder says N(0, 1) the divergence is 0: what collapse looks like."""
    model, x = small(), images()
    with torch.no_grad():
        model.encoder[-1].weight.zero_()
        model.encoder[-1].bias.zero_()
    assert float(model(x)[2].kl.detach()) == 0
    assert int(active_units(model.posterior(x)[0])) == 0


def test_no_images_give_losses_of_zero():
    assert [float(term.detach()) for term in small()(torch.zeros(0, 3, 8, 8))[2]] == [0, 0, 0]


def test_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match="code_dim must be at least 1"):
        small(code_dim=0)
    with pytest.raises(ValueError, match="samples must be at least 1"):
        small().bits_per_dim(images(), samples=0)
    with pytest.raises(ValueError, match=r"an image of 9x9 has 3x3 codes, but indices are 2x2"):
        small().decode(torch.zeros(1, 4, 2, 2), (9, 9))
