"""Where a launch goes: the device of its tensors, the stream of its caller. Tensors on a CPU are a rehearsal's."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
from torch import Tensor


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
