"""k-means over the library's own kernels: a codebook from data, as one opaque operator.

Twice as many seeds as codes by k-means++ (seeding.py), Ward's merges down to the codes (merging.py), then Lloyd's
iterations: the search, the sums of the rows of each code, the means.
Beyond its inputs it holds a compact copy of the rows that count, some numbers per row, and two codebooks; neither N x K
nor N x K x D is built. It synchronises with the device, as it runs once, and must not be captured in a CUDA graph.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..backends import counter, registry
from .checks import METRICS, check_choice, check_mask, check_rows, seed_tensor
from .merging import merge_clusters
from .nearest import nearest
from .registration import Operation
from .seeding import seed_codes, squared_distances
from .statistics import statistics

OVERSAMPLING = 2  # seeds per code: k-means++ misses clusters, and merging the closest seeds gives their codes away
_JITTER_STREAM = 1 << 32  # streams of random numbers that seeding does not use
_LARGE = 2.0**96  # rows beyond it are summed in float64


def cluster(
    backend: str,
    z: Tensor,
    codebook_size: int,
    mask: Tensor | None,
    channel_dim: int,
    metric: str,
    iterations: int,
    seed: Tensor,
    batched: bool,
) -> tuple[Tensor, Tensor]:
    """`kmeans` for one backend: codebook `(heads, K, D)` float32 and distinct `(heads,)` int64, without checks."""
    z = z.movedim(channel_dim, -1)
    z, mask = (z, mask) if batched else (z[None], None if mask is None else mask[None])
    heads, seeds = z.shape[0], torch.arange(z.shape[0], device=z.device)
    seeds = counter.row_keys(seed, 0, seeds)
    codebook = torch.empty(heads, codebook_size, z.shape[-1], dtype=torch.float32, device=z.device)
    distinct = torch.empty(heads, dtype=torch.int64, device=z.device)
    for head in range(heads):
        rows = _usable_rows(z[head], None if mask is None else mask[head], metric)
        codebook[head], count = _cluster(backend, rows, codebook_size, metric, iterations, seeds[head])
        distinct[head] = count
    return codebook, distinct


def _usable_rows(z: Tensor, mask: Tensor | None, metric: str) -> Tensor:
    """A contiguous copy `(N, D)` of the rows that count: unmasked, finite in float32; for directions, of norm 1."""
    rows = z.reshape(-1, z.shape[-1]) if mask is None else z[mask]
    rows = rows.to(torch.float32)
    rows = rows[rows.isfinite().all(1)]
    if metric != "euclidean":
        wide = rows.to(torch.float64)
        norm = torch.linalg.vector_norm(wide, dim=1, keepdim=True)
        rows = (wide / norm)[norm.squeeze(1) > 0].to(torch.float32)
    elif rows.numel() and float(rows.abs().max()) > _LARGE:
        rows = rows.to(torch.float64)
    return rows.contiguous()


def _cluster(
    backend: str, rows: Tensor, codebook_size: int, metric: str, iterations: int, seed: Tensor
) -> tuple[Tensor, int]:
    """One head: K codes of float32, and how many of them come from data."""

    def search(rows: Tensor, codes: Tensor, metric: str = "euclidean") -> Tensor:
        return nearest(backend, rows, codes, None, 1, metric, "exact")[0]

    if len(rows) == 0:
        keys = counter.row_keys(
            seed, _JITTER_STREAM, torch.arange(codebook_size * rows.shape[1], device=rows.device)
        ).view(codebook_size, rows.shape[1])
        codes = ((2 * counter.uniform(keys) - 1) / codebook_size).to(torch.float32)
        return _distinct(codes if metric == "euclidean" else _unit(codes), metric, seed, search), 0
    codes = rows[seed_codes(rows, OVERSAMPLING * codebook_size, seed, search)]
    count = min(len(codes), codebook_size)
    if len(codes) <= codebook_size:  # every distinct row is a code: no mean can be nearer
        codes = codes[torch.arange(codebook_size, device=rows.device) % count]
    else:
        counts, sums = (x[0] for x in statistics(backend, rows, search(rows, codes), len(codes), None, 1, False))
        codes = merge_clusters(sums.to(torch.float64) / counts[:, None], counts, codebook_size).to(rows.dtype)
        codes = codes if metric == "euclidean" else _unit(codes)
        codes = _lloyd(backend, rows, codes, metric, iterations, search)
    return _distinct(codes.to(torch.float32), metric, seed, search), count


def _lloyd(
    backend: str, rows: Tensor, codes: Tensor, metric: str, iterations: int, search: Callable[..., Tensor]
) -> Tensor:
    """Lloyd's iterations, until no row changes its code. Codes without rows move to the rows farthest from theirs."""
    metric = "euclidean" if metric == "euclidean" else "cosine"
    before = None
    for _ in range(iterations):
        indices = search(rows, codes, metric)
        if before is not None and indices.equal(before):
            break
        before = indices
        counts, sums = (x[0] for x in statistics(backend, rows, indices, len(codes), None, 1, False))
        means = (sums.to(torch.float64) / counts.clamp_min(1)[:, None]).to(codes.dtype)
        if metric == "cosine":
            means = _unit(means)
        used = (counts > 0) & means.any(1) if metric == "cosine" else counts > 0
        moved = torch.where(used[:, None], means, codes)
        empty = (counts == 0).nonzero().squeeze(1)
        if len(empty):
            distance = squared_distances(rows, codes, indices)
            farthest = distance.topk(min(len(empty), len(rows)))
            candidates = rows[farthest.indices[farthest.values > 0]]
            candidates = candidates[_first_of_equals(candidates, search)] if len(candidates) else candidates
            moved[empty[: len(candidates)]] = candidates
        codes = moved
    return codes


def _unit(codes: Tensor) -> Tensor:
    """Codes of norm 1, zero where they are zero."""
    wide = codes.to(torch.float64)
    norm = torch.linalg.vector_norm(wide, dim=1, keepdim=True)
    return torch.where(norm > 0, wide / norm, 0.0).to(codes.dtype)


def _first_of_equals(codes: Tensor, search: Callable[..., Tensor]) -> Tensor:
    """True for every code that equals none before it: the contract gives the lowest index among equals."""
    return search(codes, codes) == torch.arange(len(codes), device=codes.device)


def _distinct(codes: Tensor, metric: str, seed: Tensor, search: Callable[..., Tensor]) -> Tensor:
    """The codes, with jitter on those that equal an earlier one; more of it as long as any does."""
    wide = codes.to(torch.float64)
    spread = (wide - wide.mean(0)).square().mean().sqrt()
    step = torch.maximum(0.01 * spread, wide.abs().max() * 2.0**-12)
    step = torch.where(step > 0, step, 1 / len(codes))
    largest, numbers = torch.finfo(torch.float32).max, torch.arange(codes.numel(), device=codes.device).view_as(codes)
    for attempt in range(64):
        again = ~_first_of_equals(codes, search)
        if not bool(again.any()):
            break
        jitter = 2 * counter.uniform(counter.row_keys(seed, _JITTER_STREAM + 1 + attempt, numbers)) - 1
        moved = (wide + 2.0**attempt * step * jitter).clamp(-largest, largest).to(torch.float32)
        if metric != "euclidean" and codes.shape[1] > 1:  # one channel has two directions only
            moved = _unit(moved)
        codes = torch.where(again[:, None], moved, codes)
    return codes


def _fake(
    z: Tensor,
    codebook_size: int,
    mask: Tensor | None,
    channel_dim: int,
    metric: str,
    iterations: int,
    seed: Tensor,
    batched: bool,
) -> tuple[Tensor, Tensor]:
    heads = z.shape[0] if batched else 1
    codebook = z.new_empty((heads, codebook_size, z.shape[channel_dim]), dtype=torch.float32)
    return codebook, z.new_empty((heads,), dtype=torch.int64)


kmeans_init = Operation(
    "kmeans_init",
    "(Tensor z, SymInt codebook_size, Tensor? mask, int channel_dim, str metric, int iterations, Tensor seed,"
    " bool batched) -> (Tensor codebook, Tensor distinct)",
    _fake,
    cluster,
)


def kmeans(
    z: Tensor,
    codebook_size: int,
    *,
    iterations: int = 10,
    seed: int | Tensor = 0,
    mask: Tensor | None = None,
    channel_dim: int = -1,
    batched: bool = False,
    backend: str = "auto",
    metric: str = "euclidean",
) -> tuple[Tensor, Tensor]:
    """A codebook from data: k-means++ (Arthur and Vassilvitskii 2007), Ward's merges, Lloyd's iterations.

    k-means++ draws twice as many seeds as there are codes; merges of the closest (Ward 1963) leave `codebook_size` of
    them; Lloyd's iterations follow. All distances to rows go through this library's search.

    Args:
        z: `(..., D)`, or any layout whose channel axis is `channel_dim`; float32, bfloat16, float16 or float64.
        codebook_size: K.
        iterations: of Lloyd at most; they end where no row changes its code. 0 gives the merged seeds.
        seed: an int, or a 0-d int64 tensor on z's device. The result is a function of it and of the rows alone, bit for
            bit on one backend and one kind of CPU, whatever the number of threads.
        mask: bool, z's shape without channels; rows where it is False are not read.
        batched: axis 0 of z and mask is the head, each with a codebook of its own.
        backend: as in `nearest_code`.
        metric: "euclidean"; or "cosine" or "dot", which both cluster directions (spherical k-means, Dhillon and Modha
            2001): rows are normalised, rows of zeros ignored, and the codes have norm 1.

    Returns:
        codebook: `(K, D)` float32, or `(H, K, D)` if `batched`; finite, and no two codes are equal.
        distinct: how many codes come from data, 0-d int64, or `(H,)`: K, or the number of different rows where that is
            smaller. Then these rows are the first codes, and the others are copies of them with a deterministic jitter
            of 1 % of their spread per channel, or of 2^-12 of the largest magnitude if that is more (of 1/K if all is
            zero). With no usable row at all, distinct is 0 and the codes are uniform in [-1/K, 1/K] (of norm 1 for
            directions).

    Rows with a NaN, an infinity or a value beyond float32 are ignored. A code that loses all its rows moves to one of
    the rows farthest from theirs. No gradient flows. One opaque operator, `vqkernels::kmeans_init`, in a graph; it
    synchronises with the device.

    Raises:
        TypeError, ValueError: one sentence that names the argument, what was expected and what came.
    """
    if not isinstance(codebook_size, int) or codebook_size < 1:
        raise ValueError(f"codebook_size must be a positive int, got {codebook_size!r}")
    if not isinstance(iterations, int) or iterations < 0:
        raise ValueError(f"iterations must be an int of at least 0, got {iterations!r}")
    if not isinstance(z, Tensor) or z.dim() < 1 + batched:
        raise TypeError(f"z must be a tensor of at least {1 + batched} dimensions")
    seed = seed_tensor(seed, z.device)
    if not -z.dim() <= channel_dim < z.dim():
        limits = f"[-{z.dim()}, {z.dim() - 1}]"
        raise ValueError(f"channel_dim must be in {limits} for z of {z.dim()} axes, got {channel_dim}")
    check_choice("metric", metric, METRICS)
    one_code = z.new_empty((1, z.shape[channel_dim]))
    channel_dim = check_rows(z, one_code.expand(z.shape[0], -1, -1) if batched else one_code, channel_dim)
    check_mask(mask, z, channel_dim)
    chosen = registry.resolve(backend, z.device, "kmeans_init")
    codebook, distinct = kmeans_init(
        chosen, z.detach(), codebook_size, mask, channel_dim, metric, iterations, seed, batched
    )
    return (codebook, distinct) if batched else (codebook[0], distinct[0])
