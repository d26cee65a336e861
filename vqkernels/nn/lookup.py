"""Decoding: the codes of indices."""

from typing import Any

import torch
from torch import Tensor

_INTEGERS = tuple(getattr(torch, name) for name in ("int64", "int32", "int16", "int8", "uint8", "uint16", "uint32"))


def check_indices(indices: Any, codebook_size: int, heads: int, check: bool) -> Tensor:
    """Checks type and heads, and the range [-1, codebook_size) where the device can be asked; returns int64.

    On the CPU the range is always checked, elsewhere if `check`, at the price of one synchronisation; never while
    compiling, exporting or tracing.
    """
    if not isinstance(indices, Tensor):
        raise TypeError(f"indices must be an integer tensor, got {type(indices).__name__}")
    if indices.dtype not in _INTEGERS:
        raise TypeError(f"indices must be an integer tensor, got {indices.dtype}")
    tracing = torch.jit.is_tracing()  # a size is a tensor then
    if heads > 1 and (indices.dim() == 0 or (not tracing and indices.shape[-1] != heads)):
        raise ValueError(f"indices must have {heads} heads on the last axis, got {list(indices.shape)}")
    indices = indices.to(torch.int64)
    if not tracing:
        _check_range(indices, codebook_size, check)
    return indices


def check_stack_indices(indices: Any, codebook_size: int, groups: int, levels: int, check: bool) -> Tensor:
    """`check_indices` for a stack: `(..., n)`, or `(..., G, n)` with groups, of n <= Q levels."""
    if isinstance(indices, Tensor) and not torch.jit.is_tracing():
        shape = list(indices.shape)
        if not shape or not 1 <= shape[-1] <= levels:
            raise ValueError(f"indices must have 1 to {levels} levels on the last axis, got {shape}")
        if groups > 1 and (len(shape) < 2 or shape[-2] != groups):
            raise ValueError(f"indices must have {groups} groups on the last axis but one, got {shape}")
    return check_indices(indices, codebook_size, 1, check)


def _check_range(indices: Tensor, codebook_size: int, check: bool) -> None:
    if torch.compiler.is_compiling() or not (check or indices.device.type == "cpu"):
        return
    outside = (indices < -1) | (indices >= codebook_size)
    if bool(outside.any()):
        raise IndexError(f"indices must be in [-1, {codebook_size - 1}], got {int(indices[outside].flatten()[0])}")


def look_up(codes: Tensor, indices: Tensor) -> Tensor:
    """Codes `(..., D)` of `indices`, of any integer dtype; -1 gives zeros, and a value out of range gives NaN.

    Args:
        codes: `(K, D)`, or `(H, K, D)` with H on the last axis of `indices`; the result is then `(..., H, D)`.
    """
    indices = indices.to(torch.int64)  # narrow unsigned tensors have few operations, and uint8 indexes like a mask
    size = codes.shape[-2]
    inside = indices.clamp(0, size - 1)
    if codes.dim() == 3:
        found = codes[torch.arange(codes.shape[0], device=indices.device), inside]
    else:
        found = codes[inside]
    found = torch.where((indices < 0).unsqueeze(-1), 0.0, found)
    return torch.where(((indices < -1) | (indices >= size)).unsqueeze(-1), torch.nan, found)


def sum_codes(stack: Tensor, indices: Tensor) -> Tensor:
    """The sum of the codes of `indices (..., n)`, level after level, as `vqkernels.residual_vector_quantize` adds them.

    Args:
        stack: `(Q, K, D)`, or `(G, Q, K, D)` with `indices (..., G, n)`; the result is `(..., D)` or `(..., G, D)`.
    """
    total: Tensor | None = None
    for q, index in enumerate(indices.to(torch.int64).unbind(-1)):
        codes = look_up(stack[..., q, :, :], index)
        total = codes if total is None else torch.where((index < 0).unsqueeze(-1), total, total + codes)
    assert total is not None
    return total
