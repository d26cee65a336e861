"""A loss that is no longer finite: its step, and a file that reproduces it.

diverged_STAGE_STEP.safetensors    the batch: `indices`, `pixels`, and `labels` or `codes` where there are any; under
                                   `model.` the weights before the step, if they are finite. The header has the
                                   configuration, stage, step, seed and loss.
"""

from pathlib import Path

import torch
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn

from vqkernels.training.checkpoint import write_atomically
from vqkernels.training.config import RunConfig
from vqkernels.training.errors import DiskFull

FORMAT = "vqkernels-diverged-1"


class LossWatch:
    """Remembers the first loss that was not finite, without waiting for the device."""

    def __init__(self, device: torch.device) -> None:
        self._step = torch.zeros((), dtype=torch.int64, device=device)
        self._loss = torch.zeros((), device=device)

    def see(self, step: int, loss: Tensor) -> None:
        """Look at the loss of a step, counted from 1."""
        found = loss.detach()
        new = ~found.isfinite() & (self._step == 0)
        self._step = torch.where(new, step, self._step)
        self._loss = torch.where(new, found.to(self._loss.dtype), self._loss)

    def first(self) -> tuple[int, float] | None:
        """The step and its loss; waits for the device."""
        step = int(self._step)
        return (step, float(self._loss)) if step else None


def is_finite(model: nn.Module) -> bool:
    """Whether all weights of a model are (of a sharded one, those that this process holds)."""
    return all(bool(_local(x).isfinite().all()) for x in model.parameters())


def save_diverged(
    run: Path,
    config: RunConfig,
    stage: str,
    step: int,
    loss: float,
    batch: dict[str, Tensor],
    weights: dict[str, Tensor],
) -> str:
    """Write the file; returns what to say of it."""
    file = run / f"diverged_{stage}_{step:06d}.safetensors"
    tensors = {name: x.detach().cpu().contiguous() for name, x in batch.items()}
    if all(x.isfinite().all() for x in weights.values()):
        tensors |= {f"model.{name}": x.detach().cpu().contiguous() for name, x in weights.items()}
    header = {"format": FORMAT, "config": config.to_toml(), "stage": stage, "step": str(step), "seed": str(config.seed)}
    content = safetensors_bytes(tensors, {**header, "loss": str(loss)})
    try:
        write_atomically(file, lambda out: out.write(content))
    except DiskFull:
        return "its batch could not be saved, for the disk is full"
    return f"its batch is in {file}"


def _local(x: Tensor) -> Tensor:
    return x.to_local() if hasattr(x, "to_local") else x
