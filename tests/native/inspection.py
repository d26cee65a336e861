"""The filters of the C++ kernels one by one, through the C functions of csrc/bindings/inspection.cpp."""

import ctypes
from typing import Any

import numpy as np

from vqkernels.backends import cpu


def _call(name: str, *arguments: Any) -> int:
    """Calls a function of the library; arrays pass as pointers to their first element."""
    function = getattr(ctypes.CDLL(str(cpu.library_path())), f"vqkernels_{name}")
    function.restype = ctypes.c_int64
    return function(
        *(x.ctypes.data_as(ctypes.c_void_p) if isinstance(x, np.ndarray) else ctypes.c_int64(x) for x in arguments)
    )


def _inputs(rows: np.ndarray, codebook: np.ndarray) -> tuple[np.ndarray, int, np.ndarray, int, int]:
    rows, codebook = (np.ascontiguousarray(x, np.float32) for x in (rows, codebook))
    return rows, len(rows), codebook, *codebook.shape


def exponential(x: np.ndarray) -> np.ndarray:
    """2^x in float32, as the entropy sweeps compute it at the SIMD level in force."""
    x = np.ascontiguousarray(x, np.float32)
    out = np.empty_like(x)
    _call("exponential", x, out, x.size)
    return out


def float_filter(rows: np.ndarray, codebook: np.ndarray) -> dict[str, Any]:
    """Lower bounds (rows, distinct codes), thresholds (rows), codes, centre and scale of the certified filter."""
    n, size, channels = len(rows), *codebook.shape
    bounds, thresholds, codes = np.empty(n * size, np.float32), np.empty(n, np.float32), np.empty(size, np.int64)
    centre, scale = np.empty(channels, np.float32), np.empty(1, np.float32)
    found = _call("filter", *_inputs(rows, codebook), bounds, thresholds, codes, centre, scale)
    return {
        "bounds": bounds[: n * found].reshape(n, found),
        "thresholds": thresholds,
        "codes": codes[:found],
        "centre": centre,
        "scale": scale[0],
    }


def integer_filter(rows: np.ndarray, codebook: np.ndarray) -> dict[str, Any] | None:
    """Scores (rows, codes in use) and limits (rows) of "fine" and, where there is one, "coarse"; None: not in use.

    Also which rows fit and are clear of the codes set aside, the codes in use, and the scale of the fine rows.
    """
    n, size = len(rows), len(codebook)
    passes = [(np.empty(n * size, np.int32), np.empty(n, np.int32)) for _ in range(2)]
    coarse, fits, clear = np.zeros(1, bool), np.empty(n, bool), np.empty(n, bool)
    codes, scale = np.empty(size, np.int64), np.empty(1, np.float64)
    inputs = _inputs(rows, codebook)
    found = _call("integer_filter", *inputs, *passes[0], *passes[1], coarse, fits, clear, codes, scale)
    if found < 0:
        return None
    out: dict[str, Any] = {"fits": fits, "clear": clear, "codes": codes[:found], "scale": float(scale[0])}
    for name, (scores, limits) in zip(["fine", "coarse"][: 1 + coarse[0]], passes, strict=False):
        scores = scores[: n * found].reshape(n, found).astype(np.int64)
        out[name] = {"scores": scores, "limits": limits.astype(np.int64)}
    return out
