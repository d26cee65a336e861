"""The contenders: a VQ-VAE whose codebook learns by gradient, one by moving averages, and a VAE; all else is equal.

Each has a run directory, so that an interrupted comparison resumes. The VQ-VAEs' can be sampled and
encoded with like any other run.
"""

import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from vqkernels.models import VAE, VQVAE, Prior
from vqkernels.training.checkpoint import ImageFormat, holds_run, write_atomically
from vqkernels.training.comparison.settings import ComparisonSettings
from vqkernels.training.config import RunConfig
from vqkernels.training.data import ImageData
from vqkernels.training.errors import UserError
from vqkernels.training.images import ImageSet
from vqkernels.training.loop import train, train_stage
from vqkernels.training.model_building import build_vae, pick_device
from vqkernels.training.stages import spread
from vqkernels.training.vae_stage import VAEStage

GRADIENT, EMA, CONTINUOUS = "VQ-VAE (gradient)", "VQ-VAE (EMA)", "VAE"
DECAY = 0.99  # of the moving averages


@dataclass(frozen=True)
class Contender:
    """A trained model, in eval mode."""

    name: str
    model: VQVAE | VAE
    prior: Prior | None  # of the codes; None for a VAE
    seconds: float  # training, the prior's included
    metrics: tuple[dict[str, Any], ...]  # lines of its `metrics.jsonl`


class Interrupted(Exception):
    """The training was stopped; what is done is kept."""


@dataclass(frozen=True)
class Workshop:
    """Where a comparison trains, and how it reports."""

    settings: ComparisonSettings
    data: ImageData  # without labels: a prior that is given the class is not p(x)
    out: Path
    progress: bool
    should_stop: Callable[[], bool]

    @property
    def images_file(self) -> Path:
        return self.out / "images.npz"

    def folder(self, name: str) -> Path:
        """The run directory of a contender."""
        letters = "".join(x if x.isalnum() else "_" for x in name.lower())
        return self.out / "runs" / "_".join(part for part in letters.split("_") if part)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the time of training to what earlier, interrupted runs took; what is finished costs nothing more."""
        file = self.out / "seconds.json"
        found = json.loads(file.read_text()) if file.exists() else {}
        before, finished = found.get(name, (0.0, False))
        start, done = time.monotonic(), False
        try:
            yield
            done = True
        finally:
            if not finished:
                found[name] = [before + time.monotonic() - start, done]
                write_atomically(file, lambda out: out.write(json.dumps(found).encode()))

    def seconds(self, name: str) -> float:
        """How long the training of a contender took."""
        return json.loads((self.out / "seconds.json").read_text())[name][0]

    def metrics(self, name: str) -> tuple[dict[str, Any], ...]:
        """What the training of a contender has logged."""
        return tuple(json.loads(line) for line in (self.folder(name) / "metrics.jsonl").read_text().splitlines())


def prepare(settings: ComparisonSettings, data: ImageData) -> tuple[ImageData, ImageData]:
    """The images of a comparison with their labels; and what the models see, without labels, of the held-out images
    those that are measured."""
    train_set = data.train if settings.train_images is None else _some(data.train, settings.train_images)
    held_out = _some(data.held_out, settings.evaluated)
    chosen = dataclasses.replace(data, train=train_set)
    return chosen, ImageData(ImageSet(train_set.pixels, None), ImageSet(held_out.pixels, None), ())


def train_contenders(workshop: Workshop, say: Callable[[str], None]) -> list[Contender]:
    """Train what is not trained yet.

    Raises:
        Interrupted: `should_stop` said so.
        UserError: the comparison was begun with other images.
    """
    _keep_images(workshop)
    found = []
    for name, decay in ((GRADIENT, None), (EMA, DECAY)):
        say(f"training {name}, then its prior")
        found.append(_train_vqvae(workshop, name, configuration(workshop, decay)))
    say(f"training {CONTINUOUS}")
    found.append(_train_vae(workshop, CONTINUOUS, configuration(workshop, None)))
    return found


def configuration(workshop: Workshop, decay: float | None) -> RunConfig:
    """The configuration of a contender: the codebook's rule is all that differs."""
    run = workshop.settings.run
    vqvae = dataclasses.replace(run.vqvae, ema_decay=decay)
    return dataclasses.replace(run, data=str(workshop.images_file.resolve()), color="auto", vqvae=vqvae)


def parameters(model: nn.Module | None) -> int:
    """How many numbers are learned: Parameters, and the codebook, which moving averages keep in a buffer."""
    if model is None:
        return 0
    learned = sum(x.numel() for x in model.parameters())
    kept = {name: x for name, x in model.named_buffers() if name.rpartition(".")[2] == "codebook"}
    return learned + sum(x.numel() for x in kept.values())


def _keep_images(workshop: Workshop) -> None:
    """Write the images that the VQ-VAEs' runs read, or find the same ones there."""
    file, data = workshop.images_file, workshop.data
    images = {"x_train": data.train.pixels.numpy(), "x_test": data.held_out.pixels.numpy()}
    if not file.exists():
        write_atomically(file, lambda out: np.savez(out, **images))  # type: ignore[arg-type]
        return
    with np.load(file, allow_pickle=False) as kept:
        if not all(np.array_equal(kept[name], pixels) for name, pixels in images.items()):
            raise UserError(f"{workshop.out} holds a comparison of other images; give the same ones, or a new folder")


def _train_vqvae(workshop: Workshop, name: str, config: RunConfig) -> Contender:
    folder = workshop.folder(name)
    with workshop.timed(name):
        trained = train(
            config, folder, resume=holds_run(folder), progress=workshop.progress, should_stop=workshop.should_stop
        )
        if not trained.finished:
            raise Interrupted
    return Contender(name, trained.vqvae, trained.prior, workshop.seconds(name), workshop.metrics(name))


def _train_vae(workshop: Workshop, name: str, config: RunConfig) -> Contender:
    folder, data, device = workshop.folder(name), workshop.data, pick_device(config.device)
    images = ImageFormat(data.channels, *data.size, data.class_names)
    torch.manual_seed(config.seed)
    vae = build_vae(config, images, device)
    stage = VAEStage(vae, config.vqvae, data, device)
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
    return Contender(name, vae, None, workshop.seconds(name), workshop.metrics(name))


def _some(images: ImageSet, limit: int) -> ImageSet:
    return images.select(spread(len(images), limit))
