"""The C++ kernels of the CPU: loads the operator library, or says why it is not there."""

import ctypes
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

_PACKAGE = Path(__file__).resolve().parent.parent


def library_path() -> Path | None:
    """The operator library beside the package, or None where the build made none."""
    return next((path for path in sorted(_PACKAGE.glob("_ops*.so"))), None)


def build_facts() -> dict:
    """What the build recorded: torch, compiler, failures. Empty where nothing was built."""
    path = _PACKAGE / "_build.json"
    return json.loads(path.read_text()) if path.exists() else {}


@cache
def load() -> str | None:
    """Loads the library once, registering its operators. Returns why it is unavailable, or None when it serves."""
    path = library_path()
    if path is None:
        failure = build_facts().get("failures", {}).get("vqkernels._ops")
        return f"the build failed: {failure}" if failure else "the package was built without its C++ kernels"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"the operator library does not load: {error}"
    return None


def simd_levels() -> list[str]:
    """SIMD levels of this CPU that the library holds kernels for, lowest first."""
    names = _c_function("vqkernels_simd_levels", ctypes.c_char_p)
    return names().decode().split() if names else []


def fma_rate(seconds: float) -> float | None:
    """Float32 multiply-add peak of this thread in operations per second, measured for `seconds`; None: no library."""
    rate = _c_function("vqkernels_fma_rate", ctypes.c_double)
    return rate(ctypes.c_double(seconds)) if rate else None


def _c_function(name: str, result: Any) -> Callable[..., Any] | None:
    """A plain C function of the library, which returns `result`; None where the library does not serve."""
    if load() is not None:
        return None
    function = getattr(ctypes.CDLL(str(library_path())), name)
    function.restype = result
    return function
