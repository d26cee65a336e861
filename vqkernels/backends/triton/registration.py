"""Offers the kernels to torch's dispatcher. Needs no Triton: a kernel's module is imported by its first call.

The operators take z as its caller has it. Here it becomes the canonical view (batch, head, position, channel), and the
kernels write what is of z's shape straight into the canonical view of the tensor that is returned.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vqkernels.backends import sampling
from vqkernels.backends.layout import Layout, empty_rows, layout_of
from vqkernels.backends.temperature import host_temperature


def register(namespace: str = "vqkernels", key: str = "CUDA") -> torch.library.Library:
    """Implement the operators of `namespace` for one dispatch key; keep the returned library alive."""
    library = torch.library.Library(namespace, "IMPL")
    for operator, implementation in OPERATORS.items():
        library.impl(operator, implementation, key)
    return library


def _kernels(module: str) -> Any:
    return importlib.import_module(f"{__package__}.{module}")


def _heads(codebook: Tensor) -> Tensor:
    return codebook if codebook.dim() == 3 else codebook.unsqueeze(0)


def _mask(layout: Layout, mask: Tensor | None) -> Tensor | None:
    return None if mask is None else layout.per_row(mask)


def _written(out: Tensor, view: Tensor, layout: Layout) -> Tensor:
    """`out`, once the kernels have filled its canonical view; a view that had to be a copy is brought back."""
    return out if view.data_ptr() == out.data_ptr() else out.copy_(layout.restore_rows(view))


def _nearest(
    z: Tensor, codebook: Tensor, mask: Tensor | None, channel_dim: int, metric: str, precision: str
) -> tuple[Tensor, Tensor]:
    layout = layout_of(z, channel_dim, codebook.dim() == 3)
    indices, decided = _kernels("nearest").nearest(
        layout.rows(z), _heads(codebook), _mask(layout, mask), metric, precision
    )
    return layout.restore_per_row(indices).contiguous(), decided


def _quantize(
    z: Tensor,
    codebook: Tensor,
    mask: Tensor | None,
    channel_dim: int,
    metric: str,
    precision: str,
    statistics: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    layout = layout_of(z, channel_dim, codebook.dim() == 3)
    out = empty_rows(z, layout)
    view = layout.rows(out)
    _, indices, squared_error, counts, sums = _kernels("quantize").quantize(
        layout.rows(z), _heads(codebook), _mask(layout, mask), metric, precision, statistics, out=view
    )
    return _written(out, view, layout), layout.restore_per_row(indices).contiguous(), squared_error, counts, sums


def _lookup(
    z: Tensor, codebook: Tensor, indices: Tensor, mask: Tensor | None, channel_dim: int, statistics: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    layout = layout_of(z, channel_dim, codebook.dim() == 3)
    out = empty_rows(z, layout)
    view = layout.rows(out)
    given = indices if mask is None else torch.where(mask, indices, -1)
    _, squared_error, counts, sums = _kernels("quantize").lookup(
        layout.rows(z), _heads(codebook), layout.per_row(given), statistics, out=view
    )
    return _written(out, view, layout), squared_error, counts, sums


def _quantize_backward(
    grad_quantized: Tensor,
    grad_codebook_loss: Tensor,
    grad_commitment_loss: Tensor,
    z: Tensor,
    codebook: Tensor,
    indices: Tensor,
    channel_dim: int,
    gradient: str,
    codebook_gradient: bool,
) -> tuple[Tensor, Tensor]:
    layout = layout_of(z, channel_dim, codebook.dim() == 3)
    out = empty_rows(z, layout)
    view = layout.rows(out)
    _, grad_codebook = _kernels("quantize").quantize_backward(
        layout.rows(grad_quantized),
        grad_codebook_loss,
        grad_commitment_loss,
        layout.rows(z),
        _heads(codebook),
        layout.per_row(indices),
        gradient,
        codebook_gradient,
        out=view,
    )
    return _written(out, view, layout), grad_codebook.view(codebook.shape) if codebook_gradient else grad_codebook


def _statistics(
    z: Tensor, indices: Tensor, codebook_size: int, mask: Tensor | None, channel_dim: int, batched: bool
) -> tuple[Tensor, Tensor]:
    layout = layout_of(z, channel_dim, batched)
    return _kernels("statistics").statistics(
        layout.rows(z), layout.per_row(indices), codebook_size, _mask(layout, mask)
    )


def _entropy(
    z: Tensor, codebook: Tensor, mask: Tensor | None, channel_dim: int, metric: str, temperature: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    layout = layout_of(z, channel_dim, codebook.dim() == 3)
    divisor = host_temperature(temperature)
    return _kernels("entropy").entropy(layout.rows(z), _heads(codebook), _mask(layout, mask), metric, divisor)


def _entropy_backward(
    grad_sample: Tensor,
    grad_codebook_entropy: Tensor,
    z: Tensor,
    codebook: Tensor,
    mask: Tensor | None,
    row_entropy: Tensor,
    log_partition: Tensor,
    mean_assignment: Tensor,
    channel_dim: int,
    metric: str,
    temperature: Tensor,
    codebook_gradient: bool,
) -> tuple[Tensor, Tensor]:
    layout = layout_of(z, channel_dim, codebook.dim() == 3)
    out = empty_rows(z, layout)
    view = layout.rows(out)
    _, grad_codebook = _kernels("entropy").entropy_backward(
        grad_sample,
        grad_codebook_entropy,
        layout.rows(z),
        _heads(codebook),
        _mask(layout, mask),
        row_entropy.contiguous(),
        log_partition.contiguous(),
        mean_assignment,
        metric,
        host_temperature(temperature),
        codebook_gradient,
        out=view,
    )
    return _written(out, view, layout), grad_codebook.view(codebook.shape) if codebook_gradient else grad_codebook


def _stacks(codebooks: Tensor) -> Tensor:
    return codebooks if codebooks.dim() == 4 else codebooks.unsqueeze(0)


def _residual_quantize(
    z: Tensor,
    codebooks: Tensor,
    levels: Tensor | None,
    channel_dim: int,
    metric: str,
    precision: str,
    statistics: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    layout = layout_of(z, channel_dim, codebooks.dim() == 4)
    out = empty_rows(z, layout)
    view = layout.rows(out)
    _, indices, squared_errors, counts, sums = _kernels("residual").residual_quantize(
        layout.rows(z), _stacks(codebooks), _mask(layout, levels), metric, precision, statistics, out=view
    )
    by_row = layout.restore_rows(indices).movedim(channel_dim, -1).contiguous()
    return _written(out, view, layout), by_row, squared_errors, counts, sums


def _residual_quantize_backward(
    grad_quantized: Tensor,
    grad_codebook_losses: Tensor,
    grad_commitment_losses: Tensor,
    z: Tensor,
    codebooks: Tensor,
    indices: Tensor,
    channel_dim: int,
    gradient: str,
    codebook_gradient: bool,
) -> tuple[Tensor, Tensor]:
    layout = layout_of(z, channel_dim, codebooks.dim() == 4)
    out = empty_rows(z, layout)
    view = layout.rows(out)
    _, grad_codebooks = _kernels("residual").residual_quantize_backward(
        layout.rows(grad_quantized),
        grad_codebook_losses,
        grad_commitment_losses,
        layout.rows(z),
        _stacks(codebooks),
        layout.rows(indices.movedim(-1, channel_dim)),
        gradient,
        codebook_gradient,
        out=view,
    )
    return _written(out, view, layout), grad_codebooks.view(codebooks.shape) if codebook_gradient else grad_codebooks


OPERATORS: dict[str, Callable[..., Any]] = {
    "nearest": _nearest,
    "quantize": _quantize,
    "lookup": _lookup,
    "sample": sampling.sample,  # no kernel yet: plain PyTorch serves the GPU
    "quantize_backward": _quantize_backward,
    "statistics": _statistics,
    "entropy": _entropy,
    "entropy_backward": _entropy_backward,
    "residual_quantize": _residual_quantize,
    "residual_quantize_backward": _residual_quantize_backward,
}
