"""`vqkernels train`: trains the VQ-VAE, then the prior, into a run directory."""

import argparse
import dataclasses
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Annotated, Literal

import tyro

from vqkernels.training.checkpoint import RunDirectory, read_run_config
from vqkernels.training.config import RunConfig, read_config
from vqkernels.training.data import resolved
from vqkernels.training.errors import UserError
from vqkernels.training.loop import Trained, train


@dataclass(frozen=True)
class TrainArguments:
    """Train a VQ-VAE, then a prior on its codes: a PixelCNN or a transformer.

    An option given here replaces that of --config or of the resumed run.
    """

    out: Path
    """The run directory: a new one, or with --resume that of the run."""
    run: Annotated[RunConfig, tyro.conf.arg(name="")]
    stage: Literal["vqvae", "prior", "all"] = "all"
    """What to train. 'prior' needs a finished VQ-VAE in --out, and --resume."""
    resume: bool = False
    """Continue the run in --out from its last checkpoint."""
    config: Path | None = None
    """A TOML file of options, such as the config.toml of a run."""


def run(arguments: Sequence[str]) -> int:
    """Parse the arguments and train; returns 1 if interrupted."""
    parsed = tyro.cli(
        TrainArguments,
        prog="vqkernels train",
        args=list(arguments),
        default=TrainArguments(out=tyro.MISSING, run=_base(arguments)),
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    config = parsed.run
    config = dataclasses.replace(config, data=resolved(config.data))  # found again when resumed from elsewhere
    trained = train_interruptibly(config, parsed.out, stage=parsed.stage, resume=parsed.resume)
    if not trained.finished:
        return 1
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"the run is in {parsed.out}, its pictures are in {parsed.out / 'pictures'}")
    return 0


def train_interruptibly(
    config: RunConfig, out: Path, *, stage: Literal["vqvae", "prior", "all"] = "all", resume: bool = False
) -> Trained:
    """`loop.train` with a progress bar. Ctrl-C and SIGTERM write a checkpoint and end it."""
    with stop_signals() as stopped:
        trained = train(config, out, stage=stage, resume=resume, progress=True, should_stop=stopped)
    if not trained.finished and int(os.environ.get("RANK", 0)) == 0:
        print(f"interrupted; a checkpoint is written, continue with --resume in {out}", file=sys.stderr)
    return trained


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Gives a function that says whether Ctrl-C or SIGTERM has come. Within this context they end nothing else."""
    received: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        received.append(number)

    handlers = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _base(arguments: Sequence[str]) -> RunConfig:
    """The configuration before the other options: that of --config, of the resumed run, or the defaults."""
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    peek.add_argument("--config", type=Path)
    peek.add_argument("--out", type=Path)
    peek.add_argument("--resume", action="store_true")
    known, _ = peek.parse_known_args(arguments)
    if known.config is not None and known.resume:
        raise UserError(
            "--config and --resume exclude each other: a resumed run has a configuration; leave --config out"
        )
    if known.config is not None:
        return read_config(known.config, data=tyro.MISSING)
    if known.resume and known.out is not None:
        RunDirectory(known.out, resume=True)  # refuses a directory without a run
        return read_run_config(known.out)
    return dataclasses.replace(RunConfig(data=""), data=tyro.MISSING)
