"""Training loops of frameworks: Lightning's `Trainer` and accelerate's `Accelerator`, on the CPU."""

import logging
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from wrappers.cells import build, finish_step
from wrappers.steps import STEPS, Result, batch, micro_batches, objective, optimizer_of, result, seed_draws


def lightning(cell: str) -> Result:
    """Automatic optimization; micro-batches by `accumulate_grad_batches`."""
    import lightning.pytorch as pl

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    parts = len(micro_batches(cell, batch(0)))
    outputs: list[Tensor] = []

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = build(cell)

        def training_step(self, x: Tensor, number: int) -> Tensor:
            seed_draws(number // parts, number % parts)
            output = self.model(x)
            outputs.extend(value.detach().clone() for value in output)
            return objective(output, x)

        def on_train_batch_end(self, output: Any, x: Tensor, number: int) -> None:
            if (number + 1) % parts == 0:
                finish_step(self.model)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return optimizer_of(self.model)

    module = Module()
    parts_of_all = [part for step in range(STEPS) for part in micro_batches(cell, batch(step))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=1,
            accumulate_grad_batches=parts,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, DataLoader(parts_of_all, batch_size=None))
    return result(module.model, outputs)


def accelerate(cell: str) -> Result:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = build(cell)
    prepared, optimizer = accelerator.prepare(model, optimizer_of(model))
    outputs: list[Tensor] = []
    for step in range(STEPS):
        optimizer.zero_grad()
        parts = micro_batches(cell, batch(step))
        for part, x in enumerate(parts):
            seed_draws(step, part)
            output = prepared(x)
            accelerator.backward(objective(output, x) / len(parts))
            outputs += [value.detach().clone() for value in output]
        optimizer.step()
        finish_step(model)
    return result(accelerator.unwrap_model(prepared), outputs)


FRAMEWORKS = {"Lightning": lightning, "accelerate": accelerate}
