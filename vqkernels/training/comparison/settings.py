"""What a comparison trains and measures: one configuration for all contenders, and what suits a data set."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path

from vqkernels.training.checkpoint import write_atomically
from vqkernels.training.config import PriorConfig, RunConfig, VQVAEConfig
from vqkernels.training.errors import UserError


@dataclass(frozen=True)
class CollapseSettings:
    """The experiment with an autoregressive decoder: grey images, a PixelCNN over their pixels."""

    levels: int = 16  # intensities that a pixel is rounded to
    features: int = 32  # channels that the latents' decoder gives the PixelCNN for every pixel
    hidden_channels: int = 32
    num_layers: int = 5
    head_channels: int = 64
    steps: int = 500
    batch_size: int = 16
    learning_rate: float = 1e-3
    evaluated: int = 256  # held-out images


@dataclass(frozen=True)
class ComparisonSettings:
    """Everything that determines a comparison.

    `run` is the configuration of all contenders; what a VQ-VAE alone has (the codebook, the prior) a VAE ignores.
    """

    run: RunConfig
    train_images: int | None = None  # the most training images, spread evenly over the source; None: all
    evaluated: int = 1000  # held-out images that figures are measured on
    importance_samples: int = 16
    probed: int = 4000  # the most training images that the linear probe learns from
    collapse: CollapseSettings = field(default_factory=CollapseSettings)

    def check(self) -> "ComparisonSettings":
        """Return self.

        Raises:
            UserError: a value is out of range.
        """
        self.run.check()
        counts = {
            "train_images": self.train_images,
            "evaluated": self.evaluated,
            "importance_samples": self.importance_samples,
            "collapse steps": self.collapse.steps,
        }
        for name, value in counts.items():
            if value is not None and value < (2 if name == "evaluated" else 1):
                raise UserError(f"{name} must be at least {2 if name == 'evaluated' else 1}, but is {value}")
        return self

    def hold(self, out: Path) -> None:
        """Write the settings to a folder, or find the same ones there; the data may have moved.

        Raises:
            UserError: a comparison with other settings was begun there.
        """
        file = out / "settings.json"
        mine = dataclasses.asdict(self)
        for name in ("data", "device", "backend"):
            del mine["run"][name]
        if not file.exists():
            write_atomically(file, lambda out: out.write((json.dumps(mine, indent=1) + "\n").encode()))
            return
        found = json.loads(file.read_text())
        if found != mine:
            raise UserError(f"{out} holds a comparison with other settings; give the same ones, or a new folder")


def settings_for(
    data: str, shape: tuple[int, int, int], *, seed: int = 0, held_out: float = 0.1, device: str = "auto"
) -> ComparisonSettings:
    """What suits images of a shape (C, H, W): minutes on two cores, not the paper's 250,000 steps.

    Args:
        data, seed, held_out, device: as in `RunConfig`.
    """
    channels, height, width = shape
    tiny, grey = max(height, width) <= 16, channels == 1
    vqvae = VQVAEConfig(
        hidden_channels=64,
        code_dim=16 if tiny else 32 if grey else 64,
        codebook_size=64 if tiny else 128 if grey else 512,
        downsamplings=1 if tiny or not grey else 2,
        init="kmeans",
        revive="rows",
        likelihood="logistic_mixture",
        steps=2000 if tiny else 1000 if grey else 800,
        batch_size=64 if tiny else 32,
        learning_rate=1e-3,
        schedule="cosine",
    )
    prior = PriorConfig(
        hidden_channels=32,
        num_layers=6 if tiny else 5,
        head_channels=128,
        dropout=0.2 if tiny else 0.0,
        steps=800 if tiny else 500 if grey else 400,
        batch_size=64 if tiny else 32,
        learning_rate=1e-3,
        schedule="cosine",
    )
    run = RunConfig(
        data=data,
        held_out=held_out,
        seed=seed,
        device=device,
        log_every=25,
        checkpoint_every=max(vqvae.steps // 5, 1),
        picture_every=vqvae.steps,
        vqvae=vqvae,
        prior=prior,
    )
    collapse = CollapseSettings(
        levels=17 if tiny else 16,  # the scanned digits have 17 intensities
        steps=400 if tiny else 250,
        batch_size=64 if tiny else 16,
        evaluated=1000 if tiny else 256,
    )
    return ComparisonSettings(
        run,
        train_images=None if tiny or grey else 10_000,
        evaluated=1000 if tiny else 500,
        importance_samples=16 if tiny else 8,
        probed=4000 if tiny else 2000,
        collapse=collapse,
    )
