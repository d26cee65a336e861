"""Whether a backend can compute on a device of this process, and whether its kernels were proved on that kind of GPU.

Each GPU is judged alone, once, when the first tensor on it asks: looking earlier would initialise CUDA in a process
that may yet fork.
"""

from typing import Any, NamedTuple

import torch

from . import cpu, cuda, triton, verified
from .table import BACKENDS

PACKAGES: dict[str, Any] = {"triton": triton, "cuda": cuda}  # the backends whose kernels are for GPUs


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


def current() -> int:
    """The number of the current GPU; 0 where there is none."""
    return torch.cuda.current_device() if torch.cuda.is_available() else 0


def key(backend: str, gpu: Gpu) -> verified.Key:
    """What a verification of a backend's kernels on this GPU, now, would vouch for."""
    package = PACKAGES[backend]
    return verified.Key(f"{gpu.capability[0]}.{gpu.capability[1]}", package.source_hash(), package.compiler())


_states: dict[tuple[str, int], tuple[str, str]] = {}  # by backend and the GPU's number


def state(backend: str, index: int | None = None) -> tuple[str, str]:
    """(problem, doubt): why a backend cannot compute on its device, and why it is not trusted there yet; "" for none.

    Of the GPU with this number, or of the current one, where the backend is for GPUs.
    """
    if backend not in PACKAGES:
        return (cpu.load() or "" if backend == "cpu" else ""), ""
    index = current() if index is None else index
    if (backend, index) not in _states:
        _states[backend, index] = _judge(backend, index)
    return _states[backend, index]


def _judge(backend: str, number: int) -> tuple[str, str]:
    package = PACKAGES[backend]
    if reason := package.problem() or _absence(number):
        return reason, ""
    one = next(gpu for gpu in visible() if gpu.number == number)
    if not package.supports(one.capability):
        return f"{package.needs()}, got {one}", ""
    if verified.where(key(backend, one)) is None:
        return "", f"the {BACKENDS[backend].title} are not verified on {one}, with {package.built_by()}"
    return "", ""


def _absence(number: int) -> str:
    """Why there is no such GPU for these kernels, or ""."""
    if torch.version.hip is not None:
        return "the kernels are for NVIDIA GPUs, and this torch is built for ROCm"
    gpus = visible()
    if not gpus:
        return "torch sees no CUDA GPU"
    if all(gpu.number != number for gpu in gpus):
        return f"there is no GPU {number}: torch sees {len(gpus)}"
    return ""
