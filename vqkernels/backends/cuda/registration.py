"""Offers the kernels to torch's dispatcher, as the overload `.cuda` of each operator that has one.

The operators take z as its caller has it; here it becomes the canonical view (batch, head, position, channel).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from vqkernels.backends import sampling
from vqkernels.backends.cuda import statistics
from vqkernels.backends.layout import layout_of


def _statistics(
    z: Tensor, indices: Tensor, codebook_size: int, mask: Tensor | None, channel_dim: int, batched: bool
) -> tuple[Tensor, Tensor]:
    layout = layout_of(z, channel_dim, batched)
    rows = layout.rows(z), layout.per_row(indices)
    return statistics.statistics(*rows, codebook_size, None if mask is None else layout.per_row(mask))


OPERATORS: dict[str, Callable[..., Any]] = {
    "sample": sampling.sample,  # no kernel yet: plain PyTorch serves the GPU
    "statistics": _statistics,
}
