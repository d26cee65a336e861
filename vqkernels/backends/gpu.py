"""Whether the Triton and the CUDA kernels can serve a GPU of this process, and were verified on its kind.

Each GPU is judged alone, once, when the first tensor on it asks: looking earlier would initialise CUDA in a process
that may yet fork.
"""

import importlib.metadata
from typing import NamedTuple

import torch

from . import cuda, triton, verified


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
    """What a verification of the Triton kernels on this GPU, now, would vouch for."""
    return verified.Key(f"{gpu.capability[0]}.{gpu.capability[1]}", triton.source_hash(), triton_version())


def cuda_key(gpu: Gpu) -> verified.Key:
    """What a verification of the CUDA kernels on this GPU would vouch for."""
    return verified.Key(f"{gpu.capability[0]}.{gpu.capability[1]}", cuda.source_hash(), cuda.compiler())


# by the GPU's number: (why the kernels cannot serve it, or ""; why "auto" must not take them there yet, or "")
_states: dict[int, tuple[str, str]] = {}
_cuda_states: dict[int, tuple[str, str]] = {}


def state(index: int | None) -> tuple[str, str]:
    """(problem, doubt) of the GPU of this number, or of the current one: why the Triton kernels cannot serve it, and
    why they are not trusted on it yet; empty strings where they do."""
    number = _current() if index is None else index
    if number not in _states:
        _states[number] = _judge(number)
    return _states[number]


def cuda_state(index: int | None) -> tuple[str, str]:
    """The same of the CUDA kernels."""
    number = _current() if index is None else index
    if number not in _cuda_states:
        _cuda_states[number] = _judge_cuda(number)
    return _cuda_states[number]


# What torch.compiler.assume_constant_result sets, without its import of the compiler: facts of a process are constants.
state._dynamo_marked_constant = True  # type: ignore[attr-defined]
cuda_state._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _current() -> int:
    return torch.cuda.current_device() if torch.cuda.is_available() else 0


def _judge(number: int) -> tuple[str, str]:
    if reason := triton.problem() or _absence(number):
        return reason, ""
    one = _numbered(number)
    if not triton.supports(one.capability):
        return f"the kernels need sm_80 or newer, got {one}", ""
    if verified.where(key(one)) is None:
        return "", f"the Triton kernels are not verified on {one}, with Triton {triton_version()}"
    return "", ""


def _judge_cuda(number: int) -> tuple[str, str]:
    if reason := cuda.problem() or _absence(number):
        return reason, ""
    one = _numbered(number)
    if not cuda.supports(one.capability):
        return f"the CUDA kernels were built for {', '.join(cuda.architectures())}, got {one}", ""
    if verified.where(cuda_key(one)) is None:
        return "", f"the CUDA kernels are not verified on {one}"
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


def _numbered(number: int) -> Gpu:
    return next(gpu for gpu in visible() if gpu.number == number)
