"""Trains the VQ-VAE, then the prior on its frozen codes, in a run directory that can be resumed at any time.

On the CPU an interrupted and resumed run ends in the same bits as an uninterrupted one: the batches are a function of
(seed, step), and a checkpoint holds weights, optimizer and random state. Evaluations and pictures draw no random
number from that state.

Started by `torchrun`, the processes share every batch: at an equal global batch the losses are those of one process up
to the order of summation. The first process alone writes.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from vqkernels.models import VQVAE, Prior
from vqkernels.training.acceleration import Speed, SpeedConfig
from vqkernels.training.checkpoint import ImageFormat, RunDirectory
from vqkernels.training.config import RunConfig
from vqkernels.training.data import ImageData, load_images
from vqkernels.training.distributed import Ranks, joined
from vqkernels.training.errors import UserError
from vqkernels.training.model_building import build_prior, build_vqvae, check_backend, pick_device
from vqkernels.training.stage_training import Session, StageTraining
from vqkernels.training.stages import PriorStage, TrainingStage, VQVAEStage

# What a resumed run may change; the data may move, but its images must be the same.
FREE = {
    "data",
    "device",
    "backend",
    "parallel",
    "log_every",
    "checkpoint_every",
    "picture_every",
    "vqvae.steps",
    "prior.steps",
    *(f"speed.{field.name}" for field in dataclasses.fields(SpeedConfig)),
}


class Trained(NamedTuple):
    """What `train` leaves behind, with the models in eval mode."""

    vqvae: VQVAE
    prior: Prior | None  # None until the prior's stage has begun
    data: ImageData
    finished: bool  # False: stopped early


def train(
    config: RunConfig,
    out: Path,
    *,
    stage: Literal["vqvae", "prior", "all"] = "all",
    resume: bool = False,
    progress: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
) -> Trained:
    """Run the stages of a run, or the rest of them.

    Args:
        config: see `RunConfig`. A resumed run must agree with it in all but lengths, intervals and places.
        out: the run directory, see `checkpoint`; it is not touched before data and configuration are checked.
        stage: `vqvae` stops after the VQ-VAE; `prior` needs a run whose VQ-VAE is finished.
        resume: continue the run in `out`.
        progress: show a progress bar on a terminal, and a line at each checkpoint.
        should_stop: asked after every step; True writes a checkpoint and ends the training there.

    Raises:
        UserError: the configuration, the data or the directory is wrong.
        Diverged: the loss or a weight is no longer finite; the batch that caused it is saved.
        DiskFull: a checkpoint could not be written; the one before is whole.
    """
    with joined(pick_device(config.device)) as ranks:
        return _train(config, out, stage, resume, progress, should_stop, ranks)


def _train(
    config: RunConfig,
    out: Path,
    stage: str,
    resume: bool,
    progress: bool,
    should_stop: Callable[[], bool],
    ranks: Ranks,
) -> Trained:
    device = ranks.device

    def look() -> tuple[RunDirectory, ImageData]:
        config.check()
        run = RunDirectory(out, resume=resume)
        if stage == "prior" and not resume:
            raise UserError("the prior is trained on a finished VQ-VAE: give its run directory, and --resume")
        check_backend(config.backend, device)
        Speed(config.speed, device)  # refuses what this machine cannot do
        return run, _load(config)

    looked = ranks.on_first(look)
    data = _load(config) if looked is None else looked[1]
    images = ImageFormat(data.channels, *data.size, data.class_names)
    torch.manual_seed(config.seed)
    vqvae = build_vqvae(config, images, device)

    def begin() -> tuple[RunDirectory, dict[str, Any] | None]:
        assert looked is not None
        run = looked[0]
        run.acquire()
        try:
            state = run.load_state() if resume else None
            if state is not None:
                _check_resumable(state, config, data, out, stage)
                run.export(state, images)
            elif stage == "prior":
                raise UserError(f"the VQ-VAE of {out} has no checkpoint yet; train it with --stage vqvae or all")
            run.begin(config)
        except BaseException:
            run.release()
            raise
        return run, state

    begun = ranks.on_first(begin)
    if begun is None:  # the directory is a run now; this process reads it and never writes
        run = RunDirectory(out, resume=True)
        state = run.load_state() if resume else None
    else:
        run, state = begun
    try:
        session = Session(run, config, data, vqvae, state, progress and ranks.first, should_stop, ranks)
        finished, prior = True, None
        if state is not None:
            vqvae.load_state_dict(state["vqvae"])
        if stage != "prior" and (state is None or state["stage"] == "vqvae"):
            finished = StageTraining(session, VQVAEStage(vqvae, config.vqvae, data, device)).run()
        if finished and stage != "vqvae":
            torch.manual_seed(config.seed + 1)  # whatever the first stage drew
            prior = build_prior(config, images, vqvae, device)
            stage_of_prior = PriorStage(prior, vqvae, config.prior, data, device, config.seed)
            finished = StageTraining(session, stage_of_prior).run()
            prior.eval()
        return Trained(vqvae.eval(), prior, data, finished)
    finally:
        if ranks.first:
            run.release()


def train_stage(
    stage: TrainingStage,
    config: RunConfig,
    data: ImageData,
    out: Path,
    *,
    resume: bool = False,
    progress: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
) -> bool:
    """Train another model than those of `train`, in one process and its own run directory; False if stopped.

    Args:
        stage: the model and its training; its name differs from those of `train`.
        config, data: what the stage was made from.
        out, resume, progress, should_stop: as in `train`.

    Raises:
        UserError: as in `train`.
    """
    config.check()
    run = RunDirectory(out, resume=resume)
    run.acquire()
    try:
        state = run.load_state() if resume else None
        if state is not None:
            _check_resumable(state, config, data, out, stage.name)
        run.begin(config)
        ranks = Ranks(0, 1, pick_device(config.device))
        session = Session(run, config, data, nn.Module(), state, progress, should_stop, ranks)
        finished = StageTraining(session, stage).run()
        stage.model.eval()
        return finished
    finally:
        run.release()


def _load(config: RunConfig) -> ImageData:
    return load_images(config.data, color=config.color, held_out=config.held_out, seed=config.seed)


def _check_resumable(state: dict[str, Any], config: RunConfig, data: ImageData, out: Path, stage: str) -> None:
    """Raise UserError unless the state of a checkpoint can be continued under this configuration."""
    before = RunConfig.from_toml(state["config"], str(out))
    prior_begun = state["stage"] == "prior"
    changed = [
        name
        for name in config.differences(before)
        if (name not in FREE and (prior_begun or not name.startswith("prior.")))
        or (prior_begun and name == "vqvae.steps")
    ]
    if changed:
        both = [f"{name} ({before.value(name)}, now {config.value(name)})" for name in changed]
        raise UserError(f"the run {out} was begun with another {' and '.join(both)}; a resumed run cannot change it")
    if state["data"] != data.fingerprint():
        raise UserError(f"the images of {config.data} are not those that the run {out} was begun with")
    if stage == "vqvae" and prior_begun:
        raise UserError(f"the VQ-VAE of {out} is frozen, for its prior is being trained; use --stage prior or all")
    if stage == "prior" and not prior_begun and state["step"] < config.vqvae.steps:
        raise UserError(
            f"the VQ-VAE of {out} has done {state['step']} of its {config.vqvae.steps} steps; "
            "finish it with --stage vqvae, or lower --vqvae.steps"
        )
