"""The C++ kernels of the CPU: loads the operator library, or says why it is not there."""

import ctypes
import json
from functools import cache
from pathlib import Path

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
    path = library_path()
    if path is None or load() is not None:
        return []
    function = ctypes.CDLL(str(path)).vqkernels_simd_levels
    function.restype = ctypes.c_char_p
    return function().decode().split()
