"""Posterior collapse: with a decoder that can model the pixels alone, does a model still use its latents?

Three models with the same `AutoregressiveDecoder`: alone (its condition is zero), behind a VAE's latents, and behind a
VQ-VAE's codes. Measured are the divergence, the active units, and how many bits the likelihood of an image loses when
it is given the latents of another image, or none.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vqkernels.models import VAE, VQVAE, AutoregressiveDecoder
from vqkernels.models.vae import active_units, kl_from_standard_normal
from vqkernels.nn import metrics
from vqkernels.training.checkpoint import ImageFormat, holds_run
from vqkernels.training.comparison.contenders import DECAY, Interrupted, Workshop, configuration
from vqkernels.training.comparison.measures import batches
from vqkernels.training.comparison.settings import CollapseSettings
from vqkernels.training.config import RunConfig, VQVAEConfig
from vqkernels.training.data import ImageData
from vqkernels.training.images import ImageSet
from vqkernels.training.loop import train_stage
from vqkernels.training.model_building import build_vae, build_vqvae, pick_device
from vqkernels.training.stages import TrainingStage, VQVAEStage, chunks, spread
from vqkernels.training.vae_stage import VAEStage

ALONE, OF_VAE, OF_VQVAE = "collapse alone", "collapse VAE", "collapse VQ-VAE"
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


@dataclass(frozen=True)
class Collapse:
    """Figures of the experiment: bits of an image, means over held-out images."""

    levels: int
    dimensions: int  # pixels of an image
    alone: float  # -log2 p(x) of the decoder without latents
    vae_given_latents: float
    vae_shuffled: float  # given the latents of another image
    vae_kl: float
    active_units: int
    units: int
    vqvae_given_codes: float
    vqvae_shuffled: float
    codes_cost: float  # under the uniform prior
    perplexity: float
    codebook_size: int
    seconds: float

    @property
    def vae_gain(self) -> float:
        """Bits that an image's own latents are worth, beside another's."""
        return self.vae_shuffled - self.vae_given_latents

    @property
    def vqvae_gain(self) -> float:
        """Bits that an image's own codes are worth, beside another's."""
        return self.vqvae_shuffled - self.vqvae_given_codes


class DecoderAlone(nn.Module):
    """The autoregressive decoder with a condition of zeros."""

    def __init__(self, likelihood: AutoregressiveDecoder) -> None:
        super().__init__()
        self.likelihood = likelihood

    def forward(self, x: Tensor) -> Tensor:
        """log p(x), (B,) in nats."""
        return self.likelihood.log_prob(x.new_zeros(len(x), self.likelihood.features, *x.shape[-2:]), x)


class AloneStage:
    """Trains the decoder without latents."""

    name: str = "alone"

    def __init__(self, model: DecoderAlone, config: VQVAEConfig, data: ImageData, device: torch.device) -> None:
        self.model, self.config, self.data, self.device = model, config, data, device
        self.forward: nn.Module = model
        self.held_out = data.held_out

    def loss(self, indices: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """See `TrainingStage.loss`."""
        x = self.data.train.batch(indices, self.device)
        return -self.forward(x).sum() / x.numel(), {}

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """See `TrainingStage.evaluate`."""
        bits = sum(-float(self.model(x).double().sum()) for x in batches(self.held_out, self.model)) / math.log(2)
        return {"held_out_bits_per_dim": bits / max(self.held_out.pixels.numel(), 1)}

    def pictures(self) -> dict[str, Tensor]:
        """None: samples of a model that sees no image say nothing of latents."""
        return {}


def run_collapse(workshop: Workshop, say: Callable[[str], None]) -> Collapse:
    """Train the three models, or what is left of it, and measure them.

    Raises:
        Interrupted: `should_stop` said so.
    """
    settings, data = workshop.settings.collapse, grey(workshop.data)
    held_out = data.held_out.select(spread(len(data.held_out), settings.evaluated))
    data = dataclasses.replace(data, held_out=held_out)
    run = configuration(workshop, DECAY)
    vqvae = dataclasses.replace(
        run.vqvae, steps=settings.steps, batch_size=settings.batch_size, learning_rate=settings.learning_rate
    )
    every = max(settings.steps // 2, 1)
    config = dataclasses.replace(run, vqvae=vqvae, checkpoint_every=every, picture_every=every)
    images, device = ImageFormat(1, *data.size, ()), pick_device(config.device)

    def made(build: Callable[[AutoregressiveDecoder], nn.Module]) -> nn.Module:
        torch.manual_seed(config.seed)
        return build(make_decoder(settings)).to(device)

    alone = made(DecoderAlone)
    vae = made(lambda decoder: build_vae(config, images, device, decoder))
    codes = made(lambda decoder: build_vqvae(config, images, device, decoder))
    assert isinstance(alone, DecoderAlone) and isinstance(vae, VAE) and isinstance(codes, VQVAE)
    of_codes = VQVAEStage(codes, vqvae, data, device)
    of_codes.name = "vqvae_autoregressive"
    stages: dict[str, TrainingStage] = {
        ALONE: AloneStage(alone, vqvae, data, device),
        OF_VAE: VAEStage(vae, vqvae, data, device, "vae_autoregressive"),
        OF_VQVAE: of_codes,
    }
    for name, stage in stages.items():
        say(f"training {name.removeprefix('collapse ')} with an autoregressive decoder")
        _train(workshop, name, stage, config, data)
    return measure_collapse(alone, vae, codes, held_out, sum(workshop.seconds(name) for name in stages))


@torch.no_grad()
def measure_collapse(alone: DecoderAlone, vae: VAE, vqvae: VQVAE, images: ImageSet, seconds: float = 0.0) -> Collapse:
    """All figures, on the same images (N, 1, H, W); N at least 2, so that every image has another."""
    device = next(vae.parameters()).device
    generator = torch.Generator(device).manual_seed(0)
    partner = others(len(images))
    means, latents, nats = [], [], 0.0
    for x in batches(images, vae):
        mean, log_variance = vae.posterior(x)
        noise = torch.randn(mean.shape, dtype=mean.dtype, device=device, generator=generator)
        nats += float(kl_from_standard_normal(mean, log_variance).double().sum())
        means.append(mean)
        latents.append(mean + torch.exp(0.5 * log_variance) * noise)
    of_vae, mean = torch.cat(latents), torch.cat(means)
    of_vqvae = torch.cat([vqvae.encode(x) for x in batches(images, vqvae)])
    size, decoder = vqvae.quantizer.codebook_size, alone.likelihood
    nats_alone = sum(-float(alone(x).double().sum()) for x in batches(images, alone))
    return Collapse(
        levels=decoder.levels,
        dimensions=images.pixels[0].numel(),
        alone=nats_alone / math.log(2) / len(images),
        vae_given_latents=bits_given(vae, images, of_vae),
        vae_shuffled=bits_given(vae, images, of_vae[partner]),
        vae_kl=nats / math.log(2) / len(images),
        active_units=int(active_units(mean)),
        units=mean[0].numel(),
        vqvae_given_codes=bits_given(vqvae, images, of_vqvae),
        vqvae_shuffled=bits_given(vqvae, images, of_vqvae[partner]),
        codes_cost=of_vqvae[0].numel() * math.log2(size),
        perplexity=float(metrics.perplexity(torch.bincount(of_vqvae.flatten(), minlength=size))),
        codebook_size=size,
        seconds=seconds,
    )


@torch.no_grad()
def bits_given(model: VAE | VQVAE, images: ImageSet, latents: Tensor) -> float:
    """Mean -log2 p(x | latents) of an image."""
    device = next(model.parameters()).device
    parts = (model.log_prob(images.batch(part, device), latents[part]) for part in chunks(len(images)))
    return -sum(float(part.double().sum()) for part in parts) / math.log(2) / len(images)


def others(count: int, seed: int = 0) -> Tensor:
    """For every image the number of another one: all of them in one cycle, drawn by the seed."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    partner = torch.empty_like(order)
    partner[order] = order.roll(1)
    return partner


def grey(data: ImageData) -> ImageData:
    """The same images with one channel."""
    return dataclasses.replace(data, train=_grey(data.train), held_out=_grey(data.held_out))


def make_decoder(settings: CollapseSettings) -> AutoregressiveDecoder:
    """The decoder of the experiment, for grey images."""
    return AutoregressiveDecoder(
        1,
        levels=settings.levels,
        features=settings.features,
        hidden_channels=settings.hidden_channels,
        num_layers=settings.num_layers,
        head_channels=settings.head_channels,
    )


def _train(workshop: Workshop, name: str, stage: TrainingStage, config: RunConfig, data: ImageData) -> None:
    folder = workshop.folder(name)
    with workshop.timed(name):
        if not train_stage(
            stage,
            config,
            data,
            folder,
            resume=holds_run(folder),
            progress=workshop.progress,
            should_stop=workshop.should_stop,
        ):
            raise Interrupted


def _grey(images: ImageSet) -> ImageSet:
    if images.pixels.shape[1] < 3:
        return images
    weights = torch.tensor(LUMA)
    parts = [
        torch.einsum("bchw,c->bhw", part[:, :3].float(), weights).round().to(torch.uint8)
        for part in images.pixels.split(1024)
    ]
    return ImageSet(torch.cat(parts)[:, None], images.labels)
