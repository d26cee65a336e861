"""`vqkernels demo` from images to drawn images, ours and as people write it: same settings, seeds, batches, weights.

Train the VQ-VAE, encode the training images, train the prior on their codes, draw 100 samples of each digit, decode
them. Ours is the command's own loop with its logs, checkpoints, evaluations and pictures; the usual one is a bare loop.
"""

import dataclasses
import json
import math
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.usual_model import (
    code_loss,
    plain_decode,
    plain_sample,
    reconstruction_loss,
    usual_prior,
    usual_step,
    usual_vqvae,
)
from vqkernels.models import PixelCNN
from vqkernels.training import stages
from vqkernels.training.batches import Batches
from vqkernels.training.checkpoint import ImageFormat
from vqkernels.training.config import RunConfig
from vqkernels.training.data import ImageData, load_images
from vqkernels.training.loop import train
from vqkernels.training.model_building import build_prior, build_vqvae

CPU = torch.device("cpu")
PER_CLASS = 100
QUALITY = ("held_out_reconstruction", "held_out_nats_per_code")
PARTS = ("VQ-VAE", "codes and prior", "samples")
TRAILING = 5  # losses that a smoothed one is the mean of
CLOSE = 1.02  # a given loss: this much above the worst final one
BEGINNING = 0.05  # relative difference of the first logged loss, that of step 50: roundings have grown by then

Mark = tuple[float, float]  # seconds of wall, and of this process


def now() -> Mark:
    return time.perf_counter(), time.process_time()


def usual_run(config: RunConfig) -> dict[str, Any]:
    """The bare loop, in float32."""
    marks, losses = [now()], {}
    data = load_images(config.data, held_out=config.held_out, seed=config.seed)
    images = ImageFormat(data.channels, *data.size, data.class_names)
    torch.manual_seed(config.seed)
    vqvae = usual_vqvae(build_vqvae(config, images, CPU))
    losses["vqvae"] = _train(config, config.vqvae, vqvae, data, None, marks)
    codes = stages.encode(vqvae.eval(), data.train, CPU)
    torch.manual_seed(config.seed + 1)
    ours = build_prior(config, images, vqvae, CPU)
    assert isinstance(ours, PixelCNN)
    prior = usual_prior(ours)
    losses["prior"] = _train(config, config.prior, prior, data, codes, marks)
    labels = torch.arange(len(data.class_names)).repeat_interleave(PER_CLASS)
    plain_decode(vqvae, plain_sample(prior.eval(), labels, vqvae.latent_size(data.size)))
    marks.append(now())
    stage = stages.PriorStage(prior, vqvae, config.prior, data, CPU, config.seed)  # type: ignore[arg-type]
    found = stages.VQVAEStage(vqvae, config.vqvae, data, CPU).evaluate() | stage.evaluate()
    return _told(config, marks, losses, {name: found[name] for name in QUALITY})


def our_run(config: RunConfig) -> dict[str, Any]:
    """What `vqkernels demo` does with this configuration."""
    marks, losses, found = [now()], {"vqvae": [], "prior": []}, {}

    def mark() -> bool:
        marks.append(now())
        return False

    with tempfile.TemporaryDirectory() as name:
        trained = train(config, Path(name) / "run", should_stop=mark)
        assert trained.prior is not None
        labels = torch.arange(len(trained.data.class_names)).repeat_interleave(PER_CLASS)
        generator = torch.Generator().manual_seed(config.seed)
        stages.draw(trained.vqvae, trained.prior, trained.data.size, len(labels), labels=labels, generator=generator)
        marks.append(now())
        for line in map(json.loads, (Path(name) / "run" / "metrics.jsonl").read_text().splitlines()):
            if "loss" in line:
                losses[line["stage"]].append(line["loss"])
            found |= {name: value for name, value in line.items() if name in QUALITY}
    return _told(config, marks, losses, found)


def _train(
    config: RunConfig, chosen: Any, model: nn.Module, data: ImageData, codes: Tensor | None, marks: list[Mark]
) -> list[float]:
    """One stage; returns the losses that ours logs, too."""
    optimizer = torch.optim.Adam(model.parameters(), lr=chosen.learning_rate)
    batches, labels = Batches(len(data.train), chosen.batch_size, config.seed), data.train.labels
    assert labels is not None
    model.train()
    losses = []
    for number in range(chosen.steps):
        for group in optimizer.param_groups:
            group["lr"] = chosen.learning_rate * 0.5 * (1 + math.cos(math.pi * number / chosen.steps))
        indices = batches.indices(number)
        if codes is None:
            loss = reconstruction_loss(data.train.batch(indices))
        else:
            loss = code_loss(codes[indices], labels[indices])
        value = usual_step(model, loss, optimizer)()
        marks.append(now())
        if number + 1 == chosen.steps or (number + 1) % config.log_every == 0:
            losses.append(float(value))
    return losses


def _told(
    config: RunConfig, marks: Sequence[Mark], losses: dict[str, list[float]], quality: dict[str, float]
) -> dict[str, Any]:
    """Seconds in all and of the parts; losses with the seconds since their stage began."""
    ends = {"vqvae": config.vqvae.steps, "prior": config.vqvae.steps + config.prior.steps}
    if len(marks) != ends["prior"] + 2 or config.vqvae.schedule != "cosine" or config.prior.schedule != "cosine":
        raise SystemExit(f"{len(marks) - 2} steps were done instead of {ends['prior']}: nothing is told")
    bounds = [0, ends["vqvae"], ends["prior"], len(marks) - 1]
    curves = {}
    for name, first, steps in (("vqvae", 0, config.vqvae.steps), ("prior", ends["vqvae"], config.prior.steps)):
        logged = [x for x in range(1, steps + 1) if x == steps or x % config.log_every == 0]
        curves[name] = {
            "step": logged,
            "seconds": [marks[first + x][0] - marks[first][0] for x in logged],
            "loss": losses[name],
        }
    return {
        "seconds": {k: marks[-1][i] - marks[0][i] for i, k in enumerate(("wall", "process"))},
        "parts": {
            part: {k: marks[end][i] - marks[start][i] for i, k in enumerate(("wall", "process"))}
            for part, start, end in zip(PARTS, bounds, bounds[1:], strict=False)
        },
        "curves": curves,
        "quality": quality,
    }


def smoothed(losses: Sequence[float]) -> list[float]:
    """Means of every loss and those before it."""
    parts = [losses[max(0, end - TRAILING) : end] for end in range(1, len(losses) + 1)]
    return [sum(part) / len(part) for part in parts]


def times_to_loss(runs: dict[str, dict[str, Any]], stage: str) -> dict[str, Any]:
    """The loss that everyone reaches, and the seconds until each did."""
    curves = {name: smoothed(run["curves"][stage]["loss"]) for name, run in runs.items()}
    given = CLOSE * max(curve[-1] for curve in curves.values())
    seconds = {
        name: next(t for t, x in zip(runs[name]["curves"][stage]["seconds"], curve, strict=True) if x <= given)
        for name, curve in curves.items()
    }
    return {"loss": given, "seconds": seconds}


def check_runs(runs: dict[str, dict[str, Any]], most: float = 1.05) -> None:
    """Raise SystemExit unless everyone took the same steps and has learned as much: `most` times the usual error."""
    usual = runs["usual"]
    for name, run in runs.items():
        if any(run["curves"][stage]["step"] != usual["curves"][stage]["step"] for stage in ("vqvae", "prior")):
            raise SystemExit(f"the pipeline '{name}' took other steps than the usual one: nothing is told")
        for what in QUALITY:
            if run["quality"][what] > most * usual["quality"][what]:
                raise SystemExit(f"the pipeline '{name}' has a worse {what} than the usual one: {run['quality']}")
    first = {name: run["curves"]["vqvae"]["loss"][0] for name, run in runs.items()}
    if any(abs(value - first["usual"]) > BEGINNING * first["usual"] for value in first.values()):
        raise SystemExit(f"the pipelines do not begin alike, {first}: nothing is told")


def shortened(config: RunConfig, vqvae_steps: int, prior_steps: int, log_every: int) -> RunConfig:
    """The same settings for fewer steps."""
    return dataclasses.replace(
        config,
        log_every=log_every,
        vqvae=dataclasses.replace(config.vqvae, steps=vqvae_steps),
        prior=dataclasses.replace(config.prior, steps=prior_steps),
    )
