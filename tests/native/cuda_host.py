"""The CUDA search of csrc/cuda on CPU tensors, through the executor: shapes as the kernels take them, head by head."""

import ctypes
import functools
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from native.build import build_host_library

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
METRICS = ("euclidean", "dot", "cosine")
_LONG = ctypes.c_int64


class Rows(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("dtype", ctypes.c_int)] + [
        (name, _LONG)
        for name in ("batch", "heads", "positions", "channels", "batch_s", "head_s", "position_s", "channel_s")
    ]


class PerRow(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("batch_s", _LONG), ("head_s", _LONG), ("position_s", _LONG)]


class Codes(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("dtype", ctypes.c_int)] + [
        (name, _LONG) for name in ("head_s", "code_s", "channel_s")
    ]


class Problem(ctypes.Structure):
    _fields_ = [
        ("z", Rows), ("codebook", Codes), ("mask", PerRow),
        ("codes", _LONG), ("metric", ctypes.c_int), ("certified", ctypes.c_int),
    ]  # fmt: skip


class Output(ctypes.Structure):
    _fields_ = [("indices", PerRow), ("quantized", Rows), ("squared_error", ctypes.c_void_p)]


class Found(NamedTuple):
    indices: torch.Tensor  # (B, H, P)
    decided: int
    launches: int
    splits: int
    quantized: torch.Tensor | None = None  # like z
    squared_error: float | None = None


@functools.cache
def library() -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(build_host_library("cuda_nearest", Path(tempfile.mkdtemp()))))
    loaded.cuda_nearest_workspace.restype = _LONG
    return loaded


def rows_of(x: torch.Tensor) -> Rows:
    """x (B, H, P, D) by its strides."""
    batch, heads, positions, channels = x.shape
    return Rows(x.data_ptr(), TYPES[x.dtype], batch, heads, positions, channels, *x.stride())


def problem_of(z, codebook, mask=None, metric="euclidean", certified=True) -> Problem:
    """z (B, H, P, D), codebook (H, K, D), mask (B, H, P) bool or None."""
    codes = Codes(codebook.data_ptr(), TYPES[codebook.dtype], *codebook.stride())
    per_row = PerRow() if mask is None else PerRow(mask.data_ptr(), *mask.stride())
    return Problem(rows_of(z), codes, per_row, codebook.shape[1], METRICS.index(metric), int(certified))


def workspace_bytes(problem: Problem, processors: int) -> int:
    """What the call would borrow, or -1 where its sizes are refused."""
    return library().cuda_nearest_workspace(ctypes.byref(problem), processors)


def nearest(
    z, codebook, mask=None, *, metric="euclidean", certified=True, quantize=False, separate=False, processors=1, seed=0
) -> Found:
    """Raises RuntimeError with the executor's sentence where threads are not ordered."""
    problem = problem_of(z, codebook, mask, metric, certified)
    size = workspace_bytes(problem, processors)
    workspace = torch.full((size + 256,), 0xFF, dtype=torch.uint8)  # NaN and -1 wherever nothing is written
    base = (workspace.data_ptr() + 255) // 256 * 256
    indices = torch.full(z.shape[:3], -7, dtype=torch.int64)
    quantized = torch.empty_like(z).fill_(float("nan")) if quantize else None
    error, decided, splits = torch.full((), torch.nan, dtype=torch.float64), _LONG(-1), ctypes.c_int()
    out = Output(
        PerRow(indices.data_ptr(), *indices.stride()),
        Rows() if quantized is None else rows_of(quantized),
        error.data_ptr(),
    )
    complaint = ctypes.create_string_buffer(400)
    launches = library().cuda_nearest(
        ctypes.byref(problem), ctypes.byref(out), ctypes.byref(decided), processors, int(separate), seed,
        ctypes.c_void_p(base), ctypes.byref(splits), complaint, len(complaint),
    )  # fmt: skip
    if launches < 0:
        raise RuntimeError(complaint.value.decode())
    return Found(indices, decided.value, launches, splits.value, quantized, float(error) if quantize else None)
