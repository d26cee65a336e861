"""The two stages of a run: what each one trains, measures and draws."""

import math
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vqkernels.models import VQVAE, Prior
from vqkernels.nn import CodebookUsage
from vqkernels.training.config import PriorConfig, VQVAEConfig
from vqkernels.training.data import ImageData
from vqkernels.training.images import ImageSet
from vqkernels.training.pictures import image_grid, side_by_side

CHUNK = 256  # images per forward pass outside training
EVALUATED = 1024  # held-out images that an evaluation looks at
DRAWN = 32  # images of a reconstruction grid
PER_CLASS = 8  # samples of a class in a sample grid
CLASSES_DRAWN = 16


class TrainingStage(Protocol):
    """What a stage gives to the loop."""

    name: str

    @property
    def config(self) -> VQVAEConfig | PriorConfig: ...

    @property
    def model(self) -> nn.Module: ...

    forward: nn.Module
    """The model as the loss calls it: itself, or wrapped for several processes."""

    def loss(self, indices: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch of training images, and metrics of it (0-d tensors)."""

    def evaluate(self) -> dict[str, float]:
        """Metrics on held-out images; empty if there are none."""

    def pictures(self) -> dict[str, Tensor]:
        """Image grids (C, H, W) uint8 by name."""


class VQVAEStage:
    """Trains the VQ-VAE on images."""

    name: str = "vqvae"

    def __init__(self, vqvae: VQVAE, config: VQVAEConfig, data: ImageData, device: torch.device) -> None:
        self.model, self.config, self.data, self.device = vqvae, config, data, device
        self.forward: nn.Module = vqvae
        self.held_out = data.held_out.select(spread(len(data.held_out), EVALUATED))

    def loss(self, indices: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        trained: Any = getattr(self.forward, "module", self.forward)  # DDP keeps the model there; FSDP2 trains a copy
        _, _, losses = self.forward(self.data.train.batch(indices, self.device))
        return losses.total, {
            "reconstruction": losses.reconstruction.detach(),
            "quantization": losses.quantization.detach(),
            "perplexity": trained.quantizer.perplexity,
        }

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        if not len(self.held_out):
            return {}
        squared, bits, used = 0.0, 0.0, CodebookUsage(self.config.codebook_size, process_group=False)
        self.model.eval()
        for chunk in chunks(len(self.held_out)):
            x = self.held_out.batch(chunk, self.device)
            reconstruction, indices, _ = self.model(x)
            squared += float((reconstruction - x).square().mean((1, 2, 3)).double().sum())
            used.update(indices)
            if self.model.likelihood is not None:
                bits += float(self.model.bits_per_dim(x).double().sum())
        self.model.train()
        found = {
            "held_out_reconstruction": squared / len(self.held_out),
            "held_out_perplexity": float(used.compute().perplexity),
        }
        if self.model.likelihood is not None:  # with the uniform prior
            found["held_out_bits_per_dim"] = bits / len(self.held_out)
        return found

    @torch.no_grad()
    def pictures(self) -> dict[str, Tensor]:
        images = self.held_out if len(self.held_out) else self.data.train
        x = images.batch(spread(len(images), DRAWN), self.device)
        self.model.eval()
        reconstruction = self.model(x)[0]
        self.model.train()
        return {"reconstructions": side_by_side(x, reconstruction, 8)}


class PriorStage:
    """Trains the prior on the codes of a frozen VQ-VAE."""

    name: str = "prior"

    def __init__(
        self, prior: Prior, vqvae: VQVAE, config: PriorConfig, data: ImageData, device: torch.device, seed: int
    ) -> None:
        self.model, self.config, self.data, self.device, self.seed = prior, config, data, device, seed
        self.forward: nn.Module = prior
        self.vqvae = vqvae.eval().requires_grad_(False)
        self.train_codes = encode(vqvae, data.train, device)
        self.held_out = data.held_out.select(spread(len(data.held_out), EVALUATED))
        self.held_out_codes = encode(vqvae, self.held_out, device)

    def loss(self, indices: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        loss = self._cross_entropy(self.forward, self.train_codes, self.data.train.labels, indices)
        return loss, {"perplexity": loss.detach().exp()}

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        if not len(self.held_out_codes):
            return {}
        total, bits = 0.0, 0.0
        self.model.eval()
        for chunk in chunks(len(self.held_out_codes)):
            loss = self._cross_entropy(self.model, self.held_out_codes, self.held_out.labels, chunk)
            total += float(loss) * (chunk.stop - chunk.start)
            if self.vqvae.likelihood is not None:
                labels = None if self.held_out.labels is None else self.held_out.labels[chunk].to(self.device)
                x = self.held_out.batch(chunk, self.device)
                bits += float(self.vqvae.bits_per_dim(x, self.model, labels).double().sum())
        self.model.train()
        nats = total / len(self.held_out_codes)
        found = {"held_out_nats_per_code": nats, "held_out_bits_per_code": nats / math.log(2)}
        if self.vqvae.likelihood is not None:
            found["held_out_bits_per_dim"] = bits / len(self.held_out_codes)
        return found

    def pictures(self) -> dict[str, Tensor]:
        classes = min(len(self.data.class_names), CLASSES_DRAWN)
        labels = torch.arange(classes).repeat_interleave(PER_CLASS) if classes else None
        generator = torch.Generator(self.device).manual_seed(self.seed)
        count = PER_CLASS**2 if labels is None else len(labels)
        images = draw(self.vqvae, self.model, self.data.size, count, labels=labels, generator=generator)
        return {"samples": image_grid(images, PER_CLASS)}

    def _cross_entropy(self, model: nn.Module, codes: Tensor, labels: Tensor | None, indices: Tensor | slice) -> Tensor:
        """Mean negative log-likelihood of a code, in nats."""
        batch = codes[indices].to(self.device)
        logits = model(batch, None if labels is None else labels[indices].to(self.device))
        return F.cross_entropy(logits.float(), batch)  # mixed precision gives narrower logits


@torch.no_grad()
def encode(vqvae: VQVAE, images: ImageSet, device: torch.device) -> Tensor:
    """Codes (N, h, w) int64 of all images, on the CPU."""
    if not len(images):
        return torch.empty(0, 1, 1, dtype=torch.int64)
    return torch.cat([vqvae.encode(images.batch(chunk, device)).cpu() for chunk in chunks(len(images))])


@torch.no_grad()
def draw_codes(
    vqvae: VQVAE,
    prior: Prior,
    size: tuple[int, int],
    count: int,
    *,
    labels: Tensor | None,
    generator: torch.Generator,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    guidance: float = 1.0,
    known: Tensor | None = None,
    progress: bool = False,
) -> Tensor:
    """Codes (count, h, w) int64, drawn from the prior for labels (count,).

    Args:
        size: height and width of the images.
        generator: source of randomness, on the models' device.
        known: (count, h, w), codes to keep, and -1 where one is to be drawn.
    """
    device = next(prior.parameters()).device
    return prior.sample(
        (count, *vqvae.latent_size(size)),
        labels=None if labels is None else labels.to(device),
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        guidance=guidance,
        known=known,
        generator=generator,
        progress=progress,
    )


@torch.no_grad()
def decode(vqvae: VQVAE, codes: Tensor, size: tuple[int, int]) -> Tensor:
    """Images (N, C, H, W) in [-1, 1] of codes (N, h, w)."""
    return torch.cat([vqvae.decode(part, size) for part in codes.split(CHUNK)]).clamp(-1, 1)


def draw(
    vqvae: VQVAE,
    prior: Prior,
    size: tuple[int, int],
    count: int,
    *,
    labels: Tensor | None,
    generator: torch.Generator,
) -> Tensor:
    """Images (count, C, H, W) in [-1, 1], drawn from the prior for labels (count,) and decoded."""
    return decode(vqvae, draw_codes(vqvae, prior, size, count, labels=labels, generator=generator), size)


def chunks(count: int) -> Iterator[slice]:
    """Slices of at most CHUNK images that make up `count`."""
    for start in range(0, count, CHUNK):
        yield slice(start, min(start + CHUNK, count))


def spread(count: int, limit: int) -> Tensor:
    """At most `limit` indices, evenly spaced below `count`: data sorted by class is seen in all its classes."""
    return torch.arange(count) if count <= limit else torch.arange(limit) * count // limit
