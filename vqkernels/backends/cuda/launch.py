"""The launchers of csrc/bindings/cuda_*.cpp, and where a launch goes: the device of its tensors, its caller's stream.

A launcher fills tensors that are allocated in this package, and takes the stream as an integer. Tensors on a CPU are a
rehearsal's.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
from torch import Tensor

LAUNCHERS = (
    "cuda_nearest_workspace(Tensor z, Tensor codebook, Tensor? mask, str metric, str precision, int processors) -> int",
    "cuda_nearest(Tensor z, Tensor codebook, Tensor? mask, str metric, str precision, Tensor(a!) indices,"
    " Tensor(b!) decided, Tensor(c!)? quantized, Tensor(d!)? squared_error, Tensor(e!) workspace, int processors,"
    " int stream) -> int",
    "cuda_lookup_workspace(Tensor z, Tensor codebook) -> int",
    "cuda_lookup(Tensor z, Tensor codebook, Tensor indices, Tensor(a!) quantized, Tensor(b!) squared_error,"
    " Tensor(c!) workspace, int stream) -> ()",
    "cuda_row_gradient(Tensor z, Tensor codebook, Tensor indices, Tensor incoming, Tensor grad, Tensor elements,"
    " bool rotate, Tensor(a!) out, int stream) -> ()",
    "cuda_segment_sums_workspace(int rows, int groups, int channels) -> int",
    "cuda_segment_sums(Tensor z, Tensor indices, Tensor? mask, int codes, Tensor? codebook, Tensor? grad,"
    " Tensor? elements, Tensor(a!)? counts, Tensor(b!) sums, Tensor(c!) workspace, int stream) -> ()",
)
_library = torch.library.Library("vqkernels", "FRAGMENT")
for _schema in LAUNCHERS:
    _library.define(_schema)


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """The launchers launch on the current device: make it the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def stream(tensor: Tensor) -> int:
    """The current stream of the tensor's device, as the launchers take it."""
    return torch.cuda.current_stream(tensor.device).cuda_stream if tensor.is_cuda else 0


def processors(tensor: Tensor) -> int:
    """Multiprocessors of the tensor's device."""
    if not tensor.is_cuda:
        return 2
    return _processors(torch.cuda.current_device() if tensor.device.index is None else tensor.device.index)


@functools.cache
def _processors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count
