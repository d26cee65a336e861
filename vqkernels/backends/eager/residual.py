"""Residual quantization in plain PyTorch: the fallback's search, level after level, on one residual.

One residual and one sum of codes of z's size are alive, whatever the number of levels; nothing N x K beyond the blocks
of the search. The twin of csrc/bindings/residual.cpp.
"""

from typing import Any

import torch
from torch import Tensor

from ..layout import empty_rows, layout_of
from ..options import GradientOptions, QuantizeOptions
from . import quantize as eager
from .rotation import rotate_gradient


def residual_quantize(
    z: Tensor,
    codebooks: Tensor,
    levels: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Sum of codes, indices, squared errors and statistics of all levels; see `vqkernels.ops.residual`."""
    wanted = QuantizeOptions(*options)
    layout, books = layout_of(z, wanted.channel_dim, codebooks.dim() == 4), _heads(codebooks)
    heads, number, size, dim = books.shape
    passed = None if levels is None else layout.per_row(levels)
    residual, total = _start(layout.rows(z), books)
    shape = residual.shape[:3]
    indices = torch.empty(*shape, number, dtype=torch.int64, device=z.device)
    errors = torch.zeros(heads, number, dtype=torch.float64, device=z.device)
    counts = torch.zeros((heads, number, size) if wanted.statistics else 0, dtype=torch.int64, device=z.device)
    sums = torch.zeros(
        (heads, number, size, dim) if wanted.statistics else 0,
        dtype=torch.float64 if z.dtype == torch.float64 else torch.float32,
        device=z.device,
    )
    search = wanted.search._replace(channel_dim=3)
    for q in range(number):
        rows = residual.movedim(1, 0)  # (head, batch, position, channel), as the fallback's search wants it
        mask = None if passed is None else (passed > q).movedim(1, 0)
        index, _ = eager.nearest(rows, books[:, q], mask, *search)
        if wanted.statistics:
            counts[:, q], sums[:, q] = eager.statistics(rows, index, size, mask, 3, True)
        index = index.movedim(0, 1)
        indices[..., q] = index
        kept = (index >= 0).unsqueeze(-1)
        codes = _codes(books[:, q], index)
        difference = torch.where(kept, residual.to(torch.float64) - codes.to(torch.float64), 0.0)
        # The square of an infinity is not NaN: a row that is not finite makes the error NaN by contract.
        poison = torch.where(kept, residual.to(torch.float64) * 0.0, 0.0)
        errors[:, q] = difference.square().sum((0, 2, 3)) + poison.sum((0, 2, 3))
        total = torch.where(kept, codes.to(total.dtype) if q == 0 else total + codes, total)
        residual = torch.where(kept, difference.to(residual.dtype), residual)
    quantized = empty_rows(z, layout).copy_(layout.restore_rows(total))
    by_level = [layout.restore_per_row(indices[..., q]) for q in range(number)]
    return quantized, torch.stack(by_level, -1), errors, counts, sums


def residual_quantize_backward(
    grad_quantized: Tensor,
    grad_codebook_losses: Tensor,
    grad_commitment_losses: Tensor,
    z: Tensor,
    codebooks: Tensor,
    indices: Tensor,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    """Gradients of z and of the codebooks; see `vqkernels.ops.residual`."""
    wanted = GradientOptions(*options)
    layout, books = layout_of(z, wanted.channel_dim, codebooks.dim() == 4), _heads(codebooks)
    heads, number, size, dim = books.shape
    rows = layout.rows(z)
    residual, total = _start(rows, books)
    grad_books = torch.zeros_like(books, memory_format=torch.contiguous_format) if wanted.codebook_gradient else None
    commitment, bad = torch.zeros_like(rows, dtype=torch.float64), torch.zeros_like(rows[..., :1], dtype=torch.bool)
    for q in range(number):
        index = layout.per_row(indices[..., q])
        kept = (index >= 0).unsqueeze(-1)
        elements = kept.sum((0, 2, 3)).clamp_min(1).to(torch.float64) * dim  # (head,)
        codes = _codes(books[:, q], index)
        finite = torch.where(kept, residual, 0.0).isfinite().all(-1, keepdim=True)
        bad |= kept & ~finite
        difference = torch.where(kept, residual.to(torch.float64) - codes.to(torch.float64), 0.0)
        weight = (grad_commitment_losses[:, q] * 2.0 / elements).view(-1, 1, 1)
        commitment += torch.where(kept, weight * difference, 0.0)
        total = torch.where(kept, codes.to(total.dtype) if q == 0 else total + codes, total)
        residual = torch.where(kept, difference.to(residual.dtype), residual)
        for head in range(heads if grad_books is not None else 0):
            assert grad_books is not None
            counted = (kept & finite)[:, head].reshape(-1)
            used_code = index[:, head].reshape(-1)[counted]
            sums = eager.segment_sums(-difference[:, head].reshape(-1, dim)[counted], used_code, size)
            used = torch.bincount(used_code, minlength=size) > 0
            scaled = grad_codebook_losses[head, q] * 2.0 / elements[head] * sums
            grad_books[head, q] = torch.where(used[:, None], scaled, 0.0).to(books.dtype)
    passes = (layout.per_row(indices[..., 0]) >= 0).unsqueeze(-1)
    through = layout.rows(grad_quantized).to(torch.float64)
    if wanted.gradient == "rotation":
        through = rotate_gradient(through, torch.where(passes, rows, 0.0).to(torch.float64), total.to(torch.float64))
    grad_rows = torch.where(passes, torch.where(bad, torch.nan, through + commitment), 0.0).to(z.dtype)
    grad_codebooks = codebooks.new_empty(0) if grad_books is None else grad_books.view(codebooks.shape)
    return empty_rows(z, layout).copy_(layout.restore_rows(grad_rows)), grad_codebooks


def _heads(codebooks: Tensor) -> Tensor:
    return codebooks if codebooks.dim() == 4 else codebooks.unsqueeze(0)


def _start(rows: Tensor, books: Tensor) -> tuple[Tensor, Tensor]:
    """The first residual, and a sum of codes: both (batch, head, position, channel)."""
    residual = rows.to(torch.float64 if rows.dtype == torch.float64 else torch.float32)
    sums = torch.float64 if books.dtype == torch.float64 else torch.float32
    return residual, torch.zeros(rows.shape, dtype=sums, device=rows.device)


def _codes(books: Tensor, index: Tensor) -> Tensor:
    """One level's codes `(H, K, D)` of (batch, head, position)."""
    heads = torch.arange(len(books), device=books.device).view(1, -1, 1)
    return books[heads, index.clamp_min(0)]
