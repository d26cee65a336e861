"""What is measured of a trained model on held-out images: likelihood in its parts, use and worth of the latents."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from vqkernels.models import VAE, VQVAE, Prior
from vqkernels.models.likelihoods import bits_per_dimension
from vqkernels.models.vae import active_units, kl_from_standard_normal
from vqkernels.nn import metrics
from vqkernels.training.comparison.contenders import Contender, parameters
from vqkernels.training.comparison.probe import linear_probe
from vqkernels.training.comparison.settings import ComparisonSettings
from vqkernels.training.data import ImageData
from vqkernels.training.images import ImageSet
from vqkernels.training.stages import chunks, spread

POOLED = 4  # the latents of a grid larger than this are averaged to it before the probe sees them


@dataclass(frozen=True)
class Likelihoods:
    """Upper bounds of -log2 p(x) and their parts, means over images, in bits per pixel and channel.

    Of a VQ-VAE the rate is what its codes cost, under the uniform prior and under the trained one; of a VAE the
    divergence of the posterior from the prior.
    """

    given_latents: float  # -log2 p(x | latents)
    rate: float  # uniform prior; KL
    bound: float  # their sum
    best_rate: float | None  # trained prior
    best_bound: float | None  # with the trained prior; importance-weighted


@dataclass(frozen=True)
class LatentUse:
    """How much of the latents is in use. Of a VQ-VAE the codes, of a VAE the units."""

    kl_per_image: float  # nats; of a VQ-VAE against the uniform prior, a constant
    perplexity: float | None
    codes_in_use: float | None  # fraction
    active_units: int | None
    of: int  # codes, units


@dataclass(frozen=True)
class Figures:
    """All figures of a contender."""

    name: str
    parameters: dict[str, int]  # encoder, decoder, codebook, prior
    likelihoods: Likelihoods
    use: LatentUse
    squared_error: float  # of the reconstruction, images in [-1, 1]
    probe: float | None  # per cent of held-out images, None without labels
    seconds: float


def measure(contender: Contender, data: ImageData, settings: ComparisonSettings) -> Figures:
    """All figures of a contender; `data` has labels if the source has."""
    model = contender.model
    images = data.held_out.select(spread(len(data.held_out), settings.evaluated))
    if isinstance(model, VQVAE):
        assert contender.prior is not None
        likelihoods, use = measure_vqvae(model, contender.prior, images)
    else:
        likelihoods, use = measure_vae(model, images, settings.importance_samples)
    learner = data.train.select(spread(len(data.train), settings.probed))
    size = {name: parameters(getattr(model, name, None)) for name in ("encoder", "decoder", "quantizer")}
    return Figures(
        contender.name,
        {**size, "prior": parameters(contender.prior)},
        likelihoods,
        use,
        squared_error(model, images),
        linear_probe(lambda x: features(model, x), learner, images),
        contender.seconds,
    )


@torch.no_grad()
def measure_vqvae(vqvae: VQVAE, prior: Prior, images: ImageSet) -> tuple[Likelihoods, LatentUse]:
    """Likelihoods and use of the codes; the prior is of p(codes), without labels."""
    given, codes_bits, grids = 0.0, 0.0, []
    for x in batches(images, vqvae):
        indices = vqvae.encode(x)
        given -= float(vqvae.log_prob(x, indices).double().sum())
        codes_bits += float(prior.bits_per_code(indices).double().sum()) * indices[0].numel()
        grids.append(indices.cpu())
    codes, dimensions = torch.cat(grids), images.pixels[0].numel()
    size, count = vqvae.quantizer.codebook_size, codes[0].numel()
    of_image = float(bits_per_dimension(torch.tensor(given / len(images), dtype=torch.float64), dimensions))
    uniform, trained = count * math.log2(size) / dimensions, codes_bits / len(images) / dimensions
    counts = torch.bincount(codes.flatten(), minlength=size)
    return (
        Likelihoods(of_image, uniform, of_image + uniform, trained, of_image + trained),
        LatentUse(
            count * math.log(size), float(metrics.perplexity(counts)), float(metrics.usage(counts)), None, of=size
        ),
    )


@torch.no_grad()
def measure_vae(vae: VAE, images: ImageSet, importance_samples: int) -> tuple[Likelihoods, LatentUse]:
    """The bound with the divergence in closed form, the importance-weighted one, and the use of the units."""
    bound, weighted, nats, means = 0.0, 0.0, 0.0, []
    generator = torch.Generator(next(vae.parameters()).device).manual_seed(0)
    for x in batches(images, vae):
        bound += float(vae.bits_per_dim(x, generator=generator).double().sum())
        weighted += float(vae.bits_per_dim(x, samples=importance_samples, generator=generator).double().sum())
        mean, log_variance = vae.posterior(x)
        nats += float(kl_from_standard_normal(mean, log_variance).double().sum())
        means.append(mean.cpu())
    count, dimensions, of_units = len(images), images.pixels[0].numel(), torch.cat(means)
    kl = nats / count
    rate = kl / (dimensions * math.log(2))
    return (
        Likelihoods(bound / count - rate, rate, bound / count, None, weighted / count),
        LatentUse(kl, None, None, int(active_units(of_units)), of=of_units[0].numel()),
    )


@torch.no_grad()
def squared_error(model: VQVAE | VAE, images: ImageSet) -> float:
    """Mean squared error of reconstructions, per pixel and channel, for images in [-1, 1]."""
    total = sum(float((reconstruct(model, x) - x).square().double().sum()) for x in batches(images, model))
    return total / images.pixels.numel()


@torch.no_grad()
def reconstruct(model: VQVAE | VAE, x: Tensor) -> Tensor:
    """Images (B, C, H, W) from the codes, or from the means of the posterior."""
    size = x.shape[-2], x.shape[-1]
    latents = model.encode(x) if isinstance(model, VQVAE) else model.posterior(x)[0]
    return model.decode(latents, size).clamp(-1, 1)


@torch.no_grad()
def features(model: VQVAE | VAE, x: Tensor) -> Tensor:
    """What the probe sees (B, F): code vectors, or means of the posterior, averaged to at most POOLED x POOLED."""
    grid = model.quantizer.decode(model.encode(x)) if isinstance(model, VQVAE) else model.posterior(x)[0]
    return F.adaptive_avg_pool2d(grid, (min(grid.shape[-2], POOLED), min(grid.shape[-1], POOLED))).flatten(1)


def batches(images: ImageSet, model: torch.nn.Module) -> list[Tensor]:
    """The images in pieces, on the model's device."""
    device = next(model.parameters()).device
    return [images.batch(chunk, device) for chunk in chunks(len(images))]
