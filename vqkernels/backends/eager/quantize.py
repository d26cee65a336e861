"""The fallback: the contract in plain PyTorch at the speed of a matrix product, on any device.

Rows go in chunks, so that a block of scores stays below `_BLOCK_ELEMENTS`. A float32 product gives every score with a
proved error bound (the argument stands in csrc/cpu/codebook.h; a product may add its terms in any order, so the same
constant holds); rows whose two smallest bounds are not clearly apart have their candidates scored again in float64,
channel by channel, as the contract says. Ties: lowest index.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ...reference import code_norms
from ..layout import empty_rows, layout_of
from ..options import GradientOptions, QuantizeOptions, SearchOptions
from .rotation import rotate_gradient

_BLOCK_ELEMENTS = 1 << 22  # scores alive at once: 16 MB of float32


def nearest(z: Tensor, codebook: Tensor, mask: Tensor | None, *options: Any) -> tuple[Tensor, Tensor]:
    """Indices of z's shape without channels, and how many unmasked rows the filter decided."""
    wanted = SearchOptions(*options)
    layout = layout_of(z, wanted.channel_dim, codebook.dim() == 3)
    rows, codes = layout.rows(z), _heads(codebook)
    kept = None if mask is None else layout.per_row(mask)
    indices = torch.empty(rows.shape[:3], dtype=torch.int64, device=z.device)
    decided = torch.zeros((), dtype=torch.int64, device=z.device)
    for head in range(rows.shape[1]):
        flat = rows[:, head].reshape(-1, rows.shape[3])
        found, count = _nearest(
            flat, codes[head], None if kept is None else kept[:, head].reshape(-1), wanted.metric, wanted.precision
        )
        indices[:, head] = found.view(rows.shape[0], rows.shape[2])
        decided += count
    return layout.restore_per_row(indices).contiguous(), decided


def _heads(codebook: Tensor) -> Tensor:
    return codebook if codebook.dim() == 3 else codebook.unsqueeze(0)


def _nearest(rows: Tensor, codes: Tensor, kept: Tensor | None, metric: str, precision: str) -> tuple[Tensor, Tensor]:
    if kept is not None:  # a masked row may hold anything: it is replaced before any arithmetic
        rows = torch.where(kept[:, None], rows, torch.zeros((), dtype=rows.dtype, device=rows.device))
    finite = rows.isfinite().all(1)
    rows = torch.where(finite[:, None], rows, torch.zeros((), dtype=rows.dtype, device=rows.device))
    usable = codes.isfinite().all(1).nonzero().squeeze(1)
    if len(usable) == 0:
        found = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
        certified = torch.ones_like(finite)
    else:
        codes = codes[usable]
        step = max(1, _BLOCK_ELEMENTS // max(codes.shape))
        parts = [_search(block, codes, metric, precision) for block in rows.split(step)] if len(rows) else []
        found = torch.cat([usable[i] for i, _ in parts]) if parts else usable.new_empty(0)
        certified = torch.cat([c for _, c in parts]) if parts else finite
    found = torch.where(finite, found, 0)
    certified = certified | ~finite
    if kept is not None:
        found = torch.where(kept, found, -1)
        certified = certified & kept
    return found, certified.sum()


def _search(rows: Tensor, codes: Tensor, metric: str, precision: str) -> tuple[Tensor, Tensor]:
    """Index of each row among finite codes, and whether the filter decided it."""
    wide, wide_codes = rows.to(torch.float64), codes.to(torch.float64)
    direction_is_known = torch.ones((), dtype=torch.bool, device=rows.device)
    if metric == "cosine":
        norm = code_norms(wide_codes)
        direction_is_known = ((norm == 0) | ((norm > 2.0**-480) & (norm < 2.0**480))).all()
        target = torch.where(norm[:, None] > 0, wide_codes / norm.clamp_min(1e-300)[:, None], 0.0)
    else:
        centre = wide_codes.mean(0) if metric == "euclidean" else wide_codes.new_zeros(())
        largest = (wide_codes - centre).abs().max()
        scale = torch.exp2(-torch.frexp(largest).exponent.to(torch.float64).clamp(-126, 126))
        wide, target = (wide - centre) * scale, (wide_codes - centre) * scale
    half_square = target.square().sum(1) / 2 if metric == "euclidean" else target.new_zeros(len(target))

    # Lower bounds L of the scores by one product: the error of each code is a channel of its own.
    terms = rows.shape[1] + 16.0
    single = product_is_float32(rows)
    unit, work = (2.0**-24, torch.float32) if single else (2.0**-53, torch.float64)
    provable = terms * unit < 0.01
    error = 1.02 * terms * unit / (1 - terms * unit) if provable and precision == "exact" else 0.0
    row_norm, code_norm = wide.square().sum(1).sqrt(), target.square().sum(1).sqrt()
    left = torch.cat([wide, row_norm[:, None]], 1).to(work)
    right = torch.cat([-target, -error * 1.0001 * code_norm[:, None]], 1).to(work)
    with without_autocast(rows.device.type):
        bound = torch.addmm((half_square * (1 - error)).to(work), left, right.T)
    best, slot = bound.min(1)
    if precision == "fast":
        return slot, torch.ones_like(slot, dtype=torch.bool)

    slack = 2 * error * 1.001 * (half_square[slot] + row_norm * code_norm[slot])
    if metric == "euclidean":
        slack = slack + terms * 2.0**-52 * (row_norm + code_norm[slot]) ** 2
    slack = slack + 4 * terms * (2.0**-123 * (1 + row_norm) + error * 2.0**-62)
    in_range = (row_norm < 2.0**60) & (target.abs().max() <= 1) & direction_is_known & provable
    threshold = torch.where(in_range, best.to(torch.float64) + slack, torch.inf).to(work)
    threshold = threshold.nextafter(torch.full_like(threshold, torch.inf))
    second = bound.scatter_(1, slot[:, None], torch.inf).amin(1)  # NaN wins both minima and is never certified
    certified = second > threshold
    undecided = (~certified).nonzero().squeeze(1)
    if len(undecided) == 0:
        return slot, certified
    candidate = ~(bound[undecided] > threshold[undecided, None])
    candidate.scatter_(1, slot[undecided, None], True)
    # Few candidates a row are the rule; a row may have all K, so the pairs are scored in blocks too.
    step = max(1, _BLOCK_ELEMENTS * len(undecided) // int(candidate.sum()))
    for block, pairs in zip(undecided.split(step), candidate.split(step), strict=True):
        slot[block] = _rescore(rows[block], codes, pairs, metric)
    return slot, certified


def _rescore(rows: Tensor, codes: Tensor, candidate: Tensor, metric: str) -> Tensor:
    """The contract over the candidates (row, code): the lowest index among those with the smallest float64 score."""
    row, code = candidate.nonzero(as_tuple=True)
    channels, code_channels = rows.to(torch.float64).T.contiguous(), codes.to(torch.float64).T.contiguous()
    score = channels.new_zeros(len(row))
    for z_d, e_d in zip(channels, code_channels, strict=True):
        if metric == "euclidean":
            difference = z_d[row] - e_d[code]
            score = score + difference * difference
        else:
            score = score - z_d[row] * e_d[code]
    if metric == "cosine":
        norm = code_norms(codes.to(torch.float64))[code]
        score = torch.where(norm > 0, score / torch.where(norm > 0, norm, 1.0), 0.0)
    score = torch.where(score.isnan(), torch.inf, score)
    lowest = score.new_full((len(rows),), torch.inf).scatter_reduce(0, row, score, "amin")
    none = len(codes)
    chosen = torch.where(score == lowest[row], code, none)
    return chosen.new_full((len(rows),), none).scatter_reduce(0, row, chosen, "amin")


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """Autocast reaches into an operator, and would narrow its products."""
    enabled = torch.is_autocast_enabled(device_type)
    return torch.autocast(device_type, enabled=False) if enabled else nullcontext()


def product_is_float32(x: Tensor) -> bool:
    """Whether a float32 matrix product on x's device really computes in float32 under the user's settings."""
    try:
        if torch.get_float32_matmul_precision() != "highest":
            return False
        return not (x.is_cuda and torch.backends.cuda.matmul.allow_tf32)
    except RuntimeError:  # a precision set for one library (torch.backends.*.fp32_precision) has no single name
        return False


def statistics(
    z: Tensor, indices: Tensor, codebook_size: int, mask: Tensor | None, channel_dim: int, batched: bool
) -> tuple[Tensor, Tensor]:
    """Counts and sums of the rows of each code, in a fixed order: a stable sort, then one sum per code."""
    layout = layout_of(z, channel_dim, batched)
    rows, codes = layout.rows(z), layout.per_row(indices)
    counted = (codes >= 0) if mask is None else (codes >= 0) & layout.per_row(mask)
    if bool((counted & (codes >= codebook_size)).any()):
        raise RuntimeError(f"indices hold a code that is not below codebook_size = {codebook_size}")
    heads, channels = rows.shape[1], rows.shape[3]
    counts = torch.zeros(heads, codebook_size, dtype=torch.int64, device=z.device)
    dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
    sums = torch.zeros(heads, codebook_size, channels, dtype=dtype, device=z.device)
    for head in range(heads):
        flat, kept = rows[:, head].reshape(-1, channels), counted[:, head].reshape(-1)
        flat, code = flat[kept], codes[:, head].reshape(-1)[kept]
        finite = flat.isfinite().all(1)
        flat, code = flat[finite], code[finite]
        counts[head] = torch.bincount(code, minlength=codebook_size)
        sums[head] = segment_sums(flat.to(torch.float64), code, codebook_size).to(dtype)
    return counts, sums


def segment_sums(rows: Tensor, code: Tensor, codebook_size: int) -> Tensor:
    """Float64 sums of the rows of each code, in ascending order of rows, whatever the device."""
    order = torch.sort(code, stable=True).indices
    lengths = torch.bincount(code, minlength=codebook_size)
    return torch.segment_reduce(rows[order], "sum", lengths=lengths, axis=0, unsafe=True, initial=0.0)


def quantize(
    z: Tensor, codebook: Tensor, mask: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Look-up, indices, squared error and statistics; see `vqkernels.ops.quantize`."""
    wanted = QuantizeOptions(*options)
    indices, _ = nearest(z, codebook, mask, *wanted.search)
    quantized, error, counts, sums = lookup(z, codebook, indices, None, wanted.channel_dim, wanted.statistics)
    return quantized, indices, error, counts, sums


def lookup(
    z: Tensor, codebook: Tensor, indices: Tensor, mask: Tensor | None, channel_dim: int, statistics_wanted: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What follows the search, for given indices in [-1, K); see `vqkernels.ops.quantize`."""
    batched, size = codebook.dim() == 3, codebook.shape[-2]
    layout, codes = layout_of(z, channel_dim, batched), _heads(codebook)
    if z.device.type == "cpu" and bool(((indices < -1) | (indices >= size)).any()):
        raise RuntimeError("indices hold a code out of range")
    if mask is not None:
        indices = torch.where(mask, indices, -1)
    rows, chosen = layout.rows(z), layout.per_row(indices)
    quantized = torch.empty_like(rows)
    error = torch.zeros((), dtype=torch.float64, device=z.device)
    for head in range(rows.shape[1]):
        index = chosen[:, head].unsqueeze(-1)
        code = torch.where(index < size, codes[head][index.squeeze(-1).clamp(0, size - 1)], torch.nan)
        kept = index >= 0
        quantized[:, head] = torch.where(kept, code, 0.0).to(z.dtype)
        wide = rows[:, head].to(torch.float64)
        error += torch.where(kept, wide - code.to(torch.float64), 0.0).square().sum()
        # The square of an infinity is not NaN: a row that is not finite makes the error NaN by contract.
        error += torch.where(kept, wide * 0.0, 0.0).sum()
    if statistics_wanted:
        counts, sums = statistics(z, torch.where(indices < size, indices, -1), size, None, channel_dim, batched)
    else:
        counts = indices.new_empty(0)
        sums = z.new_empty(0, dtype=torch.float64 if z.dtype == torch.float64 else torch.float32)
    return empty_rows(z, layout).copy_(layout.restore_rows(quantized)), error, counts, sums


def quantize_backward(
    grad_quantized: Tensor,
    grad_codebook_loss: Tensor,
    grad_commitment_loss: Tensor,
    z: Tensor,
    codebook: Tensor,
    indices: Tensor,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    """Gradients of z and of the codebook; see `vqkernels.ops.quantize`."""
    wanted = GradientOptions(*options)
    layout, codes = layout_of(z, wanted.channel_dim, codebook.dim() == 3), _heads(codebook)
    rows, incoming, chosen = layout.rows(z), layout.rows(grad_quantized), layout.per_row(indices)
    grad_rows = torch.empty_like(rows)
    grad_codes = torch.empty_like(codes, memory_format=torch.contiguous_format)
    mean = 2.0 / ((indices >= 0).sum().clamp_min(1).to(torch.float64) * rows.shape[3])
    commitment, loss = grad_commitment_loss * mean, grad_codebook_loss * mean
    for head in range(rows.shape[1]):
        code = chosen[:, head]
        kept = (code >= 0).unsqueeze(-1)
        wide = torch.where(kept, rows[:, head], 0.0).to(torch.float64)
        finite = wide.isfinite().all(-1, keepdim=True) & (code < codes.shape[1]).unsqueeze(-1)
        chosen_codes = codes[head][code.clamp(0, codes.shape[1] - 1)].to(torch.float64)
        residual = wide - chosen_codes
        through = incoming[:, head].to(torch.float64)
        if wanted.gradient == "rotation":
            through = rotate_gradient(through, wide, chosen_codes)
        total = torch.where(finite, through + commitment * residual, torch.nan)
        grad_rows[:, head] = torch.where(kept, total, 0.0).to(z.dtype)
        if wanted.codebook_gradient:
            counted = (kept & finite).reshape(-1)
            used_code = code.reshape(-1)[counted]
            sums = segment_sums(-residual.reshape(-1, rows.shape[3])[counted], used_code, codes.shape[1])
            used = torch.bincount(used_code, minlength=codes.shape[1]) > 0
            grad_codes[head] = torch.where(used[:, None], loss * sums, 0.0).to(codebook.dtype)
    grad_codebook = grad_codes.view(codebook.shape) if wanted.codebook_gradient else codebook.new_empty(0)
    return empty_rows(z, layout).copy_(layout.restore_rows(grad_rows)), grad_codebook
