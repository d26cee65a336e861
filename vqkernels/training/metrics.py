"""Metrics of a run: `metrics.jsonl` and TensorBoard, both cut back to the last checkpoint when the run resumes."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter


class MetricsLog:
    """Writes the metrics of one stage.

    Args:
        file: `metrics.jsonl`, shared by all stages.
        events: folder of the TensorBoard events; each stage has its own below it, with its own steps.
        stage: name of the stage.
        step: steps already done; events after it are hidden from TensorBoard.
        length: bytes of the file that belong to the run; what follows is cut off.
    """

    def __init__(self, file: Path, events: Path, stage: str, *, step: int, length: int) -> None:
        self.stage = stage
        self._file = open(file, "ab")
        if self._file.tell() > length:
            self._file.truncate(length)
        self._writer = SummaryWriter(str(events / stage), purge_step=step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        line = json.dumps({"stage": self.stage, "step": step, **values})
        self._file.write(line.encode() + b"\n")
        self._file.flush()
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def picture(self, step: int, name: str, grid: Tensor) -> None:
        """Add an image grid (C, H, W) uint8 to TensorBoard."""
        self._writer.add_image(name, grid, step)

    def sync(self) -> int:
        """Bring everything to the disk; returns the length of the file in bytes."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._writer.flush()
        return self._file.tell()

    def close(self) -> None:
        self._file.close()
        self._writer.close()
