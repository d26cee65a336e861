"""What ancestral sampling from any prior of code grids shares: options, the codes to begin with, the plain sampler.

All randomness is one uniform number for each code, drawn before the first position, so that the plain sampler, a cached
one, any chunks of the batch and any order of the work give the same codes up to the rounding of the logits.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from vqkernels.backends.drawing import draw_codes, guided

CHUNK_BYTES = 1 << 28  # of caches alive at once


class Sampled(Protocol):
    """What every sampler asks of a prior."""

    num_codes: int
    label_dropout: float
    embedding: nn.Embedding


class Options(NamedTuple):
    """How codes are drawn."""

    temperature: float
    top_k: int  # 0: all
    top_p: float  # 1: all
    guidance: float
    chunk: int | None = None  # grids sampled together; None: as the memory allows
    progress: bool = False
    backend: str = "auto"  # who computes cached steps


def check_options(
    model: Sampled,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    guidance: float,
    chunk: int | None,
    progress: bool = False,
    backend: str = "auto",
) -> Options:
    """The options of a sampler.

    Raises:
        ValueError: one of them is out of range.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, but is {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, but is {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], but is {top_p}")
    if guidance != 1.0 and not model.label_dropout > 0:
        raise ValueError("guidance needs a prior that was built, and trained, with label_dropout above 0")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be at least 1, but is {chunk}")
    top_p = 1.0 if top_p is None else float(top_p)
    return Options(float(temperature), top_k or 0, top_p, float(guidance), chunk, progress, backend)


def start_codes(model: Sampled, shape: tuple[int, int, int], known: Tensor | None) -> Tensor:
    """Codes (B, H, W) to begin with: the known ones, and -1 where one is to be drawn.

    Raises:
        ValueError: known has the wrong shape or type, or a code out of range.
    """
    if len(shape) != 3 or min(shape) < 0:
        raise ValueError(f"shape must be (B, H, W), but is {tuple(shape)}")
    device = model.embedding.weight.device
    if known is None:
        return torch.full(shape, -1, dtype=torch.int64, device=device)
    if tuple(known.shape) != tuple(shape) or known.dtype != torch.int64:
        raise ValueError(f"known must be {tuple(shape)} int64, but is {tuple(known.shape)} of {known.dtype}")
    outside = known[(known < -1) | (known >= model.num_codes)].tolist()
    if outside:
        raise ValueError(f"known codes must be in [-1, {model.num_codes - 1}], -1 where unknown; one is {outside[0]}")
    return known.to(device, copy=True, memory_format=torch.contiguous_format)


def plain_sample(
    logits_of: Callable[[Tensor, Tensor | None], Tensor],
    codes: Tensor,
    noise: Tensor,
    labels: Tensor | None,
    options: Options,
) -> Tensor:
    """Codes by a full forward pass for every position: the specification of the cached samplers.

    Args:
        logits_of: the model's forward, (B, K, H, W) from codes (B, H, W) and labels (B,).
        codes: (B, H, W) int64, written in place where they are -1.
        noise: (B, H, W) float64.
    """
    _, height, width = codes.shape
    places = [(row, column) for row in range(height) for column in range(width)]
    for row, column in bar(places, options.progress, "code"):
        missing = codes[:, row, column] < 0
        if not bool(missing.any()):
            continue
        logits = logits_of(codes.clamp_min(0), labels)[:, :, row, column]
        if options.guidance != 1.0 and labels is not None:
            without = logits_of(codes.clamp_min(0), torch.full_like(labels, -1))[:, :, row, column]
            logits = guided(torch.stack([logits, without], 1).flatten(0, 1), options.guidance)
        drawn = draw_codes(logits, noise[:, row, column], options.temperature, options.top_k, options.top_p)
        codes[:, row, column] = torch.where(missing, drawn, codes[:, row, column])
    return codes


def with_and_without(labels: Tensor | None, guidance: float) -> tuple[Tensor | None, int]:
    """Labels of the rows of a cached sampler, and how many rows each grid has.

    Under guidance grid b is row 2b with its label and row 2b + 1 without, as `guided` reads them.
    """
    copies = 2 if guidance != 1.0 else 1
    if labels is not None and copies == 2:
        labels = torch.stack([labels, torch.full_like(labels, -1)], 1).flatten()
    return labels, copies


def chunks(batch: int, chunk: int | None, row_bytes: int, limit: int) -> list[slice]:
    """Parts of a batch: of `chunk` grids each, or of so many that their caches stay below the limit."""
    size = max(1, limit // max(row_bytes, 1)) if chunk is None else chunk
    return [slice(start, min(start + size, batch)) for start in range(0, batch, size)]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, and afterwards in the mode that it had."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def bar(steps: list, progress: bool, unit: str) -> Iterable:
    """The steps under a progress bar, where one is wanted and tqdm is installed."""
    if not progress:
        return steps
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        return steps
    return tqdm(steps, desc="sampling", unit=unit, leave=False)
