"""The run directory: what is in it, and how it stays whole whatever happens.

    config.toml         the configuration
    state.pt            everything that resuming needs, weights included; the one truth about how far the run has come
    model.safetensors   the weights exported for use, with configuration and image format in its header
    metrics.jsonl       one line per log step; lines after the last checkpoint are cut off when the run resumes
    events/             TensorBoard
    pictures/           image grids

Every file is written beside its place, synced and moved over the old one, so that a process killed at any moment
leaves the old file or the new one. `state.pt` goes first. Nobody needs both files: resuming reads `state.pt` only and
exports again if the process died between the two; sampling reads `model.safetensors` only, which holds both models.
"""

import errno
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import filelock
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from vqkernels.training.config import FORMAT, RunConfig, read_config
from vqkernels.training.errors import DiskFull, UserError

EXPORT_FORMAT = "vqkernels-model-1"


class ImageFormat(NamedTuple):
    """What the models were trained on."""

    channels: int
    height: int
    width: int
    class_names: tuple[str, ...]  # empty: no classes


class Export(NamedTuple):
    """The content of `model.safetensors`."""

    config: RunConfig
    images: ImageFormat
    stage: str
    step: int
    tensors: dict[str, Tensor]  # names begin with `vqvae.` or `prior.`


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Replace a file by what `write` writes; a reader sees the old content or the new one, never a part.

    Raises:
        DiskFull: the old content is still there.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(f"the disk is full: {path} cannot be written, and is as it was before") from error
        raise
    if os.name == "posix":  # the new name itself must reach the disk too
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


class RunDirectory:
    """The files of one run. Making the object looks at the directory and writes nothing; `begin` makes it.

    Args:
        path: the directory.
        resume: whether a run is expected there.

    Raises:
        UserError: there is a run and resume is False, no run and resume is True, or something else is there.
    """

    def __init__(self, path: Path, *, resume: bool) -> None:
        self.path = path
        self._lock = filelock.FileLock(path / ".lock", blocking=False)
        if path.exists() and not path.is_dir():
            raise UserError(f"{path} is a file, not a run directory")
        found = holds_run(path)
        if not found and path.exists() and any(not entry.name.startswith(".") for entry in path.iterdir()):
            raise UserError(f"{path} is not empty and no run of vqkernels; choose a new directory")
        if found and not resume:
            raise UserError(f"{path} already holds a run; continue it with --resume, or choose a new directory")
        if not found and resume:
            raise UserError(f"there is no run to resume in {path}")

    @property
    def state_file(self) -> Path:
        return self.path / "state.pt"

    @property
    def model_file(self) -> Path:
        return self.path / "model.safetensors"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def events(self) -> Path:
        return self.path / "events"

    @property
    def pictures(self) -> Path:
        return self.path / "pictures"

    def acquire(self) -> None:
        """Make the directory if need be, and keep other processes from writing to it while this one runs.

        Raises:
            UserError: another process holds it, or it cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
        except filelock.Timeout as error:
            raise UserError(f"another process is training in {self.path}") from error
        except OSError as error:
            raise UserError(f"the run directory {self.path} cannot be written: {error.strerror}") from error

    def release(self) -> None:
        self._lock.release()

    def begin(self, config: RunConfig) -> None:
        """Write the configuration, and remove what an interrupted write left behind."""
        for leftover in self.path.glob(".*.tmp"):
            leftover.unlink()
        self.pictures.mkdir(exist_ok=True)
        write_atomically(self.path / "config.toml", lambda file: file.write(config.to_toml().encode()))

    def load_state(self) -> dict[str, Any] | None:
        """The last checkpoint, on the CPU; None if the run was interrupted before its first one.

        Raises:
            UserError: the file is damaged or of another version.
        """
        if not self.state_file.exists():
            return None
        try:
            with zipfile.ZipFile(self.state_file) as archive:  # torch does not look at the checksums
                if archive.testzip() is not None:
                    raise ValueError("a checksum is wrong")
            state = torch.load(self.state_file, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged file fails in any way
            raise UserError(f"the checkpoint {self.state_file} is damaged and cannot be read") from error
        if not isinstance(state, dict) or state.get("format") != FORMAT:
            raise UserError(f"the checkpoint {self.state_file} was not written by this version of vqkernels")
        return state

    def save(self, state: dict[str, Any], images: ImageFormat) -> None:
        """Write `state.pt`, then `model.safetensors`."""
        write_atomically(self.state_file, lambda file: torch.save({"format": FORMAT, **state}, file))
        self.export(state, images)

    def export(self, state: dict[str, Any], images: ImageFormat) -> None:
        """Write `model.safetensors` from a state."""
        tensors = {
            f"{model}.{name}": tensor.detach().cpu().contiguous()
            for model in ("vqvae", "prior")  # the models of other stages are read from state.pt alone
            for name, tensor in state[model].items()
        }
        header = {
            "format": EXPORT_FORMAT,
            "config": state["config"],
            "images": json.dumps(images._asdict()),
            "stage": state["stage"],
            "step": str(state["step"]),
        }
        write_atomically(self.model_file, lambda file: file.write(safetensors_bytes(tensors, header)))


def holds_run(path: Path) -> bool:
    """Whether a run of vqkernels has begun in this directory."""
    config = path / "config.toml"
    try:
        return config.is_file() and f'format = "{FORMAT}"' in config.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return False


def read_run_config(path: Path) -> RunConfig:
    """The configuration in a run directory.

    Raises:
        UserError: there is no run.
    """
    if not holds_run(path):
        raise UserError(f"{path} is not a run directory of vqkernels" if path.exists() else f"{path} does not exist")
    return read_config(path / "config.toml")


def read_export(path: Path) -> Export:
    """Read `model.safetensors` of a run directory.

    Raises:
        UserError: there is no run or no checkpoint yet, or the file is damaged or of another version.
    """
    read_run_config(path)
    file = path / "model.safetensors"
    if not file.exists():
        raise UserError(f"the run {path} has no checkpoint yet")
    try:
        with safe_open(file, framework="pt") as opened:
            header = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} is damaged and cannot be read") from error
    if header.get("format") != EXPORT_FORMAT:
        raise UserError(f"{file} was not written by this version of vqkernels")
    config = RunConfig.from_toml(header.get("config", ""), str(file)).check()
    try:
        images = ImageFormat(**json.loads(header["images"]))
        images = images._replace(class_names=tuple(map(str, images.class_names)))
        stage, step = header["stage"], int(header["step"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"the header of {file} is damaged: {error}") from error
    if any(not isinstance(x, int) or x < 1 for x in images[:3]):
        raise UserError(f"the header of {file} is damaged: images of {images[:3]}")
    return Export(config, images, stage, step, tensors)
