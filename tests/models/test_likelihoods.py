"""Likelihoods: 256 probabilities that sum to one, the formulas in float64 beside SciPy's, means, draws, gradients."""

import math

import numpy as np
import pytest
import scipy.stats
import torch

from vqkernels.models.likelihoods import (
    KINDS,
    DiscretisedGaussian,
    DiscretisedLogisticMixture,
    bits_per_dimension,
    make_likelihood,
)

VALUES = torch.arange(256, dtype=torch.float64) / 127.5 - 1


def parameters_of(likelihood, batch=1, size=(1, 1), dtype=torch.float64, spread=1.0):
    generator = torch.Generator().manual_seed(0)
    shape = (batch, likelihood.parameters_per_pixel, *size)
    return spread * torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spread", [0.1, 1.0, 6.0])
def test_the_probabilities_of_all_values_sum_to_one(kind, spread):
    likelihood = make_likelihood(kind, 1)
    parameters = parameters_of(likelihood, spread=spread).expand(256, -1, -1, -1)
    total = likelihood.log_prob(parameters, VALUES.view(256, 1, 1, 1)).exp().sum()
    assert abs(float(total) - 1) < 1e-9


@pytest.mark.parametrize("kind", KINDS)
def test_the_probabilities_of_all_pairs_of_channels_sum_to_one(kind):
    """The second channel of a mixture depends on the first one, and it is a distribution all the same."""
    likelihood = make_likelihood(kind, 2)
    parameters = parameters_of(likelihood)
    first, second = torch.meshgrid(VALUES, VALUES, indexing="ij")
    x = torch.stack([first, second], dim=-1).view(-1, 2, 1, 1)
    total = likelihood.log_prob(parameters.expand(len(x), -1, -1, -1), x).exp().sum()
    assert abs(float(total) - 1) < 1e-9


def test_the_gaussian_is_scipys():
    likelihood = DiscretisedGaussian(1)
    parameters = torch.tensor([[0.2], [math.log(0.3)]], dtype=torch.float64).view(1, 2, 1, 1)
    found = likelihood.log_prob(parameters.expand(256, -1, -1, -1), VALUES.view(256, 1, 1, 1)).exp().numpy()
    edges = np.concatenate([[-np.inf], (VALUES.numpy()[:-1] + 1 / 255), [np.inf]])
    np.testing.assert_allclose(found, np.diff(scipy.stats.norm(0.2, 0.3).cdf(edges)), rtol=1e-8, atol=1e-14)


def test_the_mixture_is_scipys_with_the_channels_before_in_the_mean():
    """Two components, two channels: equation 3 of the paper, one pixel at a time."""
    likelihood = DiscretisedLogisticMixture(2, components=2)
    parameters = parameters_of(likelihood)
    logits, means, log_scales, pair = parameters.flatten().split([2, 4, 4, 2])
    weights = scipy.special.softmax(logits.numpy())
    means, scales = means.view(2, 2).numpy(), log_scales.view(2, 2).exp().numpy()
    for first, second in ((0, 255), (255, 0), (17, 200), (128, 128)):
        x = VALUES[[first, second]]
        expected = 0.0
        for m in range(2):
            shifted = means[1, m] + math.tanh(float(pair[m])) * float(x[0])
            of_component = weights[m]
            for value, mean, scale in ((first, means[0, m], scales[0, m]), (second, shifted, scales[1, m])):
                cdf = scipy.stats.logistic(mean, scale).cdf
                low = 0.0 if value == 0 else cdf(float(VALUES[value]) - 1 / 255)
                high = 1.0 if value == 255 else cdf(float(VALUES[value]) + 1 / 255)
                of_component *= high - low
            expected += of_component
        found = likelihood.log_prob(parameters, x.view(1, 2, 1, 1)).exp()
        assert abs(float(found) / expected - 1) < 1e-7


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_is_the_sum_of_its_pixels(kind):
    likelihood = make_likelihood(kind, 3)
    parameters = parameters_of(likelihood, batch=2, size=(2, 3))
    x = VALUES[torch.randint(256, (2, 3, 2, 3), generator=torch.Generator().manual_seed(1))]
    whole = likelihood.log_prob(parameters, x)
    assert whole.shape == (2,)
    parts = sum(
        likelihood.log_prob(parameters[..., i : i + 1, j : j + 1], x[..., i : i + 1, j : j + 1])
        for i in range(2)
        for j in range(3)
    )
    torch.testing.assert_close(whole, parts)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spread", [1.0, 30.0])
def test_float32_is_finite_with_finite_gradients_however_wrong_the_model(kind, spread):
    likelihood = make_likelihood(kind, 3)
    parameters = parameters_of(likelihood, batch=4, size=(8, 8), dtype=torch.float32, spread=spread).requires_grad_()
    x = VALUES[torch.randint(256, (4, 3, 8, 8), generator=torch.Generator().manual_seed(1))].float()
    found = likelihood.log_prob(parameters, x)
    expected = likelihood.log_prob(parameters.detach().double(), x.double())
    torch.testing.assert_close(found.double(), expected, rtol=2e-4, atol=1e-2)
    found.sum().backward()
    assert parameters.grad.isfinite().all()
    assert parameters.grad.any()


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_differences(kind):
    likelihood = make_likelihood(kind, 2)
    parameters = parameters_of(likelihood, size=(1, 2)).requires_grad_()
    x = VALUES[torch.tensor([0, 255, 100, 31])].view(1, 2, 1, 2)
    assert torch.autograd.gradcheck(lambda p: likelihood.log_prob(p, x), parameters)


@pytest.mark.parametrize("kind", KINDS)
def test_draws_are_values_and_follow_the_distribution(kind):
    """The frequencies of the draws of the second channel are the probabilities, summed over the first."""
    likelihood = make_likelihood(kind, 1)
    parameters = parameters_of(likelihood, spread=0.7)
    count = 40_000
    drawn = likelihood.sample(parameters.expand(count, -1, -1, -1), torch.Generator().manual_seed(2)).flatten()
    steps = (drawn + 1) * 127.5
    assert (steps - steps.round()).abs().max() < 1e-6
    found = torch.bincount(steps.round().long(), minlength=256).double()
    expected = likelihood.log_prob(parameters.expand(256, -1, -1, -1), VALUES.view(256, 1, 1, 1)).exp() * count
    grouped = [part.view(16, 16).sum(1) for part in (found, expected)]
    statistic = ((grouped[0] - grouped[1]).square() / grouped[1].clamp_min(1)).sum()
    assert float(statistic) < 45  # chi squared, 15 degrees of freedom: once in 10,000


@pytest.mark.parametrize("kind", KINDS)
def test_the_mean_is_that_of_the_draws(kind):
    likelihood = make_likelihood(kind, 3)
    parameters = parameters_of(likelihood, spread=0.3)
    if kind != "categorical":  # narrow enough that nothing reaches the ends, where draws are clamped
        sizes = {"gaussian": (3, 3), "logistic_mixture": (10, 30, 30, 30)}[kind]
        parts = list(parameters.split(sizes, dim=1))
        scale = 1 if kind == "gaussian" else 2
        parts[scale] = parts[scale] - 3.5
        parameters = torch.cat([0.5 * part if n == scale - 1 else part for n, part in enumerate(parts)], dim=1)
    drawn = likelihood.sample(parameters.expand(20_000, -1, -1, -1), torch.Generator().manual_seed(3))
    torch.testing.assert_close(drawn.mean(0), likelihood.mean(parameters)[0], rtol=0, atol=0.02)


def test_draws_repeat_with_the_generator():
    for kind in KINDS:
        likelihood = make_likelihood(kind, 3)
        parameters = parameters_of(likelihood, size=(4, 4))
        first, second = (likelihood.sample(parameters, torch.Generator().manual_seed(5)) for _ in range(2))
        assert torch.equal(first, second)


def test_bits_per_dimension():
    assert float(bits_per_dimension(torch.tensor(math.log(256) * 12, dtype=torch.float64), 12)) == pytest.approx(8)


def test_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match="likelihood must be one of logistic_mixture, gaussian, categorical"):
        make_likelihood("poisson", 3)
    with pytest.raises(ValueError, match=r"parameters must be \(B, 6, H, W\), but have shape \(1, 3, 2, 2\)"):
        DiscretisedGaussian(3).log_prob(torch.zeros(1, 3, 2, 2), torch.zeros(1, 3, 2, 2))
    with pytest.raises(ValueError, match="components must be at least 1"):
        DiscretisedLogisticMixture(3, components=0)
