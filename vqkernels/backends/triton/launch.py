"""What every launcher here shares: where a call runs and how its kernels may be compiled."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from vqkernels.backends.triton import configs

# The contract rounds multiplication and addition separately, and Triton's default is about to change: always explicit.
SEPARATE_ROUNDING: dict[str, Any] = {"enable_fp_fusion": False}
FUSED_ROUNDING: dict[str, Any] = {"enable_fp_fusion": True}


def registers(wide: bool) -> dict[str, Any]:
    """All registers for arithmetic in float64: the assembler would otherwise spill a few for the sake of occupancy."""
    return {"maxnreg": 255} if wide else {}


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1 at import), which also takes CPU tensors."""
    return bool(triton.knobs.runtime.interpret)


_assumed: tuple[tuple[int, int], int] | None = None


@contextlib.contextmanager
def assume(compute_capability: tuple[int, int], processors: int) -> Iterator[None]:
    """Choose configurations as on a given chip, whatever is here: ahead-of-time compilation needs no GPU."""
    global _assumed
    before, _assumed = _assumed, (compute_capability, processors)
    try:
        yield
    finally:
        _assumed = before


@functools.cache
def _properties(index: int) -> tuple[tuple[int, int], int]:
    properties = torch.cuda.get_device_properties(index)
    return (properties.major, properties.minor), properties.multi_processor_count


def capability(device: torch.device) -> tuple[int, int] | str:
    """The compute capability, or the interpreter's name."""
    if _assumed is not None:
        return _assumed[0]
    if interpreted():
        return configs.INTERPRETED
    return _properties(_index(device))[0]


def multiprocessors(device: torch.device) -> int:
    """How many programs run at once; 1 in the interpreter."""
    if _assumed is not None:
        return _assumed[1]
    if interpreted():
        return 1
    return _properties(_index(device))[1]


def on_device(tensor: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device: make it the tensor's."""
    if tensor.is_cuda:
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()


def tile_operand(matrix: torch.Tensor, block: list[int], descriptors: bool) -> torch.Tensor | TensorDescriptor:
    """A contiguous matrix as a kernel argument: a descriptor for the bulk copy engine, or the tensor itself."""
    if not descriptors:
        return matrix
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), block)


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index
