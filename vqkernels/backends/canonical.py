"""From the tensors of an operator's caller to what the kernels of a GPU take, and back: once for Triton and CUDA.

The operators take z as its caller has it. Here it becomes the canonical view (batch, head, position, channel), the
codebooks get an axis of heads, and the kernels write what has z's shape into the canonical view of the tensor that is
returned. The functions here have the names of the operators; `kernel` is the function of the backend, and `options` are
the operator's last arguments, which it takes as they are.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .layout import Layout, empty_rows, layout_of
from .temperature import host_temperature

Kernel = Callable[..., Any]


def nearest(
    kernel: Kernel, z: Tensor, codebook: Tensor, mask: Tensor | None, channel_dim: int, *options: Any
) -> tuple[Tensor, Tensor]:
    layout = layout_of(z, channel_dim, codebook.dim() == 3)
    indices, decided = kernel(layout.rows(z), _headed(codebook, 3), _per_row(layout, mask), *options)
    return layout.restore_per_row(indices).contiguous(), decided


def quantize(
    kernel: Kernel, z: Tensor, codebook: Tensor, mask: Tensor | None, channel_dim: int, *options: Any
) -> tuple[Tensor, ...]:
    layout, out, view = _output(z, channel_dim, codebook.dim() == 3)
    _, indices, *found = kernel(layout.rows(z), _headed(codebook, 3), _per_row(layout, mask), *options, out=view)
    return _written(out, view, layout), layout.restore_per_row(indices).contiguous(), *found


def residual_quantize(
    kernel: Kernel, z: Tensor, codebooks: Tensor, levels: Tensor | None, channel_dim: int, *options: Any
) -> tuple[Tensor, ...]:
    layout, out, view = _output(z, channel_dim, codebooks.dim() == 4)
    _, indices, *found = kernel(layout.rows(z), _headed(codebooks, 4), _per_row(layout, levels), *options, out=view)
    by_row = layout.restore_rows(indices).movedim(channel_dim, -1).contiguous()
    return _written(out, view, layout), by_row, *found


def lookup(
    kernel: Kernel, z: Tensor, codebook: Tensor, indices: Tensor, mask: Tensor | None, channel_dim: int, *options: Any
) -> tuple[Tensor, ...]:
    layout, out, view = _output(z, channel_dim, codebook.dim() == 3)
    given = layout.per_row(indices if mask is None else torch.where(mask, indices, -1))
    _, *found = kernel(layout.rows(z), _headed(codebook, 3), given, *options, out=view)
    return _written(out, view, layout), *found


def quantize_backward(
    kernel: Kernel,
    grad_quantized: Tensor,
    grad_codebook_loss: Tensor,
    grad_commitment_loss: Tensor,
    z: Tensor,
    codebook: Tensor,
    indices: Tensor,
    channel_dim: int,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    layout, out, view = _output(z, channel_dim, codebook.dim() == 3)
    losses = (grad_codebook_loss, grad_commitment_loss)
    rows = (layout.rows(z), _headed(codebook, 3), layout.per_row(indices))
    _, grad_codebook = kernel(layout.rows(grad_quantized), *losses, *rows, *options, out=view)
    return _written(out, view, layout), _like(codebook, grad_codebook)


def residual_quantize_backward(
    kernel: Kernel,
    grad_quantized: Tensor,
    grad_codebook_losses: Tensor,
    grad_commitment_losses: Tensor,
    z: Tensor,
    codebooks: Tensor,
    indices: Tensor,
    channel_dim: int,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    layout, out, view = _output(z, channel_dim, codebooks.dim() == 4)
    losses = (grad_codebook_losses, grad_commitment_losses)
    rows = (layout.rows(z), _headed(codebooks, 4), layout.rows(indices.movedim(-1, channel_dim)))
    _, grad_codebooks = kernel(layout.rows(grad_quantized), *losses, *rows, *options, out=view)
    return _written(out, view, layout), _like(codebooks, grad_codebooks)


def statistics(
    kernel: Kernel,
    z: Tensor,
    indices: Tensor,
    codebook_size: int,
    mask: Tensor | None,
    channel_dim: int,
    batched: bool,
) -> tuple[Tensor, Tensor]:
    layout = layout_of(z, channel_dim, batched)
    return kernel(layout.rows(z), layout.per_row(indices), codebook_size, _per_row(layout, mask))


def entropy(
    kernel: Kernel,
    z: Tensor,
    codebook: Tensor,
    mask: Tensor | None,
    channel_dim: int,
    metric: str,
    temperature: Tensor,
) -> tuple[Tensor, ...]:
    layout = layout_of(z, channel_dim, codebook.dim() == 3)
    divisor = host_temperature(temperature)
    return kernel(layout.rows(z), _headed(codebook, 3), _per_row(layout, mask), metric, divisor)


def entropy_backward(
    kernel: Kernel,
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
    layout, out, view = _output(z, channel_dim, codebook.dim() == 3)
    rows = (layout.rows(z), _headed(codebook, 3), _per_row(layout, mask))
    kept = (row_entropy.contiguous(), log_partition.contiguous(), mean_assignment)
    options = (metric, host_temperature(temperature), codebook_gradient)
    _, grad_codebook = kernel(grad_sample, grad_codebook_entropy, *rows, *kept, *options, out=view)
    return _written(out, view, layout), _like(codebook, grad_codebook)


def _headed(codebooks: Tensor, axes: int) -> Tensor:
    """Codebooks with an axis of heads: of `axes` axes."""
    return codebooks if codebooks.dim() == axes else codebooks.unsqueeze(0)


def _per_row(layout: Layout, mask: Tensor | None) -> Tensor | None:
    return None if mask is None else layout.per_row(mask)


def _output(z: Tensor, channel_dim: int, batched: bool) -> tuple[Layout, Tensor, Tensor]:
    """The layout of z, what is returned, and its canonical view, which a kernel fills."""
    layout = layout_of(z, channel_dim, batched)
    out = empty_rows(z, layout)
    return layout, out, layout.rows(out)


def _written(out: Tensor, view: Tensor, layout: Layout) -> Tensor:
    """`out`, once the kernels have filled its canonical view; a view that had to be a copy is brought back."""
    return out if view.data_ptr() == out.data_ptr() else out.copy_(layout.restore_rows(view))


def _like(codebooks: Tensor, gradient: Tensor) -> Tensor:
    """A codebooks' gradient in their shape; an empty one was not wanted."""
    return gradient.view(codebooks.shape) if gradient.numel() == codebooks.numel() else gradient
