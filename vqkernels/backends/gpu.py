"""Whether the Triton kernels can serve the GPUs of this process, and whether they were verified on them.

Looked up once, when the first GPU tensor asks: looking earlier would initialise CUDA in a process that may yet fork.
All visible GPUs must be served and verified alike; CUDA_VISIBLE_DEVICES hides the others.
"""

import importlib.metadata
from typing import NamedTuple

import torch

from . import triton, verified


class Gpu(NamedTuple):
    """One visible GPU."""

    number: int
    name: str
    capability: tuple[int, int]

    def __str__(self) -> str:
        return f"GPU {self.number}, {self.name}, sm_{self.capability[0]}{self.capability[1]}"


def visible() -> list[Gpu]:
    """The visible CUDA GPUs; initialises CUDA."""
    if not torch.cuda.is_available():
        return []
    count = torch.cuda.device_count()
    return [Gpu(i, torch.cuda.get_device_name(i), torch.cuda.get_device_capability(i)) for i in range(count)]


def triton_version() -> str:
    """The minor version of the installed Triton, "3.6", found without importing it where its metadata tells."""
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:  # a build of Triton under another name
        import triton as package

        version = package.__version__
    return ".".join(version.split(".")[:2])


def key(gpu: Gpu) -> verified.Key:
    """What a verification on this GPU, now, would vouch for."""
    return verified.Key(f"{gpu.capability[0]}.{gpu.capability[1]}", triton.source_hash(), triton_version())


# (why the kernels cannot serve the GPUs, or ""; why "auto" must not take them yet, or ""), once looked up
_state: tuple[str, str] | None = None


def state() -> tuple[str, str]:
    """(problem, doubt): why the kernels cannot serve, and why they are not trusted yet; empty strings where they do."""
    global _state
    if _state is None:
        _state = _problem(), ""
        if not _state[0]:
            _state = "", _doubt()
    return _state


# What torch.compiler.assume_constant_result sets, without its import of the compiler: facts of a process are constants.
state._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _problem() -> str:
    if reason := triton.problem():
        return reason
    if torch.version.hip is not None:
        return "the kernels are for NVIDIA GPUs, and this torch is built for ROCm"
    gpus = visible()
    if not gpus:
        return "torch sees no CUDA GPU"
    old = next((gpu for gpu in gpus if not triton.supports(gpu.capability)), None)
    return f"the kernels need sm_80 or newer, got {old}" if old else ""


def _doubt() -> str:
    unknown = next((gpu for gpu in visible() if verified.where(key(gpu)) is None), None)
    if unknown is None:
        return ""
    return f"the Triton kernels are not verified on {unknown}, with Triton {triton_version()}"
