"""Vector quantization: search, look-up, both losses and codebook statistics in one pass, with their gradients."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from ..backends import registry
from ..backends.options import QuantizeOptions, schema_of
from .checks import check_indices, check_mask, check_options, check_rows
from .differentiation import is_differentiated
from .quantization import QuantizeFunction, fake_quantize, mean, save_for_backward, with_kept_indices
from .registration import Operation


def _fake_forward(z, codebook, _mask, *options):
    return fake_quantize(z, codebook, QuantizeOptions(*options), stacked=False)


def _fake_lookup(z, codebook, _indices, _mask, channel_dim, statistics):
    quantized, _, *found = fake_quantize(z, codebook, QuantizeOptions(channel_dim, "", "", statistics), stacked=False)
    return quantized, *found


quantize = Operation(
    "quantize",
    f"(Tensor z, Tensor codebook, Tensor? mask, {schema_of(QuantizeOptions)})"
    " -> (Tensor quantized, Tensor indices, Tensor squared_error, Tensor counts, Tensor sums)",
    _fake_forward,
)
lookup = Operation(
    "lookup",
    "(Tensor z, Tensor codebook, Tensor indices, Tensor? mask, int channel_dim, bool statistics)"
    " -> (Tensor quantized, Tensor squared_error, Tensor counts, Tensor sums)",
    _fake_lookup,
)


def _forward(
    z: Tensor, codebook: Tensor, mask: Tensor | None, given: Tensor | None, options: QuantizeOptions, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What `Quantization` holds."""
    kept = mask
    if given is None:
        quantized, indices, squared_error, counts, sums = quantize(backend, z, codebook, mask, *options)
    else:
        indices = given.clone() if mask is None else torch.where(mask, given, -1)
        kept = indices >= 0
        rest = (None, options.channel_dim, options.statistics)
        quantized, squared_error, counts, sums = lookup(backend, z, codebook, indices, *rest)
    elements = z.numel() if kept is None else kept.sum() * codebook.shape[-1]
    loss = mean(squared_error, elements, z, codebook)
    return quantized, indices, loss, loss.clone(), counts, sums


class VectorQuantizeFunction(QuantizeFunction):
    """`quantize_with_statistics` as a Function: (z, codebook, mask, indices, *QuantizeOptions, gradient, backend).

    It returns the fields of `Quantization`, and the indices once more.
    """

    @staticmethod
    def forward(z, codebook, mask, given, channel_dim, metric, precision, statistics, gradient, backend):
        options = QuantizeOptions(channel_dim, metric, precision, statistics)
        return with_kept_indices(_forward(z, codebook, mask, given, options, backend))

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple, output: tuple) -> None:
        save_for_backward(ctx, inputs, output, stacked=False)


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
    options = QuantizeOptions(channel_dim, metric, precision, statistics)
    return _quantize(z, codebook, mask, indices, options, gradient, backend)


def _quantize(
    z: Tensor,
    codebook: Tensor,
    mask: Tensor | None,
    given: Tensor | None,
    options: QuantizeOptions,
    gradient: str,
    backend: str,
) -> Quantization:
    check_options(options, gradient)
    options = QuantizeOptions(check_rows(z, codebook, options.channel_dim), *options[1:])
    check_mask(mask, z, options.channel_dim)
    check_indices(given, z, options.channel_dim)
    chosen = registry.resolve(backend, z.device, "quantize" if given is None else "lookup")
    if not is_differentiated(z, codebook):
        return Quantization(*_forward(z, codebook, mask, given, options, chosen))
    return Quantization(*VectorQuantizeFunction.apply(z, codebook, mask, given, *options, gradient, chosen)[:6])


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
    options = QuantizeOptions(channel_dim, metric, precision, statistics=False)
    return _quantize(z, codebook, mask, None, options, gradient, backend)[:4]
