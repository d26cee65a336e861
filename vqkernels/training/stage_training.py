"""Trains one stage of a run: its steps, and the metrics, evaluations, pictures and checkpoints that follow them."""

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from vqkernels.training.acceleration import Speed
from vqkernels.training.batches import Batches
from vqkernels.training.checkpoint import ImageFormat, RunDirectory
from vqkernels.training.config import RunConfig
from vqkernels.training.data import ImageData
from vqkernels.training.distributed import Ranks
from vqkernels.training.divergence import LossWatch, is_finite, save_diverged
from vqkernels.training.errors import DiskFull, Diverged
from vqkernels.training.metrics import MetricsLog
from vqkernels.training.pictures import save_png
from vqkernels.training.sharding import is_sharded, whole_optimizer, whole_weights
from vqkernels.training.stages import TrainingStage


@dataclass
class Session:
    """What the stages of a run share."""

    run: RunDirectory
    config: RunConfig
    data: ImageData
    vqvae: nn.Module
    state: dict[str, Any] | None  # of the last checkpoint
    progress: bool
    should_stop: Callable[[], bool]
    ranks: Ranks

    @property
    def images(self) -> ImageFormat:
        return ImageFormat(self.data.channels, *self.data.size, self.data.class_names)


class Due(NamedTuple):
    """What follows a step."""

    log: bool
    checkpoint: bool
    evaluation: bool
    pictures: bool

    @classmethod
    def after(cls, step: int, steps: int, config: RunConfig, stopped: bool) -> "Due":
        """After `step` of `steps`, of which the last one and one that was stopped are always kept."""
        last = step == steps
        checkpoint = last or stopped or step % config.checkpoint_every == 0
        return cls(
            log=last or step % config.log_every == 0,
            checkpoint=checkpoint,
            evaluation=checkpoint and (last or not stopped),
            pictures=last or step % config.picture_every == 0,
        )


class Rate:
    """Images per second since it was last read."""

    def __init__(self) -> None:
        self.images, self._since = 0, time.perf_counter()

    def read(self) -> float:
        now = time.perf_counter()
        rate = self.images / (now - self._since)
        self.images, self._since = 0, now
        return rate


class StageTraining:
    """A stage in training, from the last checkpoint or the start."""

    def __init__(self, session: Session, stage: TrainingStage) -> None:
        self.session, self.stage, self.config, self.ranks = session, stage, session.config, session.ranks
        self.device = self.ranks.device
        self.speed = Speed(self.config.speed, self.device, stage.name)
        if self.ranks.number > 1:  # as many streams of random numbers as processes
            torch.manual_seed(torch.initial_seed() + 1000 * self.ranks.rank)
        state = session.state if session.state is not None and session.state["stage"] == stage.name else None
        self.step = 0 if state is None else state["step"]
        if state is not None:
            stage.model.load_state_dict(state[stage.name])
        stage.model.train()
        self.trained = self.ranks.wrap(stage.model, self.config.parallel)
        stage.forward = self.speed.forward(self.trained)
        self.optimizer = self.speed.optimizer(self.trained.parameters(), stage.config.learning_rate)
        if state is not None:
            self.speed.load(self.optimizer, state)
            if self.ranks.rank < len(state["random"]):
                _set_random_state(state["random"][self.ranks.rank], self.device)
        self.batches = Batches(len(session.data.train), stage.config.batch_size, self.config.seed)
        self.watch = LossWatch(self.device)
        self.log: MetricsLog | None = None  # the first process writes one
        if self.ranks.first:
            length = 0 if session.state is None else session.state["metrics_length"]
            run = session.run
            self.log = MetricsLog(run.metrics_file, run.events, stage.name, step=self.step, length=length)
        self.rate = Rate()

    def run(self) -> bool:
        """Take the steps that are left; False if stopped."""
        steps, stopped = self.stage.config.steps, False
        self.bar = tqdm(
            total=steps,
            initial=self.step,
            desc=self.stage.name,
            unit="step",
            disable=None if self.session.progress else True,
            leave=False,
        )
        try:
            while self.step < steps and not stopped:
                metrics = self._learn()
                self.bar.update()
                stopped = self.ranks.any(self.session.should_stop())
                self._follow(Due.after(self.step, steps, self.config, stopped), metrics)
        finally:
            self.bar.close()
            if self.log is not None:
                self.log.close()
            self.stage.forward = self.stage.model.to(self.device)
        return not stopped

    def _learn(self) -> dict[str, Tensor]:
        """One step; returns its loss and metrics, 0-d tensors."""
        config, indices = self.stage.config, self.batches.indices(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate * _schedule(config.schedule, self.step, config.steps)
        self.speed.begin_step()
        with self.speed.autocast():
            loss, metrics = self.stage.loss(self.ranks.share(indices))
        self.watch.see(self.step + 1, loss)
        if self.device.type == "cpu" and self.ranks.number == 1:  # elsewhere the host would wait for the device
            self._check_finite()
        self.speed.learn(loss, self.optimizer)
        self.step += 1
        self.rate.images += len(indices)
        return {"loss": loss.detach(), **metrics}

    def _follow(self, due: Due, metrics: dict[str, Tensor]) -> None:
        """Do what is due after a step."""
        if due.log or due.checkpoint:
            values = self.ranks.mean({name: float(value) for name, value in metrics.items()})
            self._check_finite(weights=due.checkpoint)
            if due.log and self.log is not None:
                rate = self.rate.read()
                self.log.write(self.step, {**values, "images_per_second": round(rate, 1)})
                self.bar.set_postfix_str(_summary({**values, "images/s": rate}))
        if due.checkpoint or due.pictures:
            self._collect()
        if due.evaluation and self.log is not None:
            self._evaluate(self.log)
        if due.pictures and self.log is not None:
            self._draw(self.log)
        if due.checkpoint:
            self._save()
        if is_sharded(self.trained):
            self.stage.model.cpu()

    def _collect(self) -> None:
        """Gather the parts that the processes hold into the whole model."""
        if is_sharded(self.trained):
            self.stage.model.load_state_dict(whole_weights(self.trained))
            self.stage.model.to(self.device)

    def _evaluate(self, log: MetricsLog) -> None:
        values = self.stage.evaluate()
        if values:
            log.write(self.step, values)
            if self.session.progress:
                name, steps = self.stage.name, self.stage.config.steps
                tqdm.write(f"{name} step {self.step}/{steps}: {_summary(values)}", file=sys.stderr)

    def _draw(self, log: MetricsLog) -> None:
        for name, grid in self.stage.pictures().items():
            try:
                save_png(grid, self.session.run.pictures / f"{name}_{self.step:06d}.png")
            except DiskFull as error:  # the checkpoint that follows matters more
                tqdm.write(f"warning: {error}; training goes on", file=sys.stderr)
            log.picture(self.step, name, grid)

    def _save(self) -> None:
        """Write a checkpoint."""
        session, stage = self.session, self.stage
        random = self.ranks.gather(_random_state(self.device))
        state = {
            "config": self.config.to_toml(),
            "data": session.data.fingerprint(),
            "stage": stage.name,
            "step": self.step,
            "vqvae": session.vqvae.state_dict(),
            "prior": {},
            stage.name: stage.model.state_dict(),
            "optimizer": whole_optimizer(self.optimizer),
            "scaler": self.speed.scaler.state_dict(),
            "random": random,
            "metrics_length": 0 if self.log is None else self.log.sync(),
        }
        session.state = state
        self.ranks.on_first(lambda: session.run.save(state, session.images))

    def _check_finite(self, *, weights: bool = False) -> None:
        """Raise Diverged if a loss was not finite, or (when asked) a weight is not: no such checkpoint is written."""
        seen = self.watch.first()
        first = None if seen is None else (seen[0], "loss", seen[1])
        if first is None and weights and not is_finite(self.trained):
            first = self.step, "weight", math.nan
        if not self.ranks.any(first is not None):
            return
        step, what, value = min(found for found in self.ranks.gather(first) if found is not None)
        self._collect()
        self.ranks.on_first(lambda: self._report_divergence(step, what, value))

    def _report_divergence(self, step: int, what: str, value: float) -> None:
        name, state = self.stage.name, self.session.state
        batch, weights = self._batch(self.batches.indices(step - 1)), self.stage.model.state_dict()
        saved = save_diverged(self.session.run.path, self.config, name, step, value, batch, weights)
        kept = "there is no checkpoint yet"
        if state is not None:
            kept = f"the last checkpoint ({state['stage']} step {state['step']}) is untouched"
        raise Diverged(
            f"{'the' if what == 'loss' else 'a'} {what} of the {name} is {value} at step {step}; {saved}, "
            f"and {kept}; try a lower learning rate in a new run"
        )

    def _batch(self, indices: Tensor) -> dict[str, Tensor]:
        images, codes = self.session.data.train.select(indices), getattr(self.stage, "train_codes", None)
        named = {"pixels": images.pixels, "labels": images.labels, "codes": None if codes is None else codes[indices]}
        return {"indices": indices, **{name: x for name, x in named.items() if x is not None}}


def _schedule(kind: str, step: int, steps: int) -> float:
    return 1.0 if kind == "constant" else 0.5 * (1 + math.cos(math.pi * step / steps))


def _random_state(device: torch.device) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    return {**state, "cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else state


def _set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def _summary(values: dict[str, float]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in values.items())
