"""The entropies of soft assignments in plain PyTorch, on any device: block by block of rows, forward and backward.

Logits are one matrix product per block, of rows and codes from which the codes' mean was subtracted, in float32
(float64 where an input is, or where products are narrower than float32); sums over blocks are float64. Alive at once
are a few blocks of `_BLOCK_ELEMENTS` logits, never N x K. Nothing synchronises with the device, so nothing asks whether
logits leave float32's range, beyond 3e38: such rows get NaN here, where the C++ kernel computes them in float64.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..layout import empty_rows, layout_of
from ..temperature import host_temperature
from .quantize import product_is_float32, without_autocast

_BLOCK_ELEMENTS = 1 << 20  # logits in a block: 4 MB of float32


class _Codes(NamedTuple):
    """One codebook as the products take it."""

    centred: Tensor  # (K, D); zeros where a code is not finite
    centre: Tensor  # (D,) float64
    bias: Tensor  # (K,): of the logits; -inf where a code is not finite
    usable: Tensor  # (K,) bool
    scale: float  # of the rows: logits = scale * (row - centre) . centred + bias, but for a constant of the row
    euclidean: bool


def entropy(
    z: Tensor, codebook: Tensor, mask: Tensor | None, channel_dim: int, metric: str, temperature: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Both entropies, and what the backward pass reads; see `vqkernels.ops.entropy`."""
    divisor = host_temperature(temperature)
    rows, counted, finite = _rows(z, codebook, mask, channel_dim)
    codebooks = codebook if codebook.dim() == 3 else codebook[None]
    heads, number, size = rows.shape[0], rows.shape[1], codebooks.shape[1]
    out = torch.float64 if torch.float64 in (z.dtype, codebook.dtype) else torch.float32
    entropies = torch.zeros(heads, number, dtype=out, device=z.device)
    partitions = torch.zeros(heads, number, dtype=out, device=z.device)
    means = torch.zeros(heads, size, dtype=torch.float64, device=z.device)
    for head in range(heads):
        codes, step = _codes(codebooks[head], metric, divisor, z), max(1, _BLOCK_ELEMENTS // size)
        for start in range(0, number, step):
            block = slice(start, start + step)
            kept = counted[head, block, None]
            logits, _ = _logits(rows[head, block], codes)
            logarithms = torch.where(codes.usable, logits.log_softmax(1), 0.0)
            shares = torch.where(codes.usable & kept, logarithms.exp(), 0.0)
            entropies[head, block] = -(shares * logarithms).sum(1).to(out)
            partitions[head, block] = torch.where(kept.squeeze(1), logits.logsumexp(1), 0.0).to(out)
            means[head] += shares.sum(0, dtype=torch.float64)
    count = counted.sum(1).clamp_min(1).to(torch.float64)
    poison = torch.where(finite.all(1), 0.0, torch.nan).to(torch.float64)
    means = means / count[:, None]
    sample_entropy = entropies.sum(1, dtype=torch.float64) / count + poison
    codebook_entropy = torch.special.entr(means).sum(1) + poison
    return sample_entropy, codebook_entropy, entropies, partitions, means.to(out)


def entropy_backward(
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
    """Gradients of z and of the codebook; see `vqkernels.ops.entropy`.

    With w_ij = -grad_sample log p_ij - grad_codebook_entropy log m_j, the gradient of logit (i, j) is
    p_ij (w_ij - sum_k p_ik w_ik) over the number of rows.
    """
    divisor = host_temperature(temperature)
    rows, counted, finite = _rows(z, codebook, mask, channel_dim)
    codebooks = codebook if codebook.dim() == 3 else codebook[None]
    heads, number, size = rows.shape[0], rows.shape[1], codebooks.shape[1]
    grad_rows = torch.zeros(rows.shape, dtype=z.dtype, device=z.device)
    grad_codes = torch.zeros(codebooks.shape, dtype=torch.float64, device=z.device)
    count = counted.sum(1).clamp_min(1)
    for head in range(heads):
        codes, step = _codes(codebooks[head], metric, divisor, z), max(1, _BLOCK_ELEMENTS // size)
        work = codes.centred.dtype
        mean = mean_assignment[head].to(work)
        log_mean = torch.where(mean > 0, mean, 1.0).log()
        of_sample, of_codebook = grad_sample[head].to(work), grad_codebook_entropy[head].to(work)
        for start in range(0, number, step):
            block = slice(start, start + step)
            logits, scaled = _logits(rows[head, block], codes)
            logarithms = torch.where(codes.usable, logits.log_softmax(1), 0.0)
            shares = torch.where(codes.usable & counted[head, block, None], logarithms.exp(), 0.0)
            weights = -of_sample * logarithms - of_codebook * log_mean
            slopes = shares * (weights - (shares * weights).sum(1, keepdim=True)) / count[head]
            with without_autocast(z.device.type):
                grad_rows[head, block] = (codes.scale * (slopes @ codes.centred)).to(z.dtype)
                if codebook_gradient:
                    grad_codes[head] += slopes.T @ scaled
            if codebook_gradient and codes.euclidean:
                grad_codes[head] -= codes.scale * slopes.sum(0, dtype=torch.float64)[:, None] * codes.centred
    layout = layout_of(z, channel_dim, codebook.dim() == 3)
    grad_rows = torch.where(finite[..., None], grad_rows, torch.nan)
    split = grad_rows.view(layout.rows(z).movedim(1, 0).shape).movedim(0, 1)
    grad_codebook = grad_codes.to(codebook.dtype).view(codebook.shape) if codebook_gradient else codebook.new_empty(0)
    return empty_rows(z, layout).copy_(layout.restore_rows(split)), grad_codebook


def _rows(z: Tensor, codebook: Tensor, mask: Tensor | None, channel_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows `(heads, N, D)`, zeros where one does not count; which count; which are finite or masked."""
    layout = layout_of(z, channel_dim, codebook.dim() == 3)
    rows = layout.rows(z).movedim(1, 0).flatten(1, 2)
    finite = rows.isfinite().all(2)
    kept = torch.ones_like(finite) if mask is None else layout.per_row(mask).movedim(1, 0).flatten(1, 2)
    counted = kept & finite
    return torch.where(counted[..., None], rows, 0.0), counted, finite | ~kept


def _codes(codebook: Tensor, metric: str, temperature: float, z: Tensor) -> _Codes:
    wide = codebook.to(torch.float64)
    usable = wide.isfinite().all(1)
    wide = torch.where(usable[:, None], wide, 0.0)
    centre = wide.sum(0) / usable.sum().clamp_min(1)
    centred = torch.where(usable[:, None], wide - centre, 0.0)
    euclidean = metric == "euclidean"
    bias = -centred.square().sum(1) / temperature if euclidean else torch.zeros_like(centred[:, 0])
    bias = torch.where(usable | ~usable.any(), bias, -torch.inf)
    single = torch.float64 not in (z.dtype, codebook.dtype) and product_is_float32(z)
    work = torch.float32 if single else torch.float64
    scale = (2.0 if euclidean else 1.0) / temperature
    return _Codes(centred.to(work), centre, bias.to(work), usable, scale, euclidean)


def _logits(rows: Tensor, codes: _Codes) -> tuple[Tensor, Tensor]:
    """Logits `(B, K)` but for a constant of each row, and the scaled rows `(B, D)` that they are products of."""
    wide = rows.to(torch.float64)
    wide = wide - codes.centre if codes.euclidean else wide
    scaled = (codes.scale * wide).to(codes.centred.dtype)
    with without_autocast(rows.device.type):
        return torch.addmm(codes.bias, scaled, codes.centred.T), scaled
