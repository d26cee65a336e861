"""The CUDA backend on CPU tensors: the launchers of csrc/bindings/cuda_*.cpp, with the executor in the place of a GPU.

    PYTHONPATH=tests:. python -m native.cuda_rehearsal OPERATOR ... [--every N]     proves claims of the suite

Everything else is the real thing: the operators, their layouts and allocations, the workspaces, the block programs.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from native import cuda_host
from native.build import build_host_library
from native.cuda_host import TYPES, Codes, PerRow, Rows, rows_of
from torch import Tensor

from vqkernels.backends import registry
from vqkernels.verification import suite

_LONG = ctypes.c_int64


class SegmentSums(ctypes.Structure):
    _fields_ = [
        ("z", Rows), ("indices", PerRow), ("mask", PerRow), ("codes", _LONG), ("codebook", Codes),
        ("grad", ctypes.c_void_p), ("grad_type", ctypes.c_int), ("elements", ctypes.c_void_p),
        ("counts", ctypes.c_void_p), ("sums", ctypes.c_void_p), ("sums_type", ctypes.c_int),
    ]  # fmt: skip


class RowGradient(ctypes.Structure):
    _fields_ = [
        ("z", Rows), ("codebook", Codes), ("indices", PerRow), ("codes", _LONG), ("incoming", Rows), ("out", Rows),
        ("grad", ctypes.c_void_p), ("grad_type", ctypes.c_int), ("elements", ctypes.c_void_p),
        ("rotate", ctypes.c_int), ("lanes", ctypes.c_int),
    ]  # fmt: skip


@functools.cache
def library() -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(build_host_library("cuda_rows", Path(tempfile.mkdtemp()))))
    loaded.cuda_segment_sums_workspace.restype = _LONG
    return loaded


def _per_row(x: Tensor | None) -> PerRow:
    return PerRow() if x is None else PerRow(x.data_ptr(), *x.stride())


def _codes(x: Tensor | None) -> Codes:
    return Codes() if x is None else Codes(x.data_ptr(), TYPES[x.dtype], *x.stride())


def _data(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _type(x: Tensor | None) -> int:
    return 0 if x is None else TYPES[x.dtype]


def _run(function: Any, *arguments: Any) -> None:
    complaint = ctypes.create_string_buffer(400)
    if function(*arguments, complaint, len(complaint)) != 0:
        raise RuntimeError(complaint.value.decode())


def _aligned(workspace: Tensor, size: int) -> tuple[Tensor, int]:
    """Memory of our own: torch aligns to 64 bytes on a CPU. The lent one is only measured."""
    assert workspace.numel() == size, "the workspace is not what the query named"
    memory = torch.full((size + 256,), 0xFF, dtype=torch.uint8)
    return memory, (memory.data_ptr() + 255) // 256 * 256


def segment_sums_workspace(rows: int, groups: int, channels: int) -> int:
    return library().cuda_segment_sums_workspace(_LONG(rows), _LONG(groups), _LONG(channels))


def segment_sums(z, indices, mask, codes, codebook, grad, elements, counts, sums, workspace, stream) -> None:
    rows, groups = z.shape[0] * z.shape[1] * z.shape[2], z.shape[1] * codes
    memory, base = _aligned(workspace, segment_sums_workspace(rows, groups, z.shape[3]))
    what = SegmentSums(
        rows_of(z), _per_row(indices), _per_row(mask), codes, _codes(codebook), _data(grad), _type(grad),
        _data(elements), _data(counts), sums.data_ptr(), TYPES[sums.dtype],
    )  # fmt: skip
    _run(library().cuda_segment_sums, ctypes.byref(what), ctypes.c_void_p(base), 2)
    del memory


def row_gradient(z, codebook, indices, incoming, grad, elements, rotate, out, stream) -> None:
    what = RowGradient(
        rows_of(z), _codes(codebook), _per_row(indices), codebook.shape[1], rows_of(incoming), rows_of(out),
        grad.data_ptr(), TYPES[grad.dtype], elements.data_ptr(), int(rotate), 1,
    )  # fmt: skip
    _run(library().cuda_row_gradient, ctypes.byref(what), 3)


def lookup_workspace(z: Tensor, codebook: Tensor) -> int:
    loaded = cuda_host.library()
    loaded.cuda_lookup_workspace.restype = _LONG
    return loaded.cuda_lookup_workspace(ctypes.byref(cuda_host.problem_of(z, codebook)))


def lookup(z, codebook, indices, quantized, squared_error, workspace, stream) -> None:
    memory, base = _aligned(workspace, lookup_workspace(z, codebook))
    memory.zero_()
    problem = cuda_host.problem_of(z, codebook)
    out = cuda_host.Output(_per_row(indices), rows_of(quantized), squared_error.data_ptr())
    arguments = ctypes.byref(problem), ctypes.byref(out), 2, ctypes.c_void_p(base)
    _run(cuda_host.library().cuda_lookup, *arguments)


def nearest_workspace(z, codebook, mask, metric, precision, processors) -> int:
    return cuda_host.workspace_bytes(cuda_host.problem_of(z, codebook, mask, metric, precision != "fast"), processors)


def nearest(
    z, codebook, mask, metric, precision, indices, decided, quantized, squared_error, workspace, processors, stream
) -> int:
    assert workspace.numel() == nearest_workspace(z, codebook, mask, metric, precision, processors)
    found = cuda_host.nearest(
        z, codebook, mask, metric=metric, certified=precision != "fast", quantize=quantized is not None,
        processors=processors,
    )  # fmt: skip
    indices.copy_(found.indices)
    decided.fill_(found.decided)
    if quantized is not None:
        quantized.copy_(found.quantized)
        squared_error.fill_(found.squared_error)
    return found.launches


LAUNCHERS = {
    "cuda_nearest": nearest,
    "cuda_lookup": lookup,
    "cuda_segment_sums": segment_sums,
    "cuda_row_gradient": row_gradient,
}
QUERIES = {
    "cuda_nearest_workspace": nearest_workspace,
    "cuda_lookup_workspace": lookup_workspace,
    "cuda_segment_sums_workspace": segment_sums_workspace,
}


def rehearse(backend: str = "cuda") -> torch.library.Library:
    """From now on `backend` computes CPU tensors, through the executor. Keep the returned library alive."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch notes that the build's own queries, which need a GPU, are replaced
        implementations = torch.library.Library("vqkernels", "IMPL")
        for name, launcher in LAUNCHERS.items():
            implementations.impl(name, launcher, "CPU")
        for name, query in QUERIES.items():
            implementations.impl(name, query, "CompositeExplicitAutograd", allow_override=True)
    chosen = registry.resolve
    registry.resolve = lambda name, *told: backend if name == backend else chosen(name, *told)  # type: ignore
    return implementations


def main() -> None:
    """Prove the CUDA backend's claims about some operators; one JSON line per claim."""
    parser = argparse.ArgumentParser()
    parser.add_argument("operators", nargs="+")
    parser.add_argument("--every", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    library = rehearse()
    for number in suite.claims_about("cuda"):
        if suite.CLAIMS[number][0] in options.operators:
            outcome = suite._try(number, "cuda", "cpu", options.every)
            print(json.dumps([outcome.operator, outcome.claim, outcome.cases, outcome.failures]), flush=True)
    del library


if __name__ == "__main__":
    main()
