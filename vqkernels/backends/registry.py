"""Chooses the backend that computes an operation, and explains the choice.

The choice is made in Python from plain module variables, so `torch.compile` guards on it. A named backend is taken or
refused; only "auto" chooses, and it warns once when it has to take the fallback where a kernel was expected: where it
is unavailable, or on a GPU where it was never verified.
"""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from . import cpu, cuda, gpu, triton, verified
from .cuda.registration import SERVED as CUDA_OPERATORS
from .triton import registration

NAMES = ("auto", "cpu", "triton", "cuda", "eager")

_cpu_problem: str | None = cpu.load()
_triton_kernels = registration.register() if triton.problem() is None else None  # alive as long as the operators are
_override: str = os.environ.get("VQKERNELS_BACKEND", "auto")
_warned: set[str] = set()


def _check(name: str) -> str:
    if name not in NAMES:
        raise ValueError(f"backend must be one of {', '.join(NAMES)}, got {name!r}")
    return name


def resolve(backend: str, device: torch.device | str, operator: str | None = None) -> str:
    """The backend for tensors on `device`: "cpu", "triton", "cuda" or "eager". An explicit request never falls back.

    `operator` names what is to be computed: the CUDA kernels do not cover every operator.
    """
    _check(backend)
    if isinstance(device, str):
        device = torch.device(device)
    if backend == "auto":
        backend = _check(_override)
    if backend == "auto":
        return _automatic(device, operator)
    if backend == "cpu":
        if device.type != "cpu":
            raise RuntimeError(f'backend "cpu" computes CPU tensors, got a tensor on {device.type}')
        if _cpu_problem is not None:
            raise RuntimeError(f'backend "cpu" is unavailable: {_cpu_problem}')
    if backend == "triton":
        if device.type != "cuda":
            raise RuntimeError(f'backend "triton" computes CUDA tensors, got a tensor on {device.type}')
        if problem := gpu.state(device.index)[0]:
            raise RuntimeError(f'backend "triton" is unavailable: {problem}')
    if backend == "cuda":
        if device.type != "cuda":
            raise RuntimeError(f'backend "cuda" computes CUDA tensors, got a tensor on {device.type}')
        if problem := gpu.cuda_state(device.index)[0]:
            raise RuntimeError(f'backend "cuda" is unavailable: {problem}')
        if operator is not None and operator not in CUDA_OPERATORS:
            kernels = ", ".join(sorted(CUDA_OPERATORS))
            raise RuntimeError(f'backend "cuda" has no kernel for "{operator}"; it has {kernels}')
    return backend


def _automatic(device: torch.device, operator: str | None) -> str:
    """The fastest backend that is available and verified."""
    if device.type == "cpu":
        if _cpu_problem is None:
            return "cpu"
        _warn_once(f"vqkernels: the C++ kernels are unavailable ({_cpu_problem}); using the slower eager backend")
    if device.type == "cuda":
        problem, doubt = gpu.state(device.index)
        if not problem and not doubt:
            return "triton"
        own_problem, own_doubt = gpu.cuda_state(device.index) if operator in CUDA_OPERATORS else ("no kernel", "")
        if not own_problem and not own_doubt:
            return "cuda"
        if problem and not own_problem:
            until = "using the slower eager backend until `vqkernels verify --backend cuda` has proved them"
            _warn_once(f"vqkernels: the Triton kernels are unavailable ({problem}), and {own_doubt}; {until}")
        elif problem:
            _warn_once(f"vqkernels: the Triton kernels are unavailable ({problem}); using the slower eager backend")
        else:
            _warn_once(f"vqkernels: {doubt}; using the slower eager backend until `vqkernels verify` has proved them")
    return "eager"


def _warn_once(message: str) -> None:
    if not torch.compiler.is_compiling() and message not in _warned:
        _warned.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=2)


def available(device: torch.device | str, operator: str | None = None) -> list[str]:
    """Every backend that can compute an operator, or all of them, on `device`, best first, verified or not."""
    device = torch.device(device)
    found = []
    if device.type == "cpu" and _cpu_problem is None:
        found.append("cpu")
    if device.type == "cuda" and not gpu.state(device.index)[0]:
        found.append("triton")
    if device.type == "cuda" and operator in CUDA_OPERATORS and not gpu.cuda_state(device.index)[0]:
        found.append("cuda")
    return [*found, "eager"]


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within this context `backend="auto"` means `name`. Overrides the environment variable VQKERNELS_BACKEND."""
    global _override
    previous, _override = _override, _check(name)
    try:
        yield
    finally:
        _override = previous


def report() -> list[tuple[str, str]]:
    """What serves on this machine, as (label, text) lines for `vqkernels info`."""
    facts = cpu.build_facts()
    levels = cpu.simd_levels()
    lines = [
        ("torch", torch.__version__),
        ("backend cpu", f"C++ kernels, {' '.join(levels)}" if _cpu_problem is None else f"unavailable: {_cpu_problem}"),
        ("SIMD level", os.environ.get("VQKERNELS_SIMD") or (levels[-1] if levels else "none")),
        *_triton_report(),
        *_cuda_report(),
        ("backend eager", "PyTorch operations, any device, same indices"),
        ("auto on a CPU", "cpu" if _cpu_problem is None else "eager"),
        ("auto on a GPU", _automatic_on_gpu()),
        ("override", _override),
        ("threads", str(torch.get_num_threads())),
        ("built against torch", str(facts.get("torch", "not built"))),
    ]
    # The operator library's own failure stands in the line of its backend.
    others = {name: reason for name, reason in facts.get("failures", {}).items() if name != "vqkernels._ops"}
    lines += [(f"build of {name}", f"failed: {reason}") for name, reason in others.items()]
    return lines


def _triton_report() -> list[tuple[str, str]]:
    """The backend, and what is known of each GPU."""
    gpus = gpu.visible()
    problems = {gpu.state(one.number)[0] for one in gpus} or {gpu.state(0)[0]}
    if "" not in problems:
        return [("backend triton", f"unavailable: {'; '.join(sorted(problems))}")]
    lines = [("backend triton", f"Triton {gpu.triton_version()}, kernels {triton.source_hash()}")]
    for one in gpus:
        if gpu.state(one.number)[0]:
            told = "not served: the kernels need sm_80 or newer"
        else:
            by = verified.where(gpu.key(one))
            told = f"verified, says {by}" if by else "not verified: run `vqkernels verify`"
        lines.append((f"GPU {one.number}", f"{one.name}, sm_{one.capability[0]}{one.capability[1]}, {told}"))
    return lines


def _cuda_report() -> list[tuple[str, str]]:
    """The CUDA kernels: what they were built for, and on which GPU they were ever proved."""
    if problem := cuda.problem():
        return [("backend cuda", f"unavailable: {problem}")]
    built = f"{cuda.compiler()} for {', '.join(cuda.architectures())}; {', '.join(sorted(CUDA_OPERATORS))}"
    lines = [("backend cuda", f"{built}; kernels {cuda.source_hash()}")]
    for one in gpu.visible():
        by = verified.where(gpu.cuda_key(one))
        unproved = "not verified: auto does not take it; run `vqkernels verify --backend cuda`"
        told = gpu.cuda_state(one.number)[0] or (f"verified, says {by}" if by else unproved)
        lines.append((f"cuda on GPU {one.number}", told))
    if len(lines) == 1:
        lines.append(
            ("cuda on a GPU", "never proved on a GPU: auto does not take it before `vqkernels verify --backend cuda`")
        )
    return lines


def _automatic_on_gpu() -> str:
    """What "auto" takes on each GPU; one text where they agree."""
    choices = {one.number: _choice(one.number) for one in gpu.visible()} or {0: _choice(0)}
    if len(set(choices.values())) == 1:
        return next(iter(choices.values()))
    return "; ".join(f"GPU {number}: {choice}" for number, choice in choices.items())


def _choice(number: int) -> str:
    problem, doubt = gpu.state(number)
    if not problem and not doubt:
        return "triton"
    serves = "eager" if any(gpu.cuda_state(number)) else "cuda, and eager where it has no kernel"
    return f"{serves}: {problem or doubt}"
