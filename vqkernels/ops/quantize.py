"""Vector quantization: search, look-up, both losses and codebook statistics in one pass, with their gradients."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from ..backends import registry
from ..backends.layout import empty_rows, layout_of
from .checks import GRADIENTS, METRICS, PRECISIONS, check_choice, check_indices, check_mask, check_rows, row_shape
from .differentiation import FusedFunction, at_least_one, is_differentiated, kept_indices
from .registration import Operation


def _fake_forward(
    z: Tensor,
    codebook: Tensor,
    mask: Tensor | None,
    channel_dim: int,
    metric: str,
    precision: str,
    statistics: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batched = codebook.dim() == 3
    heads = z.shape[0] if batched else 1
    sums = torch.float64 if z.dtype == torch.float64 else torch.float32
    return (
        empty_rows(z, layout_of(z, channel_dim, batched)),
        z.new_empty(row_shape(z, channel_dim), dtype=torch.int64),
        z.new_empty((), dtype=torch.float64),
        z.new_empty((heads, codebook.shape[-2]) if statistics else (0,), dtype=torch.int64),
        z.new_empty((heads, *codebook.shape[-2:]) if statistics else (0,), dtype=sums),
    )


def _fake_lookup(
    z: Tensor, codebook: Tensor, indices: Tensor, mask: Tensor | None, channel_dim: int, statistics: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    quantized, _, squared_error, counts, sums = _fake_forward(z, codebook, mask, channel_dim, "", "", statistics)
    return quantized, squared_error, counts, sums


def _fake_backward(
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
    grad_z = empty_rows(z, layout_of(z, channel_dim, codebook.dim() == 3))
    if not codebook_gradient:
        return grad_z, codebook.new_empty((0,))
    return grad_z, torch.empty_like(codebook, memory_format=torch.contiguous_format)


quantize = Operation(
    "quantize",
    "(Tensor z, Tensor codebook, Tensor? mask, int channel_dim, str metric, str precision, bool statistics)"
    " -> (Tensor quantized, Tensor indices, Tensor squared_error, Tensor counts, Tensor sums)",
    _fake_forward,
)
lookup = Operation(
    "lookup",
    "(Tensor z, Tensor codebook, Tensor indices, Tensor? mask, int channel_dim, bool statistics)"
    " -> (Tensor quantized, Tensor squared_error, Tensor counts, Tensor sums)",
    _fake_lookup,
)
quantize_backward = Operation(
    "quantize_backward",
    "(Tensor grad_quantized, Tensor grad_codebook_loss, Tensor grad_commitment_loss, Tensor z, Tensor codebook,"
    " Tensor indices, int channel_dim, str gradient, bool codebook_gradient) -> (Tensor grad_z, Tensor grad_codebook)",
    _fake_backward,
)


def _forward(
    z: Tensor,
    codebook: Tensor,
    mask: Tensor | None,
    given: Tensor | None,
    channel_dim: int,
    metric: str,
    precision: str,
    statistics: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What `Quantization` holds."""
    kept = mask
    if given is None:
        quantized, indices, squared_error, counts, sums = quantize(
            backend, z, codebook, mask, channel_dim, metric, precision, statistics
        )
    else:
        indices = given.clone() if mask is None else torch.where(mask, given, -1)
        kept = indices >= 0
        quantized, squared_error, counts, sums = lookup(backend, z, codebook, indices, None, channel_dim, statistics)
    elements = z.numel() if kept is None else kept.sum() * codebook.shape[-1]
    wide = torch.float64 in (z.dtype, codebook.dtype)
    loss = (squared_error / at_least_one(elements)).to(torch.float64 if wide else torch.float32)
    return quantized, indices, loss, loss.clone(), counts, sums


class VectorQuantizeFunction(FusedFunction):
    """One fused forward operator, one fused backward operator; arguments and results as in `quantize_with_statistics`.

    Saves z, the codebook and a copy of the indices: nothing of size N x K, no residual, no one-hot, and nothing that
    the caller gets and may overwrite.
    """

    @staticmethod
    def forward(
        z: Tensor,
        codebook: Tensor,
        mask: Tensor | None,
        given: Tensor | None,
        channel_dim: int,
        metric: str,
        precision: str,
        statistics: bool,
        gradient: str,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        found = _forward(z, codebook, mask, given, channel_dim, metric, precision, statistics, backend)
        return *found, kept_indices(found[1])

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple, output: tuple) -> None:
        z, codebook, _, _, channel_dim, _, _, _, gradient, backend = inputs
        _, indices, _, _, counts, sums, kept = output
        ctx.mark_non_differentiable(indices, counts, sums, kept)
        ctx.save_for_backward(z, codebook, kept)
        ctx.arguments = channel_dim, gradient, backend  # type: ignore[attr-defined]

    @staticmethod
    def backward(ctx, grad_quantized, _indices, grad_codebook_loss, grad_commitment_loss, *_):
        channel_dim, gradient, backend = ctx.arguments
        grad_z, grad_codebook = _QuantizeBackward.apply(
            grad_quantized,
            grad_codebook_loss,
            grad_commitment_loss,
            *ctx.saved_tensors,
            channel_dim,
            gradient,
            ctx.needs_input_grad[1],
            backend,
        )
        return grad_z, grad_codebook if ctx.needs_input_grad[1] else None, *(8 * [None])


class _QuantizeBackward(FusedFunction):
    """The gradient as a Function of its own, so that asking for a second derivative is an error, not a wrong zero."""

    @staticmethod
    def forward(
        grad_quantized,
        grad_codebook_loss,
        grad_commitment_loss,
        z,
        codebook,
        indices,
        channel_dim,
        gradient,
        codebook_gradient,
        backend,
    ):
        grad_losses = (grad_codebook_loss, grad_commitment_loss)
        return quantize_backward(
            backend, grad_quantized, *grad_losses, z, codebook, indices, channel_dim, gradient, codebook_gradient
        )

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple, output: tuple) -> None:
        pass

    @staticmethod
    def backward(ctx, grad_z, grad_codebook):
        raise RuntimeError("vqkernels does not support double backward: vector_quantize is differentiable only once")


class Quantization(NamedTuple):
    """What one fused pass over canonical rows yields. Statistics are empty unless they were asked for."""

    quantized: Tensor
    indices: Tensor
    codebook_loss: Tensor
    commitment_loss: Tensor
    counts: Tensor
    sums: Tensor


def quantize_with_statistics(
    z: Tensor,
    codebook: Tensor,
    *,
    mask: Tensor | None = None,
    metric: str = "euclidean",
    gradient: str = "straight_through",
    precision: str = "exact",
    channel_dim: int = -1,
    backend: str = "auto",
    statistics: bool = True,
    indices: Tensor | None = None,
) -> Quantization:
    """`vector_quantize` with the statistics of the same rows: counts `(heads, K)`, sums `(heads, K, D)`.

    `indices` (int64, z's shape without channels, in [-1, K)) skips the search, as after sampling: everything else is as
    if the search had found them. -1 marks a row like a mask does. Out of range they raise on the CPU; elsewhere such a
    row becomes NaN and makes the losses NaN. `metric` and `precision` mean nothing then.
    """
    check_choice("metric", metric, METRICS)
    check_choice("gradient", gradient, GRADIENTS)
    check_choice("precision", precision, PRECISIONS)
    channel_dim = check_rows(z, codebook, channel_dim)
    check_mask(mask, z, channel_dim)
    check_indices(indices, z, channel_dim)
    chosen = registry.resolve(backend, z.device, "quantize" if indices is None else "lookup")
    inputs = (z, codebook, mask, indices, channel_dim, metric, precision, statistics)
    if not is_differentiated(z, codebook):
        return Quantization(*_forward(*inputs, chosen))
    return Quantization(*VectorQuantizeFunction.apply(*inputs, gradient, chosen)[:6])


def vector_quantize(
    z: Tensor,
    codebook: Tensor,
    *,
    mask: Tensor | None = None,
    metric: str = "euclidean",
    gradient: str = "straight_through",
    precision: str = "exact",
    channel_dim: int = -1,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Replaces every row of z by its nearest code (van den Oord et al. 2017, equations 1 to 3).

    Args:
        z: `(..., D)`, or any layout whose channel axis is `channel_dim`; float32, bfloat16, float16 or float64.
        codebook: `(K, D)`, or `(H, K, D)` for one codebook per head with z `(H, ..., D)`; its dtype may differ from
            z's.
        mask: bool, z's shape without the channel axis. Rows where it is False are not read, become zeros with index -1,
            count in no loss and get gradient 0.
        metric, precision, channel_dim, backend: as in `nearest_code`. The metric governs the search only.
        gradient: how the gradient g of `quantized` reaches z. "straight_through" (van den Oord et al.): unchanged.
            "rotation" (Fifty et al. 2024, "Restructuring Vector Quantization with the Rotation Trick"): through the
            rotation and scaling that take z to its code e, held constant: |e|/|z| (g - 2 (g.w) w + 2 (g.q) u) with
            u = z/|z|, q = e/|e|, w = (u + q)/|u + q|, w = 0 where u = -q. A row with z = 0 or e = 0 has no direction
            and gets g. The forward value is exactly the code with both.

    Returns:
        quantized: z's shape, dtype and memory layout.
        indices: int64, z's shape without the channel axis.
        codebook_loss: `mean ||sg[z] - e||^2` over all unmasked elements, 0-d float32 (float64 where an input is). Its
            gradient reaches the codebook alone.
        commitment_loss: `mean ||z - sg[e]||^2`, the same value. Its gradient reaches z alone.

    A row with a NaN or an infinity gets index 0 and code 0, makes both losses NaN, gets a NaN gradient itself and gives
    nothing to the codebook's gradient. With no rows, losses and gradients are 0. Deterministic to the bit.

    Raises:
        TypeError, ValueError: one sentence that names the argument, what was expected and what came.
        RuntimeError: where a second derivative is asked for.
    """
    return quantize_with_statistics(
        z,
        codebook,
        mask=mask,
        metric=metric,
        gradient=gradient,
        precision=precision,
        channel_dim=channel_dim,
        backend=backend,
        statistics=False,
    )[:4]
