"""The operators of a layer in eval mode in plain PyTorch without loops over rows: what exporters can translate.

The exporter of `torch.onnx.export(dynamo=False)` knows fewer operators and no `movedim` from a negative axis.

The search becomes one float64 product and an argmin over an N x K matrix: the contract's index unless two codes are
equally near up to about 1e-15 of the scores, and the lowest index among equals. Statistics belong to training and are
not exported.
"""

from typing import Any

import torch
from torch import Tensor

from .options import QuantizeOptions, SearchOptions


def nearest(z: Tensor, codebook: Tensor, mask: Tensor | None, *options: Any) -> tuple[Tensor, Tensor]:
    wanted = SearchOptions(*options)
    indices = _search(z.movedim(wanted.channel_dim, -1), codebook, mask, wanted.metric)
    return indices, (indices >= 0).sum()


def quantize(
    z: Tensor, codebook: Tensor, mask: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    wanted = QuantizeOptions(*options)
    channel_dim = wanted.channel_dim
    if wanted.statistics:
        raise ValueError("statistics belong to training: export the model in eval mode")
    rows = z.movedim(channel_dim, -1)
    indices = _search(rows, codebook, mask, wanted.metric)
    chosen = indices.clamp_min(0)
    if codebook.dim() == 3:
        head = torch.arange(codebook.shape[0], device=z.device).view(-1, *[1] * (chosen.dim() - 1))
        codes = codebook[head, chosen]
    else:
        codes = codebook[chosen]
    kept = (indices >= 0).unsqueeze(-1)
    quantized = torch.where(kept, codes, 0.0).to(z.dtype).movedim(z.dim() - 1, channel_dim)
    difference = torch.where(kept, rows.to(torch.float64) - codes.to(torch.float64), 0.0)
    infinite = torch.where(kept, rows.to(torch.float64) * 0.0, 0.0)  # NaN where a row is not finite, as the loss is
    error = (difference.square() + infinite).sum()
    return quantized, indices, error, indices.new_zeros(0), codebook.new_zeros(0)


def residual_quantize(
    z: Tensor, codebooks: Tensor, levels: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    wanted = QuantizeOptions(*options)
    channel_dim = wanted.channel_dim
    if wanted.statistics:
        raise ValueError("statistics belong to training: export the model in eval mode")
    batched, dim = codebooks.dim() == 4, codebooks.shape[-1]
    rows = z.movedim(channel_dim, -1)
    stack = codebooks if batched else codebooks.unsqueeze(0)
    rest = rows.reshape(stack.shape[0], -1, dim)
    rest = rest.to(torch.float64 if z.dtype == torch.float64 else torch.float32)
    total = torch.zeros_like(rest, dtype=torch.float64 if codebooks.dtype == torch.float64 else torch.float32)
    indices, errors = [], []
    for q in range(stack.shape[1]):
        mask = None if levels is None else levels.reshape(rest.shape[:2]) > q
        index = _search(rest, stack[:, q], mask, wanted.metric)
        codes = stack[:, q].gather(1, index.clamp_min(0).unsqueeze(-1).expand(-1, -1, dim))
        kept = (index >= 0).unsqueeze(-1)
        difference = torch.where(kept, rest.to(torch.float64) - codes.to(torch.float64), 0.0)
        infinite = torch.where(kept, rest.to(torch.float64) * 0.0, 0.0)
        errors.append((difference.square() + infinite).sum((1, 2)))
        total = torch.where(kept, codes.to(total.dtype) if q == 0 else total + codes, total)
        rest = torch.where(kept, difference.to(rest.dtype), rest)
        indices.append(index)
    quantized = total.to(z.dtype).view(rows.shape).movedim(z.dim() - 1, channel_dim)
    stacked = torch.stack(indices, -1).view(*rows.shape[:-1], stack.shape[1])
    return quantized, stacked, torch.stack(errors, -1), stacked.new_zeros(0), codebooks.new_zeros(0)


def _search(rows: Tensor, codebook: Tensor, mask: Tensor | None, metric: str) -> Tensor:
    """Indices of rows `(..., D)`, or `(H, ..., D)` with codebooks `(H, K, D)`."""
    wide, codes = rows.to(torch.float64), codebook.to(torch.float64)
    finite, usable = wide.isfinite().all(-1), codes.isfinite().all(-1)
    wide, codes = torch.where(finite.unsqueeze(-1), wide, 0.0), torch.where(usable.unsqueeze(-1), codes, 0.0)
    square = codes.square().sum(-1)
    # One product per head; flattened, because leading axes of rows are not those of the codes.
    heads = codes if codebook.dim() == 3 else codes.unsqueeze(0)
    square, usable = square.view(heads.shape[0], 1, -1), usable.view(heads.shape[0], 1, -1)
    score = -(wide.reshape(heads.shape[0], -1, rows.shape[-1]) @ heads.transpose(1, 2))
    if metric == "euclidean":
        score = score + square / 2
    if metric == "cosine":
        score = score / torch.where(square > 0, square.sqrt(), 1.0)
    indices = torch.where(usable, score, torch.inf).argmin(-1).view(rows.shape[:-1])
    indices = torch.where(finite, indices, 0)
    return indices if mask is None else torch.where(mask, indices, -1)
