"""What the overload `.cuda` of each operator runs, and the schemas of the launchers in csrc/bindings/cuda_*.cpp.

The operators take z as its caller has it; here it becomes the canonical view (batch, head, position, channel), and the
launchers get tensors that are allocated here, and the stream as an integer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vqkernels.backends import sampling
from vqkernels.backends.cuda import backward, nearest, statistics
from vqkernels.backends.layout import Layout, empty_rows, layout_of

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
    indices, decided = nearest.nearest(layout.rows(z), _heads(codebook), _mask(layout, mask), metric, precision)
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
    indices, squared_error, counts, sums = nearest.quantize(
        layout.rows(z), _heads(codebook), _mask(layout, mask), metric, precision, statistics, view
    )
    return _written(out, view, layout), layout.restore_per_row(indices).contiguous(), squared_error, counts, sums


def _lookup(
    z: Tensor, codebook: Tensor, indices: Tensor, mask: Tensor | None, channel_dim: int, statistics: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    layout = layout_of(z, channel_dim, codebook.dim() == 3)
    out = empty_rows(z, layout)
    view = layout.rows(out)
    given = layout.per_row(indices if mask is None else torch.where(mask, indices, -1))
    squared_error, counts, sums = nearest.lookup(layout.rows(z), _heads(codebook), given, statistics, view)
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
    grad_codebook = backward.quantize_backward(
        layout.rows(grad_quantized),
        grad_codebook_loss,
        grad_commitment_loss,
        layout.rows(z),
        _heads(codebook),
        layout.per_row(indices),
        gradient == "rotation",
        codebook_gradient,
        view,
    )
    return _written(out, view, layout), grad_codebook.view(codebook.shape) if codebook_gradient else grad_codebook


def _statistics(
    z: Tensor, indices: Tensor, codebook_size: int, mask: Tensor | None, channel_dim: int, batched: bool
) -> tuple[Tensor, Tensor]:
    layout = layout_of(z, channel_dim, batched)
    rows = layout.rows(z), layout.per_row(indices)
    return statistics.statistics(*rows, codebook_size, None if mask is None else layout.per_row(mask))


OPERATORS: dict[str, Callable[..., Any]] = {
    "nearest": _nearest,
    "quantize": _quantize,
    "lookup": _lookup,
    "quantize_backward": _quantize_backward,
    "sample": sampling.sample,  # no kernel yet: plain PyTorch serves the GPU
    "statistics": _statistics,
}
# "kmeans_init" is composed of these, in vqkernels/ops
SERVED = frozenset({*OPERATORS, "kmeans_init"})
