"""Trains the VQ-VAE, then the prior on its frozen codes, in a run directory that can be resumed at any time.

On the CPU an interrupted and resumed run ends in the same bits as an uninterrupted one: the batches are a function of
(seed, step), and a checkpoint holds weights, optimizer and random state. Evaluations and pictures draw no random
number from that state.

Started by `torchrun`, the processes share every batch: at an equal global batch the losses are those of one process up
to the order of summation. The first process alone writes.
"""

import dataclasses
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from tqdm import tqdm

from vqkernels.models import VQVAE, Prior
from vqkernels.training.batches import Batches
from vqkernels.training.build import build_prior, build_vqvae, check_backend, pick_device
from vqkernels.training.checkpoint import ImageFormat, RunDirectory
from vqkernels.training.config import RunConfig
from vqkernels.training.data import ImageData, load_images
from vqkernels.training.divergence import LossWatch, is_finite, save_diverged
from vqkernels.training.errors import DiskFull, Diverged, UserError
from vqkernels.training.metrics import MetricsLog
from vqkernels.training.pictures import save_png
from vqkernels.training.ranks import Ranks, joined
from vqkernels.training.sharding import is_sharded, whole_optimizer, whole_weights
from vqkernels.training.speed import Speed, SpeedConfig
from vqkernels.training.stages import PriorStage, TrainingStage, VQVAEStage

# what may be changed when a run is resumed; the data may move, but its images must be the same
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
    """Run the stages of a run, or what is left of them.

    Args:
        config: see `RunConfig`. A resumed run must agree with it in all but lengths, intervals and places.
        out: the run directory, see `checkpoint`; it is not touched before data and configuration are found good.
        stage: `vqvae` stops after the VQ-VAE; `prior` needs a run whose VQ-VAE is finished.
        resume: continue the run in `out`.
        progress: show a progress bar on a terminal, and a line at each checkpoint.
        should_stop: asked after every step; True writes a checkpoint and ends the training there.

    Raises:
        UserError: the configuration, the data or the directory is not as it should be.
        Diverged: the loss or a weight is no longer finite; the batch that did it is saved.
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
    if begun is None:  # the directory is a run by now; what is in it is read, never written
        run = RunDirectory(out, resume=True)
        state = run.load_state() if resume else None
    else:
        run, state = begun
    try:
        session = _Session(run, config, data, images, vqvae, state, progress and ranks.first, should_stop, ranks)
        finished, prior = True, None
        if state is not None:
            vqvae.load_state_dict(state["vqvae"])
        if stage != "prior" and (state is None or state["stage"] == "vqvae"):
            finished = session.run_stage(VQVAEStage(vqvae, config.vqvae, data, device))
        if finished and stage != "vqvae":
            torch.manual_seed(config.seed + 1)  # whatever the first stage drew
            prior = build_prior(config, images, vqvae, device)
            finished = session.run_stage(PriorStage(prior, vqvae, config.prior, data, device, config.seed))
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
    """Train a model that is not `train`'s, in one process and a run directory of its own; False if stopped.

    Args:
        stage: the model, and what is asked of it; its name is none of `train`'s.
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
        images = ImageFormat(data.channels, *data.size, data.class_names)
        ranks = Ranks(0, 1, pick_device(config.device))
        session = _Session(run, config, data, images, nn.Module(), state, progress, should_stop, ranks)
        finished = session.run_stage(stage)
        stage.model.eval()
        return finished
    finally:
        run.release()


def _load(config: RunConfig) -> ImageData:
    return load_images(config.data, color=config.color, held_out=config.held_out, seed=config.seed)


class _Session:
    """Training from the last checkpoint (or the start) to the end, or to an interruption."""

    def __init__(
        self,
        run: RunDirectory,
        config: RunConfig,
        data: ImageData,
        images: ImageFormat,
        vqvae: nn.Module,
        state: dict[str, Any] | None,
        progress: bool,
        should_stop: Callable[[], bool],
        ranks: Ranks,
    ) -> None:
        self.run, self.config, self.data, self.images, self.device = run, config, data, images, ranks.device
        self.vqvae, self.state, self.progress, self.should_stop = vqvae, state, progress, should_stop
        self.ranks = ranks

    def run_stage(self, stage: TrainingStage) -> bool:
        """Train what is left of a stage; False if stopped."""
        config, steps = stage.config, stage.config.steps
        speed = Speed(self.config.speed, self.device, stage.name)
        step, state = 0, self.state if self.state is not None and self.state["stage"] == stage.name else None
        if self.ranks.number > 1:  # as many streams of random numbers as processes
            torch.manual_seed(torch.initial_seed() + 1000 * self.ranks.rank)
        if state is not None:
            step = state["step"]
            stage.model.load_state_dict(state[stage.name])
        stage.model.train()
        self.trained = self.ranks.wrap(stage.model, self.config.parallel)
        stage.forward = speed.forward(self.trained)
        optimizer = speed.optimizer(self.trained.parameters(), config.learning_rate)
        if state is not None:
            speed.load(optimizer, state)
            if self.ranks.rank < len(state["random"]):
                _set_random_state(state["random"][self.ranks.rank], self.device)
        batches = Batches(len(self.data.train), config.batch_size, self.config.seed)
        length = 0 if self.state is None else self.state["metrics_length"]
        log = None
        if self.ranks.first:
            log = MetricsLog(self.run.metrics_file, self.run.events, stage.name, step=step, length=length)
        bar = tqdm(
            total=steps,
            initial=step,
            desc=stage.name,
            unit="step",
            disable=None if self.progress else True,
            leave=False,
        )
        stopped, since, images_seen = False, time.perf_counter(), 0
        watch = LossWatch(self.device)
        try:
            while step < steps and not stopped:
                for group in optimizer.param_groups:
                    group["lr"] = config.learning_rate * _schedule(config.schedule, step, steps)
                indices = batches.indices(step)
                speed.begin_step()
                with speed.autocast():
                    loss, metrics = stage.loss(self.ranks.share(indices))
                watch.see(step + 1, loss)
                if self.device.type == "cpu" and self.ranks.number == 1:  # elsewhere asking means to wait
                    self._check_finite(watch, stage, batches, step + 1)
                speed.learn(loss, optimizer)
                step, images_seen = step + 1, images_seen + len(indices)
                bar.update()
                stopped, last = self.ranks.any(self.should_stop()), step == steps
                checkpoint = last or stopped or step % self.config.checkpoint_every == 0
                logged = last or step % self.config.log_every == 0
                if logged or checkpoint:
                    values = {"loss": float(loss.detach()), **{name: float(value) for name, value in metrics.items()}}
                    values = self.ranks.mean(values)
                    self._check_finite(watch, stage, batches, step, weights=checkpoint)
                    if logged and log is not None:
                        now = time.perf_counter()
                        rate, since, images_seen = images_seen / (now - since), now, 0
                        log.write(step, {**values, "images_per_second": round(rate, 1)})
                        bar.set_postfix_str(_summary({**values, "images/s": rate}))
                drawn = last or step % self.config.picture_every == 0
                if checkpoint or drawn:
                    self._collect(stage)
                if checkpoint and (last or not stopped) and log is not None:
                    self._evaluate(stage, step, log)
                if drawn and log is not None:
                    self._draw(stage, step, log)
                if checkpoint:
                    self._save(stage, step, optimizer, speed, log)
                if is_sharded(self.trained):
                    stage.model.cpu()
        finally:
            bar.close()
            if log is not None:
                log.close()
            stage.forward = stage.model.to(self.device)
        return not stopped

    def _collect(self, stage: TrainingStage) -> None:
        """Bring what the processes hold in parts into the whole model, so that it can be looked at."""
        if is_sharded(self.trained):
            stage.model.load_state_dict(whole_weights(self.trained))
            stage.model.to(self.device)

    def _evaluate(self, stage: TrainingStage, step: int, log: MetricsLog) -> None:
        values = stage.evaluate()
        if values:
            log.write(step, values)
            if self.progress:
                tqdm.write(f"{stage.name} step {step}/{stage.config.steps}: {_summary(values)}", file=sys.stderr)

    def _draw(self, stage: TrainingStage, step: int, log: MetricsLog) -> None:
        for name, grid in stage.pictures().items():
            try:
                save_png(grid, self.run.pictures / f"{name}_{step:06d}.png")
            except DiskFull as error:  # a picture is not worth the checkpoint that follows it
                tqdm.write(f"warning: {error}; training goes on", file=sys.stderr)
            log.picture(step, name, grid)

    def _save(
        self,
        stage: TrainingStage,
        step: int,
        optimizer: torch.optim.Optimizer,
        speed: Speed,
        log: MetricsLog | None,
    ) -> None:
        random = self.ranks.gather(_random_state(self.device))
        self.state = {
            "config": self.config.to_toml(),
            "data": self.data.fingerprint(),
            "stage": stage.name,
            "step": step,
            "vqvae": self.vqvae.state_dict(),
            "prior": {},
            stage.name: stage.model.state_dict(),
            "optimizer": whole_optimizer(optimizer),
            "scaler": speed.scaler.state_dict(),
            "random": random,
            "metrics_length": 0 if log is None else log.sync(),
        }
        state = self.state
        self.ranks.on_first(lambda: self.run.save(state, self.images))

    def _check_finite(
        self, watch: LossWatch, stage: TrainingStage, batches: Batches, step: int, *, weights: bool = False
    ) -> None:
        """Raise Diverged if a loss was not finite, or (when asked) a weight is not: no such checkpoint is written."""
        seen = watch.first()
        first = None if seen is None else (seen[0], "loss", seen[1])
        if first is None and weights and not is_finite(self.trained):
            first = step, "weight", math.nan
        if not self.ranks.any(first is not None):
            return
        where, what, value = min(found for found in self.ranks.gather(first) if found is not None)
        self._collect(stage)

        def tell() -> None:
            batch = self._batch(stage, batches.indices(where - 1))
            saved = save_diverged(self.run.path, self.config, stage.name, where, value, batch, stage.model.state_dict())
            kept = "there is no checkpoint yet"
            if self.state is not None:
                kept = f"the last checkpoint ({self.state['stage']} step {self.state['step']}) is untouched"
            raise Diverged(
                f"{'the' if what == 'loss' else 'a'} {what} of the {stage.name} is {value} at step {where}; {saved}, "
                f"and {kept}; try a lower learning rate in a new run"
            )

        self.ranks.on_first(tell)

    def _batch(self, stage: TrainingStage, indices: torch.Tensor) -> dict[str, torch.Tensor]:
        images, codes = self.data.train.select(indices), getattr(stage, "train_codes", None)
        named = {"pixels": images.pixels, "labels": images.labels, "codes": None if codes is None else codes[indices]}
        return {"indices": indices, **{name: x for name, x in named.items() if x is not None}}


def _check_resumable(state: dict[str, Any], config: RunConfig, data: ImageData, out: Path, stage: str) -> None:
    """Raise UserError unless the state can be continued under this configuration."""
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


def _schedule(kind: str, step: int, steps: int) -> float:
    return 1.0 if kind == "constant" else 0.5 * (1 + math.cos(math.pi * step / steps))


def _random_state(device: torch.device) -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    return {**state, "cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else state


def _set_random_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def _summary(values: dict[str, float]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in values.items())
