"""Nearest-code search: the index of the nearest code of every row, exact on every backend."""

from typing import Literal, overload

import torch
from torch import Tensor

from ..backends import registry
from ..backends.options import SearchOptions, schema_of
from .checks import check_mask, check_options, check_rows, row_shape
from .differentiation import at_least_one
from .registration import Operation


def _fake(z, _codebook, _mask, *options):
    shape = row_shape(z, SearchOptions(*options).channel_dim)
    return z.new_empty(shape, dtype=torch.int64), z.new_empty((), dtype=torch.int64)


nearest = Operation(
    "nearest",
    f"(Tensor z, Tensor codebook, Tensor? mask, {schema_of(SearchOptions)}) -> (Tensor indices, Tensor decided)",
    _fake,
)


@overload
def nearest_code(
    z: Tensor,
    codebook: Tensor,
    *,
    mask: Tensor | None = ...,
    metric: str = ...,
    precision: str = ...,
    channel_dim: int = ...,
    backend: str = ...,
    return_certificate: Literal[False] = ...,
) -> Tensor: ...
@overload
def nearest_code(
    z: Tensor,
    codebook: Tensor,
    *,
    mask: Tensor | None = ...,
    metric: str = ...,
    precision: str = ...,
    channel_dim: int = ...,
    backend: str = ...,
    return_certificate: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def nearest_code(
    z: Tensor,
    codebook: Tensor,
    *,
    mask: Tensor | None = None,
    metric: str = "euclidean",
    precision: str = "exact",
    channel_dim: int = -1,
    backend: str = "auto",
    return_certificate: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The index of the nearest code of every row of z.

    Args:
        z: `(..., D)`, or any layout whose channel axis is `channel_dim`; float32, bfloat16, float16 or float64.
        codebook: `(K, D)`, or `(H, K, D)` for one codebook per head with z `(H, ..., D)`; its dtype may differ from
            z's.
        mask: bool, z's shape without the channel axis. Rows where it is False are not read and get index -1.
        metric: "euclidean" (smallest distance), "dot" (largest product) or "cosine" (largest product over the code's
            norm).
        precision: "exact" obeys the contract of `vqkernels.reference`: the index is the lowest that minimises the
            float64 score, on every backend, thread count and batch split. "fast" takes the minimum of the filter's
            native arithmetic, which may differ where two codes are nearly equally near. Wrong indices among 65,536
            float32 rows (K = 512 to 8192, D = 32 to 256; `python -m studies.fast_precision`): on the CPU, whose
            filter is float32, none; in the Triton backend, whose filter rounds to fp16, at most 8 in 10,000 on Gaussian
            rows and codes, about 5 in 10,000 with a k-means codebook, none on well separated clusters; no chosen code's
            squared distance is more than 0.05 % above the nearest's. The Triton figures are simulated on a CPU with the
            backend's own packing code and float32 sums; they were not measured on a GPU.
        channel_dim: the axis of z that holds the D channels.
        backend: "auto", or a backend by name, which is then taken or refused.
        return_certificate: also return the fraction of unmasked rows that the filter decided without re-scoring.

    Returns:
        int64 indices of z's shape without the channel axis; with `return_certificate` a pair of them and a 0-d float32.
        No gradient flows. Rows with a NaN or an infinity get index 0; codes with one are never chosen.

    Raises:
        TypeError, ValueError: one sentence that names the argument, what was expected and what came.
    """
    options = SearchOptions(channel_dim, metric, precision)
    check_options(options)
    options = SearchOptions(check_rows(z, codebook, channel_dim), *options[1:])
    check_mask(mask, z, options.channel_dim)
    chosen = registry.resolve(backend, z.device, "nearest")
    indices, decided = nearest(chosen, z.detach(), codebook.detach(), mask, *options)
    if not return_certificate:
        return indices
    total = at_least_one(indices.numel() if mask is None else mask.sum())
    return indices, (decided / total).to(torch.float32)
