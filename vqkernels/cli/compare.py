"""`vqkernels compare`: trains VQ-VAEs and a VAE on one data set and writes a report."""

import dataclasses
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

from vqkernels.bench import machine
from vqkernels.cli.train import stop_signals
from vqkernels.training.comparison.contenders import Interrupted
from vqkernels.training.comparison.report import document, verdict
from vqkernels.training.comparison.run import compare, data_name
from vqkernels.training.comparison.settings import ComparisonSettings, settings_for
from vqkernels.training.data import load_images
from vqkernels.training.report import write_html, write_markdown


@dataclass(frozen=True)
class CompareArguments:
    """Train a VQ-VAE (codebook by gradient), a VQ-VAE (moving averages) and a VAE at equal budget, and write a report.

    Options that are left out are chosen by the size of the images, for minutes on two cores. After an interruption the
    same command continues.
    """

    data: str
    """The images: 'digits', or any other source of 'vqkernels train'."""
    out: Path
    """A folder for the report, the results and the runs."""
    color: Literal["auto", "grey", "rgb", "rgba"] = "auto"
    """auto: grey if every image is grey, else rgb."""
    held_out: float = 0.2
    """Fraction of the images held out, if the data has no test split."""
    seed: int = 0
    """Seed of weights, batches and held-out images."""
    train_images: int | None = None
    """At most so many training images, spread evenly over the source."""
    steps: int | None = None
    """Training steps of every contender."""
    prior_steps: int | None = None
    """Training steps of the VQ-VAEs' priors."""
    collapse_steps: int | None = None
    """Training steps of the models with an autoregressive decoder."""
    batch_size: int | None = None
    """Images of a training step, of every model."""
    hidden_channels: int | None = None
    """Width of every encoder and decoder."""
    codebook_size: int | None = None
    """Number of codes."""
    evaluated: int | None = None
    """Number of held-out images that are measured."""
    device: str = "auto"
    """auto: cuda if there is a GPU, else cpu."""


def run(arguments: Sequence[str]) -> int:
    """Parse, compare and write; returns 1 if interrupted."""
    parsed = tyro.cli(CompareArguments, prog="vqkernels compare", args=list(arguments))
    start = time.monotonic()
    data = load_images(parsed.data, color=parsed.color, held_out=parsed.held_out, seed=parsed.seed)
    settings = chosen(parsed, (data.channels, *data.size))
    try:
        with stop_signals() as stopped:
            found, pictures = compare(
                settings,
                data,
                parsed.out,
                progress=True,
                should_stop=stopped,
                say=lambda line: print(f"{time.monotonic() - start:6.0f} s  {line}", file=sys.stderr, flush=True),
            )
    except Interrupted:
        print(f"interrupted; the same command continues the comparison in {parsed.out}", file=sys.stderr)
        return 1
    report = document(found, pictures, machine.facts(torch.get_num_threads()), _command(arguments, parsed))
    write_html(report, parsed.out / "report.html")
    write_markdown(report, parsed.out / "report.md")
    print(verdict(found))
    print(f"{time.monotonic() - start:.0f} seconds in all; the report: {parsed.out / 'report.html'}")
    return 0


def chosen(parsed: CompareArguments, shape: tuple[int, int, int]) -> ComparisonSettings:
    """The settings for images of `shape` (C, H, W), with the user's options in their place."""
    settings = settings_for(parsed.data, shape, seed=parsed.seed, held_out=parsed.held_out, device=parsed.device)
    run, collapse = settings.run, settings.collapse
    vqvae = dataclasses.replace(
        run.vqvae,
        steps=_given(parsed.steps, run.vqvae.steps),
        batch_size=_given(parsed.batch_size, run.vqvae.batch_size),
        hidden_channels=_given(parsed.hidden_channels, run.vqvae.hidden_channels),
        codebook_size=_given(parsed.codebook_size, run.vqvae.codebook_size),
    )
    prior = dataclasses.replace(
        run.prior,
        steps=_given(parsed.prior_steps, run.prior.steps),
        batch_size=_given(parsed.batch_size, run.prior.batch_size),
    )
    run = dataclasses.replace(
        run, vqvae=vqvae, prior=prior, checkpoint_every=max(vqvae.steps // 5, 1), picture_every=max(vqvae.steps, 1)
    )
    return dataclasses.replace(
        settings,
        run=run,
        train_images=settings.train_images if parsed.train_images is None else parsed.train_images,
        evaluated=_given(parsed.evaluated, settings.evaluated),
        collapse=dataclasses.replace(
            collapse,
            steps=_given(parsed.collapse_steps, collapse.steps),
            batch_size=_given(parsed.batch_size, collapse.batch_size),
        ),
    )


def _given(asked: int | None, otherwise: int) -> int:
    return otherwise if asked is None else asked


def _command(arguments: Sequence[str], parsed: CompareArguments) -> str:
    """The command for the report, without the folders of this machine."""
    return shlex.join(["vqkernels", "compare", *(_without_folders(x, parsed) for x in arguments)])


def _without_folders(argument: str, parsed: CompareArguments) -> str:
    """An argument without its folders; of --option=VALUE the value."""
    option, equals, value = argument.rpartition("=") if argument.startswith("--") else ("", "", argument)
    if value == parsed.data:
        value = data_name(value)
    elif value and Path(value) == parsed.out:
        value = parsed.out.name
    return option + equals + value
