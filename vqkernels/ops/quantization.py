"""What vector and residual quantization share: shapes, losses, gradient and autograd Function.

Where `stacked`, codebooks are (Q, K, D) or (H, Q, K, D), and indices, losses and statistics have an axis of levels.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from ..backends.layout import empty_rows, layout_of
from ..backends.options import GradientOptions, QuantizeOptions, schema_of
from .checks import row_shape
from .differentiation import FusedFunction, at_least_one, kept_indices
from .registration import Operation


def fake_quantize(
    z: Tensor, codebooks: Tensor, options: QuantizeOptions, stacked: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What a forward operator returns, without values."""
    batched = codebooks.dim() == 3 + stacked
    levels = (codebooks.shape[-3],) if stacked else ()
    groups = (z.shape[0] if batched else 1, *levels)
    sums = torch.float64 if z.dtype == torch.float64 else torch.float32
    return (
        empty_rows(z, layout_of(z, options.channel_dim, batched)),
        z.new_empty((*row_shape(z, options.channel_dim), *levels), dtype=torch.int64),
        z.new_empty(groups if stacked else (), dtype=torch.float64),
        z.new_empty((*groups, codebooks.shape[-2]) if options.statistics else (0,), dtype=torch.int64),
        z.new_empty((*groups, *codebooks.shape[-2:]) if options.statistics else (0,), dtype=sums),
    )


def _fake_backward(z: Tensor, codebooks: Tensor, options: GradientOptions, stacked: bool) -> tuple[Tensor, Tensor]:
    grad_z = empty_rows(z, layout_of(z, options.channel_dim, codebooks.dim() == 3 + stacked))
    return grad_z, codebooks.new_empty(codebooks.shape if options.codebook_gradient else (0,))


def _fake_quantize_backward(_q, _codebook_loss, _commitment_loss, z, codebook, _indices, *options):
    return _fake_backward(z, codebook, GradientOptions(*options), stacked=False)


def _fake_residual_backward(_q, _codebook_losses, _commitment_losses, z, codebooks, _indices, *options):
    return _fake_backward(z, codebooks, GradientOptions(*options), stacked=True)


quantize_backward = Operation(
    "quantize_backward",
    "(Tensor grad_quantized, Tensor grad_codebook_loss, Tensor grad_commitment_loss, Tensor z, Tensor codebook,"
    f" Tensor indices, {schema_of(GradientOptions)}) -> (Tensor grad_z, Tensor grad_codebook)",
    _fake_quantize_backward,
)
residual_quantize_backward = Operation(
    "residual_quantize_backward",
    "(Tensor grad_quantized, Tensor grad_codebook_losses, Tensor grad_commitment_losses, Tensor z, Tensor codebooks,"
    f" Tensor indices, {schema_of(GradientOptions)}) -> (Tensor grad_z, Tensor grad_codebooks)",
    _fake_residual_backward,
)


def mean(squared_error: Tensor, elements: Any, z: Tensor, codebooks: Tensor) -> Tensor:
    """A loss: float32, or float64 where an input is."""
    wide = torch.float64 in (z.dtype, codebooks.dtype)
    return (squared_error / at_least_one(elements)).to(torch.float64 if wide else torch.float32)


class QuantizeFunction(FusedFunction):
    """One fused forward operator, one fused backward operator. The last arguments are `*QuantizeOptions`, how the
    gradient of `quantized` reaches z, and the backend.

    Saves z, the codebooks and a copy of the indices: nothing of size N x K, no residual, no one-hot, and nothing that
    the caller gets and may overwrite. `forward` names its arguments one by one: torch.compile counts them.
    """

    @staticmethod
    def backward(ctx, grad_quantized, _indices, grad_codebook_loss, grad_commitment_loss, *_):
        channel_dim, gradient, backend, stacked, constants = ctx.arguments
        wanted = ctx.needs_input_grad[1]
        options = GradientOptions(channel_dim, gradient, wanted)
        losses = (grad_codebook_loss, grad_commitment_loss)
        grads = _QuantizeBackward.apply(grad_quantized, *losses, *ctx.saved_tensors, options, stacked, backend)
        return grads[0], grads[1] if wanted else None, *(constants * [None])


def with_kept_indices(found: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """What a forward returns, and the copy of its indices that the backward pass reads."""
    return *found, kept_indices(found[1])


def save_for_backward(ctx: FunctionCtx, inputs: tuple, output: tuple, stacked: bool) -> None:
    """`setup_context` of a `QuantizeFunction`."""
    z, codebooks = inputs[:2]
    *options, gradient, backend = inputs[-len(QuantizeOptions._fields) - 2 :]
    _, indices, _, _, counts, sums, kept = output
    ctx.mark_non_differentiable(indices, counts, sums, kept)
    ctx.save_for_backward(z, codebooks, kept)
    arguments = QuantizeOptions(*options).channel_dim, gradient, backend, stacked, len(inputs) - 2
    ctx.arguments = arguments  # type: ignore[attr-defined]


class _QuantizeBackward(FusedFunction):
    """The gradient as a Function, so that asking for a second derivative is an error, not a wrong zero."""

    @staticmethod
    def forward(
        grad_quantized, grad_codebook_loss, grad_commitment_loss, z, codebook, indices, options, stacked, backend
    ):
        operation = residual_quantize_backward if stacked else quantize_backward
        losses = (grad_codebook_loss, grad_commitment_loss)
        return operation(backend, grad_quantized, *losses, z, codebook, indices, *options)

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple, output: tuple) -> None:
        ctx.stacked = inputs[-2]  # type: ignore[attr-defined]

    @staticmethod
    def backward(ctx, grad_z, grad_codebook):
        name = "residual_vector_quantize" if ctx.stacked else "vector_quantize"
        raise RuntimeError(f"vqkernels does not support double backward: {name} is differentiable only once")
