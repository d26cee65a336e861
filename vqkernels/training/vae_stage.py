"""Trains the VAE, the VQ-VAE's continuous counterpart, as `stages` trains the VQ-VAE."""

import torch
from torch import Tensor, nn

from vqkernels.models import VAE
from vqkernels.models.vae import active_units, kl_from_standard_normal
from vqkernels.training.config import VQVAEConfig
from vqkernels.training.data import ImageData
from vqkernels.training.pictures import side_by_side
from vqkernels.training.stages import DRAWN, EVALUATED, chunks, spread


class VAEStage:
    """Trains the VAE on images.

    Args:
        config: of the VQ-VAE beside it: steps, batch size and learning rate are the same.
        name: of the stage in metrics and checkpoints.
    """

    def __init__(self, vae: VAE, config: VQVAEConfig, data: ImageData, device: torch.device, name: str = "vae") -> None:
        self.name: str = name
        self.model, self.config, self.data, self.device = vae, config, data, device
        self.forward: nn.Module = vae
        self.held_out = data.held_out.select(spread(len(data.held_out), EVALUATED))

    def loss(self, indices: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """See `TrainingStage.loss`."""
        _, _, losses = self.forward(self.data.train.batch(indices, self.device))
        return losses.total, {"reconstruction": losses.reconstruction.detach(), "kl": losses.kl.detach()}

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """See `TrainingStage.evaluate`; the noise of the latents is that of a fixed seed."""
        if not len(self.held_out):
            return {}
        bits, nats, means = 0.0, 0.0, []
        generator = torch.Generator(self.device).manual_seed(0)
        self.model.eval()
        for chunk in chunks(len(self.held_out)):
            x = self.held_out.batch(chunk, self.device)
            bits += float(self.model.bits_per_dim(x, generator=generator).double().sum())
            mean, log_variance = self.model.posterior(x)
            nats += float(kl_from_standard_normal(mean, log_variance).double().sum())
            means.append(mean.cpu())
        self.model.train()
        return {
            "held_out_bits_per_dim": bits / len(self.held_out),
            "held_out_kl_per_image": nats / len(self.held_out),
            "held_out_active_units": float(active_units(torch.cat(means))),
        }

    @torch.no_grad()
    def pictures(self) -> dict[str, Tensor]:
        """See `TrainingStage.pictures`; the reconstructions are those of the posterior means."""
        images = self.held_out if len(self.held_out) else self.data.train
        x = images.batch(spread(len(images), DRAWN), self.device)
        self.model.eval()
        reconstruction = self.model.decode(self.model.posterior(x)[0], self.data.size)
        self.model.train()
        return {"reconstructions": side_by_side(x, reconstruction, 8)}
