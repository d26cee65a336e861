"""Residual vector quantization: every level's search, look-up, losses and statistics in one call, with gradients."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from ..backends import registry
from ..backends.options import QuantizeOptions, schema_of
from .checks import check_levels, check_mask, check_options, check_rows
from .differentiation import at_least_one, is_differentiated
from .quantization import QuantizeFunction, fake_quantize, mean, save_for_backward, with_kept_indices
from .registration import Operation


def _fake(z, codebooks, _levels, *options):
    return fake_quantize(z, codebooks, QuantizeOptions(*options), stacked=True)


residual_quantize = Operation(
    "residual_quantize",
    f"(Tensor z, Tensor codebooks, Tensor? levels, {schema_of(QuantizeOptions)})"
    " -> (Tensor quantized, Tensor indices, Tensor squared_errors, Tensor counts, Tensor sums)",
    _fake,
)


def _forward(
    z: Tensor, codebooks: Tensor, levels: Tensor | None, options: QuantizeOptions, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What `ResidualQuantization` holds."""
    quantized, indices, squared_errors, counts, sums = residual_quantize(backend, z, codebooks, levels, *options)
    heads = codebooks.shape[0] if codebooks.dim() == 4 else 1
    if levels is None:
        rows: Tensor | int = z.numel() // (heads * codebooks.shape[-1])
    else:
        rows = (indices >= 0).view(heads, -1, indices.shape[-1]).sum(1)
    losses = mean(squared_errors, at_least_one(rows) * codebooks.shape[-1], z, codebooks)
    return quantized, indices, losses, losses.clone(), counts, sums


class ResidualVectorQuantizeFunction(QuantizeFunction):
    """`residual_quantize_with_statistics` as a Function: (z, codebooks, levels, *QuantizeOptions, gradient, backend).

    It returns the fields of `ResidualQuantization`, and the indices once more. The backward pass computes the residuals
    again.
    """

    @staticmethod
    def forward(z, codebooks, levels, channel_dim, metric, precision, statistics, gradient, backend):
        options = QuantizeOptions(channel_dim, metric, precision, statistics)
        return with_kept_indices(_forward(z, codebooks, levels, options, backend))

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple, output: tuple) -> None:
        save_for_backward(ctx, inputs, output, stacked=True)


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
    options = QuantizeOptions(channel_dim, metric, precision, statistics)
    return _quantize(z, codebooks, mask, levels, options, gradient, backend)


def _quantize(
    z: Tensor,
    codebooks: Tensor,
    mask: Tensor | None,
    levels: Tensor | None,
    options: QuantizeOptions,
    gradient: str,
    backend: str,
) -> ResidualQuantization:
    check_options(options, gradient)
    stacked = isinstance(codebooks, Tensor) and codebooks.dim() in (3, 4)
    if not stacked or (not torch.jit.is_tracing() and codebooks.shape[-3] == 0):
        got = list(codebooks.shape) if isinstance(codebooks, Tensor) else type(codebooks).__name__
        raise ValueError(f"codebooks must be (Q, K, D) of at least one level, or (H, Q, K, D) with heads, got {got}")
    options = QuantizeOptions(check_rows(z, codebooks[..., 0, :, :], options.channel_dim), *options[1:])
    check_mask(mask, z, options.channel_dim)
    check_levels(levels, z, options.channel_dim)
    if mask is not None:
        levels = torch.where(mask, codebooks.shape[-3] if levels is None else levels, 0)
    chosen = registry.resolve(backend, z.device, "residual_quantize")
    if not is_differentiated(z, codebooks):
        return ResidualQuantization(*_forward(z, codebooks, levels, options, chosen))
    found = ResidualVectorQuantizeFunction.apply(z, codebooks, levels, *options, gradient, chosen)
    return ResidualQuantization(*found[:6])


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
    options = QuantizeOptions(channel_dim, metric, precision, statistics=False)
    result = _quantize(z, codebooks, mask, levels, options, gradient, backend)
    losses = (result.codebook_losses, result.commitment_losses)
    if codebooks.dim() == 3:
        losses = (losses[0].squeeze(0), losses[1].squeeze(0))
    return result.quantized, result.indices, *losses
