"""The CUDA search of csrc/cuda on CPU tensors, through the executor: shapes as the kernels take them, head by head."""

import ctypes
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
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


class Operands(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_void_p)
        for name in (
            "rows", "codes", "half_norms", "beta", "norm", "error", "limit", "radius", "spread", "left_out",
            "best", "second", "group", "open", "list", "ticket", "decided", "partial_error",
        )
    ]  # fmt: skip


class Plan(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int)
        for name in (
            "padded", "rows", "padded_rows", "padded_codes", "tiles", "splits", "tiles_per_split",
            "code_parts", "row_parts", "row_lanes", "centred", "row_groups", "fused",
        )
    ]  # fmt: skip


class Packed(NamedTuple):
    """One problem after packing, in float64 numpy: what the candidate pass reads and what the certificate is told."""

    q: np.ndarray  # (N, D')
    p: np.ndarray  # (K', D')
    half: np.ndarray
    beta: np.ndarray
    norm: np.ndarray
    error: np.ndarray
    radius: float
    spread: float
    left_out: bool
    centre: np.ndarray  # (D,)
    exponent: int
    limits: Callable[[np.ndarray], np.ndarray]  # of rows with these best scores


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


def plan_of(rows: int, codes: int, dim: int, *, heads: int = 1, processors: int = 132) -> Plan:
    """How a call of these sizes is cut up; contiguous float32, no memory is touched."""
    one, plan = torch.empty(1), Plan()
    z = Rows(one.data_ptr(), 0, 1, heads, rows, dim, 0, rows * dim, dim, 1)
    problem = Problem(z, Codes(one.data_ptr(), 0, codes * dim, dim, 1), PerRow(), codes, 0, 1)
    assert library().cuda_plan(ctypes.byref(problem), processors, ctypes.byref(plan)) == 0
    return plan


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


def pack(z: torch.Tensor, codebook: torch.Tensor, metric: str = "euclidean") -> Packed:
    """z (N, D), codebook (K, D)."""
    problem = problem_of(z[None, None], codebook[None], metric=metric)
    workspace = torch.full((workspace_bytes(problem, 1) + 256,), 0xFF, dtype=torch.uint8)
    base = (workspace.data_ptr() + 255) // 256 * 256
    operands, plan, frame = Operands(), Plan(), (ctypes.c_int * 2)()
    centre = np.full(z.shape[1] + 64, np.nan, np.float32)
    complaint = ctypes.create_string_buffer(400)
    failed = library().cuda_pack(
        ctypes.byref(problem), 1, ctypes.c_void_p(base), ctypes.byref(operands), ctypes.byref(plan),
        ctypes.c_void_p(centre.ctypes.data), frame, complaint, len(complaint),
    )  # fmt: skip
    if failed:
        raise RuntimeError(complaint.value.decode())
    memory = workspace.numpy()

    def read(name: str, kind: type, count: int) -> np.ndarray:
        at = getattr(operands, name) - workspace.data_ptr()
        return memory[at : at + count * np.dtype(kind).itemsize].view(kind).astype(np.float64)

    norm, error = (read(name, np.float32, plan.rows) for name in ("norm", "error"))
    radius, spread = (read(name, np.float32, plan.code_parts).max() for name in ("radius", "spread"))
    left_out = bool(read("left_out", np.int32, plan.code_parts).any())

    def limits(best: np.ndarray) -> np.ndarray:
        given = [x.astype(np.float32) for x in (best, norm, error)]
        out = np.empty_like(given[0])
        library().cuda_limits(
            ctypes.byref(problem), ctypes.c_float(radius), ctypes.c_float(spread), int(left_out), len(best),
            *(ctypes.c_void_p(x.ctypes.data) for x in (*given, out)),
        )  # fmt: skip
        return out.astype(np.float64)

    return Packed(
        read("rows", np.float16, plan.rows * plan.padded).reshape(plan.rows, -1),
        read("codes", np.float16, plan.padded_codes * plan.padded).reshape(plan.padded_codes, -1),
        read("half_norms", np.float32, plan.padded_codes),
        read("beta", np.float32, plan.rows), norm, error, radius, spread, left_out,
        centre[: z.shape[1]].astype(np.float64), frame[0], limits,
    )  # fmt: skip
