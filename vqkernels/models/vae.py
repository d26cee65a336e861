"""The continuous counterpart of the VQ-VAE: the variational autoencoder of Kingma and Welling (2014).

Encoder and decoder are those of `VQVAE`; instead of the nearest code a grid position has a normal distribution of
`code_dim` channels, and a standard normal prior.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from vqkernels.models.autoencoder import Autoencoder
from vqkernels.models.likelihoods import Likelihood, Name, bits_per_dimension, make_likelihood

ACTIVE = 0.01  # variance of a posterior mean over the data, above which a unit counts as active


class VAELosses(NamedTuple):
    """Terms of minus the evidence lower bound, scalars, in nats per pixel and channel."""

    total: Tensor  # reconstruction + kl_weight * kl
    reconstruction: Tensor  # -log p(x | z)
    kl: Tensor  # KL(q(z | x) || p(z))


class VAE(Autoencoder):
    """Variational autoencoder with a grid of normal latents.

    Args:
        code_dim: channels of a latent.
        likelihood: of 8-bit images, see `vqkernels.models.likelihoods`: a name, or one that is made already.
        kl_weight: 1 is the bound; less, or a rise from 0, is known as beta-VAE or warm-up.
        in_channels, hidden_channels, downsamplings, residual_blocks, residual_channels: as in `VQVAE`.

    Raises:
        ValueError: a size is not positive, or an input has the wrong shape.
    """

    def __init__(
        self,
        in_channels: int = 3,
        *,
        hidden_channels: int = 128,
        code_dim: int = 64,
        downsamplings: int = 2,
        residual_blocks: int = 2,
        residual_channels: int | None = None,
        likelihood: Name | Likelihood = "logistic_mixture",
        kl_weight: float = 1.0,
    ) -> None:
        if code_dim < 1:
            raise ValueError(f"code_dim must be at least 1, but is {code_dim}")
        distribution = make_likelihood(likelihood, in_channels)
        super().__init__(
            in_channels,
            2 * code_dim,
            hidden_channels=hidden_channels,
            downsamplings=downsamplings,
            residual_blocks=residual_blocks,
            residual_channels=residual_channels,
        )
        self.decoder = self._make_decoder(code_dim, distribution.parameters_per_pixel)
        self.likelihood: Likelihood = distribution
        self.code_dim, self.kl_weight = code_dim, kl_weight

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, VAELosses]:
        """Reconstruct images x (B, C, H, W) from one draw of the latents.

        Returns:
            reconstruction (B, C, H, W), the mean of the likelihood; latents (B, code_dim, h, w), and the losses.
        """
        mean, log_variance = self.posterior(x)
        latents = mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)
        decoded = self._crop(self.decoder(latents), x.shape[-2], x.shape[-1])
        elements = max(x.numel(), 1)  # 0 for an empty batch
        log_prob, reconstruction = self.likelihood.score(decoded, x)
        error = -log_prob.sum() / elements
        kl = kl_from_standard_normal(mean, log_variance).sum() / elements
        return reconstruction, latents, VAELosses(error + self.kl_weight * kl, error, kl)

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of q(z | x), (B, code_dim, h, w) each."""
        mean, log_variance = self._encode(x).chunk(2, dim=1)
        return mean, log_variance.clamp(-20.0, 20.0)

    def decode(self, latents: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Images (B, C, H, W), means of the likelihood, of latents (B, code_dim, h, w); size as in `VQVAE.decode`."""
        if size is not None:
            self._check_size((latents.shape[-2], latents.shape[-1]), size)
        decoded = self.decoder(latents)
        return self.likelihood.mean(decoded if size is None else self._crop(decoded, *size))

    def log_prob(self, x: Tensor, latents: Tensor) -> Tensor:
        """log p(x | z), (B,) in nats, of images x (B, C, H, W) and latents (B, code_dim, h, w).

        Raises:
            ValueError: images of this size do not have (h, w) latents.
        """
        self._check_size((latents.shape[-2], latents.shape[-1]), (x.shape[-2], x.shape[-1]))
        return self.likelihood.log_prob(self._crop(self.decoder(latents), x.shape[-2], x.shape[-1]), x)

    @torch.no_grad()
    def bits_per_dim(self, x: Tensor, *, samples: int = 1, generator: torch.Generator | None = None) -> Tensor:
        """An upper bound of -log2 p(x), per pixel and channel: (B,) of 8-bit images x (B, C, H, W) in [-1, 1].

        Args:
            samples: 1 is the evidence lower bound with the KL divergence in closed form; more are importance weighted
                (Burda et al. 2016), a bound that tightens with their number.
        """
        if samples < 1:
            raise ValueError(f"samples must be at least 1, but is {samples}")
        mean, log_variance = self.posterior(x)
        log_weights = []
        for _ in range(samples):
            noise = torch.randn(mean.shape, dtype=mean.dtype, device=mean.device, generator=generator)
            latents = mean + torch.exp(0.5 * log_variance) * noise
            decoded = self._crop(self.decoder(latents), x.shape[-2], x.shape[-1])
            of_image = self.likelihood.log_prob(decoded, x)
            if samples == 1:
                divergence = kl_from_standard_normal(mean, log_variance).sum((1, 2, 3))
            else:  # log q(z | x) - log p(z): the normalising constants of the two cancel
                divergence = 0.5 * (latents.square() - noise.square() - log_variance).sum((1, 2, 3))
            log_weights.append(of_image - divergence)
        bound = torch.logsumexp(torch.stack(log_weights), 0) - math.log(samples)
        return bits_per_dimension(-bound, x[0].numel())

    @torch.no_grad()
    def sample(self, shape: tuple[int, int, int], *, generator: torch.Generator | None = None) -> Tensor:
        """Images (B, C, H, W), means of the likelihood, of latents from the prior; shape is (B, H, W)."""
        batch, height, width = shape
        weight = next(self.parameters())
        size = (batch, self.code_dim, *self.latent_size((height, width)))
        latents = torch.randn(size, dtype=weight.dtype, device=weight.device, generator=generator)
        return self.decode(latents, (height, width))


def kl_from_standard_normal(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mean, exp(log_variance)) || N(0, 1)) of every element, in nats."""
    return 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance)


def active_units(means: Tensor, threshold: float = ACTIVE) -> Tensor:
    """How many units of posterior means (N, ...) vary over the data by more than the threshold, 0-d int64 (Burda et al.
    2016, section 5.2)."""
    return (means.double().var(0, unbiased=True) > threshold).sum()
