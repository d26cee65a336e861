"""Chooses the backend that computes an operation, and explains the choice.

The choice is made in Python from plain module variables, so `torch.compile` guards on it. A named backend is taken or
refused; only "auto" chooses, and it warns once when it has to take the fallback where a kernel was expected.
"""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from . import cpu

NAMES = ("auto", "cpu", "eager")

_cpu_problem: str | None = cpu.load()
_override: str = os.environ.get("VQKERNELS_BACKEND", "auto")
_warned: set[str] = set()


def _check(name: str) -> str:
    if name not in NAMES:
        raise ValueError(f"backend must be one of {', '.join(NAMES)}, got {name!r}")
    return name


def resolve(backend: str, device_type: str) -> str:
    """The backend for tensors on `device_type`: "cpu" or "eager". An explicit request never falls back."""
    _check(backend)
    if backend == "auto":
        backend = _check(_override)
    if backend == "auto":
        if device_type == "cpu" and _cpu_problem is None:
            return "cpu"
        if device_type == "cpu":
            _warn_once(f"vqkernels: the C++ kernels are unavailable ({_cpu_problem}); using the slower eager backend")
        return "eager"
    if backend == "cpu":
        if device_type != "cpu":
            raise RuntimeError(f'backend "cpu" computes CPU tensors, got a tensor on {device_type}')
        if _cpu_problem is not None:
            raise RuntimeError(f'backend "cpu" is unavailable: {_cpu_problem}')
    return backend


def _warn_once(message: str) -> None:
    if not torch.compiler.is_compiling() and message not in _warned:
        _warned.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=2)


def available(device_type: str) -> list[str]:
    """Every backend that can compute tensors on `device_type`, best first."""
    return ["cpu", "eager"] if device_type == "cpu" and _cpu_problem is None else ["eager"]


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
        ("backend eager", "PyTorch operations, any device, same indices"),
        ("auto on a CPU", "cpu" if _cpu_problem is None else "eager"),
        ("auto on other devices", "eager: no GPU kernel is installed"),
        ("override", _override),
        ("threads", str(torch.get_num_threads())),
        ("built against torch", str(facts.get("torch", "not built"))),
    ]
    # The operator library's own failure stands in the line of its backend.
    others = {name: reason for name, reason in facts.get("failures", {}).items() if name != "vqkernels._ops"}
    lines += [(f"build of {name}", f"failed: {reason}") for name, reason in others.items()]
    return lines
