"""The report of one run: what it reconstructs and draws, its figures, its training and its settings."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from vqkernels.models import VQVAE, Prior
from vqkernels.training.config import RunConfig
from vqkernels.training.data import ImageData
from vqkernels.training.evaluation import Figure
from vqkernels.training.pictures import image_grid, side_by_side
from vqkernels.training.report import Block, Document, Gallery, Heading, Listing, Paragraph, Picture, Plot, Table, plots
from vqkernels.training.stages import PER_CLASS, decode, draw, encode, spread

SHOWN = 40  # held-out images above their reconstructions
COLUMNS = 10


def run_document(
    config: RunConfig,
    vqvae: VQVAE,
    prior: Prior,
    data: ImageData,
    figures: Sequence[Figure],
    metrics_file: Path,
    facts: Mapping[str, str],
    command: str,
    *,
    seconds: float,
) -> Document:
    """The report of a finished run.

    Args:
        figures: what was measured of it.
        metrics_file: its `metrics.jsonl`.
        facts: what the figures depend on, such as the machine and the versions.
        command: what reproduces it.
        seconds: how long the command took.
    """
    size, (height, width) = vqvae.quantizer.codebook_size, data.size
    grid = vqvae.latent_size(data.size)
    lines = [json.loads(line) for line in metrics_file.read_text().splitlines()]
    summary = (
        f"A VQ-VAE with {grid[0]}×{grid[1]} codes out of {size} for an image of {height}×{width}, and a prior of "
        f"its codes, trained on {len(data.train):,} images; {len(data.held_out):,} were held out."
    )
    rows = tuple(
        (
            x.name,
            f"{x.value:.1f}{x.unit}",
            "–" if x.bound is None else f"{x.bound:g}{x.unit}",
            "–" if x.bound is None else "met" if x.passed else "not met",
        )
        for x in figures
    )
    blocks: list[Block] = [
        Heading("Figures"),
        Table(
            ("figure", "value", "at least", ""), rows, "The judge is a support vector machine trained on real images."
        ),
        Heading("Images"),
        Gallery(_pictures(config, vqvae, prior, data)),
        Heading("Training"),
        Plot(
            "vqvae",
            plots.curves(
                {
                    "training": points(lines, "vqvae", "reconstruction"),
                    "held out": points(lines, "vqvae", "held_out_reconstruction"),
                },
                across="steps of the VQ-VAE",
                up="reconstruction loss",
            ),
            "What the VQ-VAE loses: squared error of pixels in [−1, 1].",
        ),
        Plot(
            "prior",
            plots.curves(
                {
                    "training": points(lines, "prior", "loss"),
                    "held out": points(lines, "prior", "held_out_nats_per_code"),
                },
                across="steps of the prior",
                up="nats per code",
            ),
            "What a code costs under the prior.",
        ),
        Heading("Settings, machine and versions"),
        Paragraph(f"{seconds:.0f} seconds for this command; what was trained before is not trained again."),
        Listing(command),
        Listing(_without_paths(config)),
        Table(("machine and versions", ""), tuple((name, value) for name, value in facts.items())),
    ]
    return Document("Scanned digits in discrete codes", summary, tuple(blocks))


def points(lines: Sequence[Mapping[str, Any]], stage: str, name: str) -> list[tuple[float, float]]:
    """Steps and values of a metric of a stage."""
    return [(line["step"], line[name]) for line in lines if line["stage"] == stage and name in line]


@torch.no_grad()
def _pictures(config: RunConfig, vqvae: VQVAE, prior: Prior, data: ImageData) -> tuple[Picture, ...]:
    device = next(vqvae.parameters()).device
    shown = data.held_out.select(spread(len(data.held_out), SHOWN))
    reconstructions = decode(vqvae, encode(vqvae, shown, device).to(device), data.size)
    labels = torch.arange(len(data.class_names)).repeat_interleave(PER_CLASS)
    generator = torch.Generator(device).manual_seed(config.seed)
    samples = draw(vqvae, prior, data.size, len(labels), labels=labels, generator=generator)
    return (
        Picture(
            "report_reconstructions",
            side_by_side(shown.batch(slice(None)), reconstructions.cpu(), COLUMNS),
            "Held-out images, each row above its reconstructions.",
        ),
        Picture("report_samples", image_grid(samples, PER_CLASS), "Drawn from the prior, one class a row."),
    )


def _without_paths(config: RunConfig) -> str:
    """The configuration as TOML, its data without the folders they lie in."""
    return "\n".join(line for line in config.to_toml().splitlines() if not line.startswith("data ="))
