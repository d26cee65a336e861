"""Sampling of codes in plain PyTorch, on any device: the Gumbel-max trick over blocks of rows.

The twin of csrc/cpu/sample.h, which explains it; the same random numbers, so that only rounding tells them apart.
Scores are float64, channel by channel with every operation rounded separately, so that a row's draw depends on neither
its neighbours nor the size of its block. Nothing synchronises with the device.
"""

import torch
from torch import Tensor

from ...reference import code_norms
from .. import counter
from ..layout import layout_of
from ..temperature import host_temperature

_BLOCK_ELEMENTS = 1 << 21  # scores alive at once: 16 MB of float64


def sample(
    z: Tensor,
    codebook: Tensor,
    seed: Tensor,
    mask: Tensor | None,
    channel_dim: int,
    metric: str,
    temperature: Tensor,
    row_offset: int,
) -> Tensor:
    """Indices of z's shape without channels; see `vqkernels.ops.sample`."""
    divisor = host_temperature(temperature)
    layout = layout_of(z, channel_dim, codebook.dim() == 3)
    rows, codes = layout.rows(z), codebook if codebook.dim() == 3 else codebook[None]
    kept = None if mask is None else layout.per_row(mask)
    indices = torch.empty(rows.shape[:3], dtype=torch.int64, device=z.device)
    step = max(1, _BLOCK_ELEMENTS // codes.shape[1])
    for head in range(rows.shape[1]):
        flat = rows[:, head].reshape(-1, rows.shape[3])
        numbers = torch.arange(len(flat), device=z.device) + row_offset
        keys = counter.row_keys(seed, head, numbers)
        target, usable = _targets(codes[head].to(torch.float64), metric)
        parts = [
            _sample(block, target, usable, key, metric, divisor)
            for block, key in zip(flat.split(step), keys.split(step), strict=True)
        ]
        found = torch.cat(parts) if len(flat) else indices.new_empty(0)
        if kept is not None:
            found = torch.where(kept[:, head].reshape(-1), found, -1)
        indices[:, head] = found.view(rows.shape[0], rows.shape[2])
    return layout.restore_per_row(indices).contiguous()


def _targets(codes: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """What rows are compared with, zeros for codes that are not finite, and which are."""
    usable = codes.isfinite().all(1)
    codes = torch.where(usable[:, None], codes, 0.0)
    if metric == "cosine":
        norm = code_norms(codes)[:, None]
        codes = torch.where(norm > 0, codes / torch.where(norm > 0, norm, 1.0), 0.0)
    return codes, usable


def _sample(rows: Tensor, codes: Tensor, usable: Tensor, keys: Tensor, metric: str, temperature: float) -> Tensor:
    wide = rows.to(torch.float64)
    finite = wide.isfinite().all(1)
    wide = torch.where(finite[:, None], wide, 0.0)
    score = wide.new_zeros(len(wide), len(codes))
    for x, e in zip(wide.T, codes.T, strict=True):
        if metric == "euclidean":
            score -= (x[:, None] - e).square_()
        else:
            score += x[:, None] * e
    score.masked_fill_(~usable, -torch.inf)
    behind = score - score.amax(1, keepdim=True)  # the best is 0: no temperature makes all of them infinite
    numbers = torch.arange(len(codes), device=rows.device)
    noise = counter.gumbel(counter.code_bits(keys[:, None], numbers))
    total = torch.where(behind == 0, 0.0, behind / temperature) + noise
    total = torch.where(total.isnan(), -torch.inf, total)
    highest = total == total.amax(1, keepdim=True)
    lowest = torch.where(highest & usable, numbers, len(codes)).amin(1)
    return torch.where(finite & usable.any(), lowest.clamp_max(len(codes) - 1), 0)
