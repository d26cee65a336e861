"""Vector quantization: search, look-up, both losses and codebook statistics in one pass, with their gradients."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from ..backends import eager, registry
from .layout import METRICS, PRECISIONS, check_choice, check_mask, codebook_heads, layout_of
from .registration import Operation


def _fake_forward(
    z: Tensor, codebook: Tensor, mask: Tensor | None, metric: str, precision: str, statistics: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    heads, size, channels = codebook.shape
    sums = torch.float64 if z.dtype == torch.float64 else torch.float32
    return (
        torch.empty_like(z),
        z.new_empty(z.shape[:3], dtype=torch.int64),
        z.new_empty((), dtype=torch.float64),
        z.new_empty((heads, size) if statistics else (0,), dtype=torch.int64),
        z.new_empty((heads, size, channels) if statistics else (0,), dtype=sums),
    )


def _fake_backward(
    grad_quantized: Tensor,
    grad_codebook_loss: Tensor,
    grad_commitment_loss: Tensor,
    z: Tensor,
    codebook: Tensor,
    indices: Tensor,
    codebook_gradient: bool,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(z), torch.empty_like(codebook) if codebook_gradient else codebook.new_empty((0,))


quantize = Operation(
    "quantize",
    "(Tensor z, Tensor codebook, Tensor? mask, str metric, str precision, bool statistics)"
    " -> (Tensor quantized, Tensor indices, Tensor squared_error, Tensor counts, Tensor sums)",
    _fake_forward,
    eager.quantize,
)
quantize_backward = Operation(
    "quantize_backward",
    "(Tensor grad_quantized, Tensor grad_codebook_loss, Tensor grad_commitment_loss, Tensor z, Tensor codebook,"
    " Tensor indices, bool codebook_gradient) -> (Tensor grad_z, Tensor grad_codebook)",
    _fake_backward,
    eager.quantize_backward,
)


class VectorQuantizeFunction(torch.autograd.Function):
    """One fused forward operator, one fused backward operator. Shapes are canonical; see `vector_quantize`.

    Saves z, the codebook and the indices: nothing of size N x K, no residual, no one-hot.
    """

    @staticmethod
    def forward(
        z: Tensor,
        codebook: Tensor,
        mask: Tensor | None,
        metric: str,
        precision: str,
        statistics: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        quantized, indices, squared_error, counts, sums = quantize(
            backend, z, codebook, mask, metric, precision, statistics
        )
        if mask is None:
            loss = squared_error / max(z.numel(), 1)
        else:
            loss = squared_error / (mask.sum() * z.shape[3]).clamp_min(1)
        wide = torch.float64 in (z.dtype, codebook.dtype)
        loss = loss.to(torch.float64 if wide else torch.float32)
        return quantized, indices, loss, loss.clone(), counts, sums

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple, output: tuple) -> None:
        z, codebook, _, _, _, _, backend = inputs
        _, indices, _, _, counts, sums = output
        ctx.mark_non_differentiable(indices, counts, sums)
        ctx.save_for_backward(z, codebook, indices)
        ctx.backend = backend  # type: ignore[attr-defined]

    @staticmethod
    def backward(ctx, grad_quantized, _indices, grad_codebook_loss, grad_commitment_loss, _counts, _sums):
        z, codebook, indices = ctx.saved_tensors
        grad_z, grad_codebook = _QuantizeBackward.apply(
            grad_quantized,
            grad_codebook_loss,
            grad_commitment_loss,
            z,
            codebook,
            indices,
            ctx.needs_input_grad[1],
            ctx.backend,
        )
        return grad_z, grad_codebook if ctx.needs_input_grad[1] else None, None, None, None, None, None


class _QuantizeBackward(torch.autograd.Function):
    """The gradient as a Function of its own, so that asking for a second derivative is an error, not a wrong zero."""

    @staticmethod
    def forward(
        grad_quantized, grad_codebook_loss, grad_commitment_loss, z, codebook, indices, needs_codebook, backend
    ):
        return quantize_backward(
            backend, grad_quantized, grad_codebook_loss, grad_commitment_loss, z, codebook, indices, needs_codebook
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
    precision: str = "exact",
    channel_dim: int = -1,
    backend: str = "auto",
    statistics: bool = True,
) -> Quantization:
    """`vector_quantize` with the statistics of the same rows: counts `(heads, K)`, sums `(heads, K, D)`."""
    check_choice("metric", metric, METRICS)
    check_choice("precision", precision, PRECISIONS)
    layout = layout_of(z, codebook, channel_dim)
    check_mask(mask, z, channel_dim)
    rows = layout.rows(z)
    row_mask = None if mask is None else layout.per_row(mask, rows)
    chosen = registry.resolve(backend, z.device.type)
    quantized, indices, codebook_loss, commitment_loss, counts, sums = VectorQuantizeFunction.apply(
        rows, codebook_heads(codebook), row_mask, metric, precision, statistics, chosen
    )
    return Quantization(
        layout.restore_rows(quantized),
        layout.restore_per_row(indices),
        codebook_loss,
        commitment_loss,
        counts,
        sums,
    )


def vector_quantize(
    z: Tensor,
    codebook: Tensor,
    *,
    mask: Tensor | None = None,
    metric: str = "euclidean",
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

    Returns:
        quantized: z's shape, dtype and memory layout; its gradient passes straight through to z.
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
        precision=precision,
        channel_dim=channel_dim,
        backend=backend,
        statistics=False,
    )[:4]
