"""Residual vector quantization: every level's search, look-up, losses and statistics in one call, with gradients."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from ..backends import registry
from ..backends.layout import empty_rows, layout_of
from .checks import GRADIENTS, METRICS, PRECISIONS, check_choice, check_levels, check_mask, check_rows, row_shape
from .differentiation import FusedFunction, at_least_one, is_differentiated, kept_indices
from .registration import Operation


def _fake_forward(
    z: Tensor,
    codebooks: Tensor,
    levels: Tensor | None,
    channel_dim: int,
    metric: str,
    precision: str,
    statistics: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batched = codebooks.dim() == 4
    heads, number = (z.shape[0] if batched else 1), codebooks.shape[-3]
    sums = torch.float64 if z.dtype == torch.float64 else torch.float32
    return (
        empty_rows(z, layout_of(z, channel_dim, batched)),
        z.new_empty((*row_shape(z, channel_dim), number), dtype=torch.int64),
        z.new_empty((heads, number), dtype=torch.float64),
        z.new_empty((heads, number, codebooks.shape[-2]) if statistics else (0,), dtype=torch.int64),
        z.new_empty((heads, number, *codebooks.shape[-2:]) if statistics else (0,), dtype=sums),
    )


def _fake_backward(
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
    grad_z = empty_rows(z, layout_of(z, channel_dim, codebooks.dim() == 4))
    return grad_z, codebooks.new_empty(codebooks.shape if codebook_gradient else (0,))


residual_quantize = Operation(
    "residual_quantize",
    "(Tensor z, Tensor codebooks, Tensor? levels, int channel_dim, str metric, str precision, bool statistics)"
    " -> (Tensor quantized, Tensor indices, Tensor squared_errors, Tensor counts, Tensor sums)",
    _fake_forward,
)
residual_quantize_backward = Operation(
    "residual_quantize_backward",
    "(Tensor grad_quantized, Tensor grad_codebook_losses, Tensor grad_commitment_losses, Tensor z, Tensor codebooks,"
    " Tensor indices, int channel_dim, str gradient, bool codebook_gradient)"
    " -> (Tensor grad_z, Tensor grad_codebooks)",
    _fake_backward,
)


def _forward(
    z: Tensor,
    codebooks: Tensor,
    levels: Tensor | None,
    channel_dim: int,
    metric: str,
    precision: str,
    statistics: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What `ResidualQuantization` holds."""
    quantized, indices, squared_errors, counts, sums = residual_quantize(
        backend, z, codebooks, levels, channel_dim, metric, precision, statistics
    )
    heads = codebooks.shape[0] if codebooks.dim() == 4 else 1
    if levels is None:
        rows: Tensor | int = z.numel() // (heads * codebooks.shape[-1])
    else:
        rows = (indices >= 0).view(heads, -1, indices.shape[-1]).sum(1)
    wide = torch.float64 in (z.dtype, codebooks.dtype)
    losses = (squared_errors / (at_least_one(rows) * codebooks.shape[-1])).to(torch.float64 if wide else torch.float32)
    return quantized, indices, losses, losses.clone(), counts, sums


class ResidualVectorQuantizeFunction(FusedFunction):
    """One fused forward operator, one fused backward operator, whatever the number of levels.

    Saves z, the codebooks and a copy of the indices, which the caller may overwrite; the residuals are computed again
    in the backward pass.
    """

    @staticmethod
    def forward(
        z: Tensor,
        codebooks: Tensor,
        levels: Tensor | None,
        channel_dim: int,
        metric: str,
        precision: str,
        statistics: bool,
        gradient: str,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        found = _forward(z, codebooks, levels, channel_dim, metric, precision, statistics, backend)
        return *found, kept_indices(found[1])

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple, output: tuple) -> None:
        z, codebooks, _, channel_dim, _, _, _, gradient, backend = inputs
        _, indices, _, _, counts, sums, kept = output
        ctx.mark_non_differentiable(indices, counts, sums, kept)
        ctx.save_for_backward(z, codebooks, kept)
        ctx.arguments = channel_dim, gradient, backend  # type: ignore[attr-defined]

    @staticmethod
    def backward(ctx, grad_quantized, _indices, grad_codebook_losses, grad_commitment_losses, *_):
        channel_dim, gradient, backend = ctx.arguments
        grad_z, grad_codebooks = _ResidualQuantizeBackward.apply(
            grad_quantized,
            grad_codebook_losses,
            grad_commitment_losses,
            *ctx.saved_tensors,
            channel_dim,
            gradient,
            ctx.needs_input_grad[1],
            backend,
        )
        return grad_z, grad_codebooks if ctx.needs_input_grad[1] else None, *(7 * [None])


class _ResidualQuantizeBackward(FusedFunction):
    """The gradient as a Function of its own, so that asking for a second derivative is an error, not a wrong zero."""

    @staticmethod
    def forward(
        grad_quantized,
        grad_codebook_losses,
        grad_commitment_losses,
        z,
        codebooks,
        indices,
        channel_dim,
        gradient,
        codebook_gradient,
        backend,
    ):
        grad_losses = (grad_codebook_losses, grad_commitment_losses)
        return residual_quantize_backward(
            backend, grad_quantized, *grad_losses, z, codebooks, indices, channel_dim, gradient, codebook_gradient
        )

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple, output: tuple) -> None:
        pass

    @staticmethod
    def backward(ctx, grad_z, grad_codebooks):
        raise RuntimeError(
            "vqkernels does not support double backward: residual_vector_quantize is differentiable only once"
        )


class ResidualQuantization(NamedTuple):
    """What one call yields; losses `(heads, Q)`, counts `(heads, Q, K)`, sums `(heads, Q, K, D)` of the residuals.

    Statistics are empty unless they were asked for; heads is 1 unless the codebooks are batched.
    """

    quantized: Tensor
    indices: Tensor
    codebook_losses: Tensor
    commitment_losses: Tensor
    counts: Tensor
    sums: Tensor


def residual_quantize_with_statistics(
    z: Tensor,
    codebooks: Tensor,
    *,
    mask: Tensor | None = None,
    levels: Tensor | None = None,
    metric: str = "euclidean",
    gradient: str = "straight_through",
    precision: str = "exact",
    channel_dim: int = -1,
    backend: str = "auto",
    statistics: bool = True,
) -> ResidualQuantization:
    """`residual_vector_quantize` with the statistics of all levels from the same pass."""
    check_choice("metric", metric, METRICS)
    check_choice("gradient", gradient, GRADIENTS)
    check_choice("precision", precision, PRECISIONS)
    stacked = isinstance(codebooks, Tensor) and codebooks.dim() in (3, 4)
    if not stacked or (not torch.jit.is_tracing() and codebooks.shape[-3] == 0):
        got = list(codebooks.shape) if isinstance(codebooks, Tensor) else type(codebooks).__name__
        raise ValueError(f"codebooks must be (Q, K, D) of at least one level, or (H, Q, K, D) with heads, got {got}")
    channel_dim = check_rows(z, codebooks[..., 0, :, :], channel_dim)
    check_mask(mask, z, channel_dim)
    check_levels(levels, z, channel_dim)
    if mask is not None:
        levels = torch.where(mask, codebooks.shape[-3] if levels is None else levels, 0)
    chosen = registry.resolve(backend, z.device, "residual_quantize")
    inputs = (z, codebooks, levels, channel_dim, metric, precision, statistics)
    if not is_differentiated(z, codebooks):
        return ResidualQuantization(*_forward(*inputs, chosen))
    return ResidualQuantization(*ResidualVectorQuantizeFunction.apply(*inputs, gradient, chosen)[:6])


def residual_vector_quantize(
    z: Tensor,
    codebooks: Tensor,
    *,
    mask: Tensor | None = None,
    levels: Tensor | None = None,
    metric: str = "euclidean",
    gradient: str = "straight_through",
    precision: str = "exact",
    channel_dim: int = -1,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Quantizes every row by the sum of Q codes, each nearest to what its predecessors left (Zeghidour et al. 2021).

    "SoundStream: An End-to-End Neural Audio Codec", algorithm 1: r_0 = z, level q takes the code e_q nearest to r_q,
    r_{q+1} = r_q - e_q. Residuals are float32 (float64 where z is), each subtraction rounded once, and each search
    obeys the contract of `nearest_code` on r_q: the indices of every level are the same on every backend.

    Args:
        z: `(..., D)`, or any layout whose channel axis is `channel_dim`; float32, bfloat16, float16 or float64.
        codebooks: `(Q, K, D)`, or `(H, Q, K, D)` for one stack per head with z `(H, ..., D)`. One codebook for all
            levels is `codebook.expand(Q, K, D)`.
        mask: bool, z's shape without the channel axis. Rows where it is False are not read, become zeros with indices
            -1, count in no loss and get gradient 0.
        levels: int64 like `mask`: row i passes the first `levels[i]` levels only (quantizer dropout). The others add
            nothing, have index -1 and count in no loss; with 0 the row is as if masked.
        metric, precision, channel_dim, backend: as in `nearest_code`. The metric governs the searches only.
        gradient: how the gradient of `quantized` reaches z, as in `vector_quantize`: once, from the sum of the codes,
            not once per level.

    Returns:
        quantized: z's shape, dtype and memory layout: `((e_0 + e_1) + e_2) + ...` in float32 (float64 where the
            codebooks are), rounded once to z's dtype. The same sum of the codes of `indices` gives the same bits.
        indices: int64, z's shape without the channel axis, then an axis Q.
        codebook_losses: `(Q,)`, or `(H, Q)`: `mean ||sg[r_q] - e_q||^2` over the elements of the rows that pass the
            level; its gradient reaches the level's codebook alone.
        commitment_losses: `mean ||r_q - sg[e_q]||^2`, the same values. With r_q = z - sg[e_0 + ... + e_{q-1}] the
            gradient of every level reaches z.

    A row that is not finite at a level gets index 0 there, makes the losses of the level NaN, gets a NaN gradient and
    gives nothing to the codebooks' gradient. With no rows, losses and gradients are 0. Deterministic to the bit.

    Raises:
        TypeError, ValueError: one sentence that names the argument, what was expected and what came.
        RuntimeError: where a second derivative is asked for.
    """
    result = residual_quantize_with_statistics(
        z,
        codebooks,
        mask=mask,
        levels=levels,
        metric=metric,
        gradient=gradient,
        precision=precision,
        channel_dim=channel_dim,
        backend=backend,
        statistics=False,
    )
    losses = (result.codebook_losses, result.commitment_losses)
    if codebooks.dim() == 3:
        losses = (losses[0].squeeze(0), losses[1].squeeze(0))
    return result.quantized, result.indices, *losses
