"""Metrics of a run: `metrics.jsonl` and TensorBoard, both cut back to the last checkpoint when the run resumes.

A full disk does not end the training here: there is one warning, and the lines wait in memory until there is room.
TensorBoard's events repeat what is in `metrics.jsonl` and the pictures; once they cannot be written, they end.
"""

import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


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
        self._name, self._waiting, self._warned = file, b"", False
        self._file = open(file, "ab", buffering=0)
        if self._file.tell() > length:
            self._file.truncate(length)
        self._writer: SummaryWriter | None = None
        try:
            self._writer = SummaryWriter(str(events / stage), purge_step=step + 1)
        except OSError as error:
            self._end_events(error)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        line = json.dumps({"stage": self.stage, "step": step, **values})
        self._waiting += line.encode() + b"\n"
        self._write_waiting()
        for name, value in values.items():
            self._record(lambda writer: writer.add_scalar(name, value, step))  # noqa: B023

    def picture(self, step: int, name: str, grid: Tensor) -> None:
        """Add an image grid (C, H, W) uint8 to TensorBoard."""
        self._record(lambda writer: writer.add_image(name, grid, step))

    def sync(self) -> int:
        """Bring everything to the disk; returns the length of the file in bytes, without lines that still wait."""
        self._write_waiting()
        self._try(lambda: os.fsync(self._file.fileno()))
        self._record(lambda writer: writer.flush())
        return os.fstat(self._file.fileno()).st_size

    def close(self) -> None:
        self._write_waiting()
        self._file.close()
        self._record(lambda writer: writer.close())

    def _write_waiting(self) -> None:
        """As much as the disk takes; the rest of a line follows when there is room."""

        def write() -> None:
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]

        self._try(write)

    def _try(self, action: Callable[[], object]) -> None:
        try:
            action()
        except OSError as error:
            if not self._warned:
                _warn(f"{self._name} cannot be written ({error.strerror}); training goes on, and its lines wait")
            self._warned = True

    def _record(self, action: Callable[[SummaryWriter], object]) -> None:
        if self._writer is not None:
            try:
                action(self._writer)
            except OSError as error:
                self._end_events(error)

    def _end_events(self, error: OSError) -> None:
        self._writer = None
        _warn(f"TensorBoard's events of the {self.stage} cannot be written ({error.strerror}) and end here")


def _warn(message: str) -> None:
    tqdm.write(f"warning: {message}", file=sys.stderr)
