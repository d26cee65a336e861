"""Likelihoods of 8-bit images: what a decoder's output says about every pixel, as probabilities of 256 values.

A model with one of these has a loss in nats that can be compared with other models', in bits per dimension. Images are
the pixels scaled to [-1, 1] (pixel / 127.5 - 1); a value owns the bin of half width 1 / 255 around it, the first and
the last value own everything beyond them, so the probabilities of the 256 values sum to one. All differences of
distribution functions are computed as logarithms, so that no probability becomes 0.
"""

import math
from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

VALUES = 256
HALF_BIN = 1 / (VALUES - 1)
LEAST_LOG_SCALE, MOST_LOG_SCALE = -7.0, 4.0  # a bin is e^-4.8 wide, an image 2: one value, and all alike

Name = Literal["logistic_mixture", "gaussian", "categorical"]


class Likelihood(ABC):
    """p(x | parameters) for images x (B, C, H, W) in [-1, 1] and parameters (B, P, H, W) from a decoder.

    Args:
        channels: C.
    """

    def __init__(self, channels: int) -> None:
        if channels < 1:
            raise ValueError(f"channels must be at least 1, but is {channels}")
        self.channels = channels

    @property
    @abstractmethod
    def parameters_per_pixel(self) -> int:
        """P, the channels that the decoder must have."""

    @abstractmethod
    def log_prob(self, parameters: Tensor, x: Tensor) -> Tensor:
        """log p(x), (B,) in nats; it is differentiable with respect to the parameters."""

    @abstractmethod
    def mean(self, parameters: Tensor) -> Tensor:
        """The expected image (B, C, H, W), before values beyond [-1, 1] are clamped."""

    @abstractmethod
    def sample(self, parameters: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """An image (B, C, H, W) whose values are among the 256."""

    def score(self, parameters: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """log p(x), (B,), and the image (B, C, H, W) that is expected."""
        return self.log_prob(parameters, x), self.mean(parameters)


class DiscretisedGaussian(Likelihood):
    """A normal distribution for every channel of a pixel, over the bins: mean and log scale, P = 2 C."""

    @property
    def parameters_per_pixel(self) -> int:
        return 2 * self.channels

    def log_prob(self, parameters: Tensor, x: Tensor) -> Tensor:
        mean, log_scale = self._split(parameters)
        inverse = torch.exp(-log_scale)
        low, high = ((x + side - mean) * inverse for side in (-HALF_BIN, HALF_BIN))
        # F(b) - F(a) = F(-a) - F(-b), and in the left tail log F keeps its digits.
        mirrored = low + high > 0
        a, b = torch.where(mirrored, -high, low), torch.where(mirrored, -low, high)
        top = _log_normal_cdf(b)
        inner = top + _log_one_minus_exp(top - _log_normal_cdf(a))
        return _with_open_ends(x, _log_normal_cdf(high), inner, _log_normal_cdf(-low)).sum((1, 2, 3))

    def mean(self, parameters: Tensor) -> Tensor:
        return self._split(parameters)[0]

    def sample(self, parameters: Tensor, generator: torch.Generator | None = None) -> Tensor:
        mean, log_scale = self._split(parameters)
        noise = torch.randn(mean.shape, dtype=mean.dtype, device=mean.device, generator=generator)
        return _to_values(mean + log_scale.exp() * noise)

    def _split(self, parameters: Tensor) -> tuple[Tensor, Tensor]:
        _check(parameters, self)
        mean, log_scale = parameters.chunk(2, dim=1)
        return mean, log_scale.clamp(LEAST_LOG_SCALE, MOST_LOG_SCALE)


class DiscretisedLogisticMixture(Likelihood):
    """A mixture of logistic distributions over the bins (Salimans et al. 2017, "PixelCNN++", section 2.1 and 2.2).

    A pixel chooses one component for all of its channels; the mean of a channel depends linearly on the channels before
    it. P = components * (1 + 2 C + C (C - 1) / 2): logits, means, log scales, and coefficients in (-1, 1).
    """

    def __init__(self, channels: int, components: int = 10) -> None:
        super().__init__(channels)
        if components < 1:
            raise ValueError(f"components must be at least 1, but is {components}")
        self.components = components

    @property
    def parameters_per_pixel(self) -> int:
        return self.components * (1 + 2 * self.channels + self.channels * (self.channels - 1) // 2)

    def log_prob(self, parameters: Tensor, x: Tensor) -> Tensor:
        logits, means, log_scales, coefficients = self._split(parameters)
        x = x.unsqueeze(2)  # [B, C, 1, H, W]
        inverse = torch.exp(-log_scales)
        centred = x - torch.stack(self._conditional(means, coefficients, list(x.unbind(1))), dim=1)
        low, high = (centred - HALF_BIN) * inverse, (centred + HALF_BIN) * inverse  # [B, C, M, H, W]
        # sigmoid(b) - sigmoid(a) = sigmoid(b) sigmoid(-a) (1 - exp(a - b))
        first, last = F.logsigmoid(high), F.logsigmoid(-low)
        inner = first + last + _log_one_minus_exp(2 * HALF_BIN * inverse)
        of_component = _with_open_ends(x, first, inner, last).sum(1)  # [B, M, H, W]
        return torch.logsumexp(F.log_softmax(logits, dim=1) + of_component, dim=1).sum((1, 2))

    def mean(self, parameters: Tensor) -> Tensor:
        logits, means, _, coefficients = self._split(parameters)
        found: list[Tensor] = []
        for channel in range(self.channels):  # linear, so expectations take the place of the channels before
            found.append(self._conditional(means, coefficients, found)[channel])
        return (F.softmax(logits, dim=1).unsqueeze(1) * torch.stack(found, dim=1)).sum(2)

    def sample(self, parameters: Tensor, generator: torch.Generator | None = None) -> Tensor:
        logits, means, log_scales, coefficients = self._split(parameters)
        weights = F.softmax(logits.double(), dim=1).movedim(1, -1)  # [B, H, W, M]
        chosen = torch.multinomial(weights.flatten(0, -2), 1, generator=generator).view(*weights.shape[:-1], 1)
        chosen = chosen.movedim(-1, 1)  # [B, 1, H, W]
        drawn: list[Tensor] = []
        for channel in range(self.channels):
            mean = self._conditional(means, coefficients, [x.unsqueeze(1) for x in drawn])[channel]
            mean, log_scale = mean.gather(1, chosen)[:, 0], log_scales[:, channel].gather(1, chosen)[:, 0]
            noise = torch.rand(mean.shape, dtype=torch.float64, device=mean.device, generator=generator)
            drawn.append(_to_values(mean + log_scale.exp() * torch.logit(noise, eps=1e-12).to(mean.dtype)))
        return torch.stack(drawn, dim=1)

    def _split(self, parameters: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Logits [B, M, H, W], means and log scales [B, C, M, H, W], coefficients [B, pairs, M, H, W]."""
        _check(parameters, self)
        pairs = self.channels * (self.channels - 1) // 2
        sizes = [size * self.components for size in (1, self.channels, self.channels, pairs)]
        logits, *others = parameters.split(sizes, dim=1)
        means, log_scales, coefficients = (
            part.unflatten(1, (-1, self.components)) if part.shape[1] else part for part in others
        )
        return logits, means, log_scales.clamp(LEAST_LOG_SCALE, MOST_LOG_SCALE), torch.tanh(coefficients)

    def _conditional(self, means: Tensor, coefficients: Tensor, before: list[Tensor]) -> list[Tensor]:
        """Means [B, M, H, W] of the channels whose predecessors are all in `before`."""
        found, pair = [], 0
        for channel in range(min(self.channels, len(before) + 1)):
            mean = means[:, channel]
            for earlier in range(channel):
                mean = mean + coefficients[:, pair] * before[earlier]
                pair += 1
            found.append(mean)
        return found


class Categorical(Likelihood):
    """256 logits for every channel of a pixel, P = 256 C: no notion of nearness, and no assumption either."""

    @property
    def parameters_per_pixel(self) -> int:
        return VALUES * self.channels

    def log_prob(self, parameters: Tensor, x: Tensor) -> Tensor:
        logits = self._logits(parameters)
        value = ((x + 1) * ((VALUES - 1) / 2)).round().clamp(0, VALUES - 1).long()
        return -F.cross_entropy(logits, value, reduction="none").sum((1, 2, 3))

    def mean(self, parameters: Tensor) -> Tensor:
        logits = self._logits(parameters)
        values = torch.linspace(-1, 1, VALUES, dtype=logits.dtype, device=logits.device)
        return torch.einsum("bvchw,v->bchw", F.softmax(logits, dim=1), values)

    def sample(self, parameters: Tensor, generator: torch.Generator | None = None) -> Tensor:
        weights = F.softmax(self._logits(parameters).double(), dim=1).movedim(1, -1)
        drawn = torch.multinomial(weights.flatten(0, -2), 1, generator=generator).view(weights.shape[:-1])
        return (drawn.to(parameters.dtype) * (2 / (VALUES - 1)) - 1).clamp(-1, 1)

    def _logits(self, parameters: Tensor) -> Tensor:
        _check(parameters, self)
        return parameters.unflatten(1, (VALUES, self.channels))


KINDS: dict[str, type[Likelihood]] = {
    "logistic_mixture": DiscretisedLogisticMixture,
    "gaussian": DiscretisedGaussian,
    "categorical": Categorical,
}


def make_likelihood(name: Name | Likelihood, channels: int) -> Likelihood:
    """The likelihood of this name for images of `channels` channels; one that is made already is returned.

    Raises:
        ValueError: no likelihood has this name, or it was made for images of other channels.
    """
    if isinstance(name, Likelihood):
        if name.channels != channels:
            raise ValueError(f"the likelihood must be of {channels} channels, but is of {name.channels}")
        return name
    if name not in KINDS:
        raise ValueError(f"likelihood must be one of {', '.join(KINDS)}, but is {name!r}")
    return KINDS[name](channels)


def bits_per_dimension(nats: Tensor, dimensions: int) -> Tensor:
    """Negative log-likelihoods of images in nats, as bits per pixel and channel."""
    return nats / (dimensions * math.log(2))


def _with_open_ends(x: Tensor, first: Tensor, inner: Tensor, last: Tensor) -> Tensor:
    """The first value owns what lies below it, the last what lies above."""
    return torch.where(x < -1 + HALF_BIN, first, torch.where(x > 1 - HALF_BIN, last, inner))


def _log_normal_cdf(x: Tensor) -> Tensor:
    """torch's log_ndtr, but for the left tail, where its gradient overflows."""
    left = x.clamp_max(-1.0)
    tail = torch.log(0.5 * torch.special.erfcx(left * -math.sqrt(0.5))) - 0.5 * left.square()
    return torch.where(x < -1.0, tail, torch.special.log_ndtr(x.clamp_min(-1.0)))


def _log_one_minus_exp(x: Tensor) -> Tensor:
    """log(1 - exp(-x)) for x > 0, without loss of digits; x is kept from 0, where no gradient passes."""
    return torch.log(-torch.expm1(-x.clamp_min(torch.finfo(x.dtype).tiny)))


def _to_values(x: Tensor) -> Tensor:
    """The nearest of the 256 values."""
    return ((x.clamp(-1, 1) + 1) * ((VALUES - 1) / 2)).round() * (2 / (VALUES - 1)) - 1


def _check(parameters: Tensor, likelihood: Likelihood) -> None:
    if parameters.ndim != 4 or parameters.shape[1] != likelihood.parameters_per_pixel:
        raise ValueError(
            f"parameters must be (B, {likelihood.parameters_per_pixel}, H, W), but have shape {tuple(parameters.shape)}"
        )
