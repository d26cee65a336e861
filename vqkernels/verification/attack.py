"""Searches for an input with a wrong index, and reduces it to a minimal case that still fails.

Each round draws a shape, a kind of data, dtypes, a metric, a layout and a mask, runs the backend, and compares every
index with the contract in `vqkernels.reference`. A failure is reduced to one row, then to few codes and few channels.
"""

import math
import random
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..ops.nearest import nearest_code
from .adversaries import ADVERSARIES

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ORACLE_ELEMENTS = 1 << 22  # N * K of one comparison with the contract: 32 MB of float64
GPU_CHANNELS = (3, 64, 256)


class Case(NamedTuple):
    """One drawn input: z `(N, D)`, codebook `(K, D)`, mask `(N,)` or None."""

    kind: str
    metric: str
    z: Tensor
    codebook: Tensor
    mask: Tensor | None
    channels_first: bool

    def __str__(self) -> str:
        (n, d), k = self.z.shape, len(self.codebook)
        extra = ", channels first" * self.channels_first + ", masked" * (self.mask is not None)
        return f"{self.kind}: N={n} K={k} D={d} {self.z.dtype}/{self.codebook.dtype} {self.metric}{extra}"


class Failure(NamedTuple):
    """A wrong index, reduced: one row, few codes, few channels."""

    case: str
    backend: str
    metric: str
    row: Tensor
    codebook: Tensor
    found: int
    expected: int

    def __str__(self) -> str:
        return (
            f"backend {self.backend} returns {self.found}, the contract says {self.expected} ({self.case}); reduced:\n"
            f"z = torch.tensor({self.row.tolist()}, dtype={self.row.dtype})\n"
            f"codebook = torch.tensor({self.codebook.tolist()}, dtype={self.codebook.dtype})\n"
            f"vqkernels.nearest_code(z, codebook, metric={self.metric!r}, backend={self.backend!r})"
        )


def draw(rng: random.Random, device: str = "cpu") -> Case:
    """A random input: log-uniform sizes, any kind of data, dtype, metric and layout."""

    def size(high: int) -> int:
        return min(high, max(1, round(math.exp(rng.uniform(0, math.log(high + 1))))))

    d, k = size(rng.choice([8, 64, 300])), size(rng.choice([40, 1100, 5000]))
    n = size(min(5000, ORACLE_ELEMENTS // k))
    if not device.startswith("cpu"):  # a GPU backend compiles for every new D, and rows are cheap there
        d, n = min(GPU_CHANNELS, key=lambda x: abs(math.log(x / d))), max(1, 16 * ORACLE_ELEMENTS // k)
    kind = rng.choice(list(ADVERSARIES))
    torch.manual_seed(rng.getrandbits(32))
    z, codebook = ADVERSARIES[kind](n, k, d)
    if rng.random() < 0.2:  # a correct search handles a row of zeros and a copied code
        z[rng.randrange(n)] = 0
        codebook[rng.randrange(len(codebook))] = codebook[rng.randrange(len(codebook))]
    dtype = rng.choice(DTYPES) if rng.random() < 0.6 else torch.float32
    code_dtype = rng.choice(DTYPES) if rng.random() < 0.3 else dtype
    mask = torch.rand(n) < 0.7 if rng.random() < 0.2 else None
    metric = rng.choice(["euclidean", "euclidean", "dot", "cosine"])
    z, codebook = z.to(device, dtype), codebook.to(device, code_dtype)
    return Case(kind, metric, z, codebook, None if mask is None else mask.to(device), rng.random() < 0.3)


def wrong_rows(case: Case, backend: str) -> Tensor:
    """Rows whose index differs from the contract's."""
    z, channel_dim = (case.z.T.contiguous(), 0) if case.channels_first else (case.z, 1)
    found = nearest_code(z, case.codebook, mask=case.mask, metric=case.metric, channel_dim=channel_dim, backend=backend)
    expected = reference.nearest(case.z, case.codebook, mask=case.mask, metric=case.metric)
    return (found != expected).nonzero().flatten()


def reduce(case: Case, backend: str) -> Failure:
    """A small failing case, found by halving and dropping: first one row, then codes, then channels."""

    def fails(z: Tensor, codebook: Tensor) -> bool:
        if not codebook.numel() or not z.shape[1]:
            return False
        return len(wrong_rows(Case(case.kind, case.metric, z, codebook, None, False), backend)) > 0

    z, codebook = case.z.clone(), case.codebook.clone()
    rows = [z[i : i + 1] for i in wrong_rows(case, backend).tolist()]
    # A failure may need other rows (a tile, a tail); then all rows are kept.
    z = next((row for row in rows if fails(row, codebook)), z)
    codebook = _drop(len(codebook), lambda keep: codebook[keep], lambda codes: fails(z, codes))
    channels = list(range(z.shape[1]))
    kept = _drop(len(channels), lambda keep: torch.tensor(keep), lambda keep: fails(z[:, keep], codebook[:, keep]))
    z, codebook = z[:, kept], codebook[:, kept]
    final = Case(case.kind, case.metric, z, codebook, None, False)
    bad = wrong_rows(final, backend)
    if not len(bad):  # it fails only with the drawn layout or mask
        z, codebook, bad = case.z, case.codebook, wrong_rows(case, backend)
    row = z[bad[0]]
    found = nearest_code(z, codebook, metric=case.metric, backend=backend)[bad[0]]
    expected = reference.nearest(row[None], codebook, metric=case.metric)[0]
    return Failure(str(case), backend, case.metric, row, codebook, int(found), int(expected))


def _drop(count: int, select: Callable[[list[int]], Tensor], fails: Callable[[Tensor], bool]) -> Tensor:
    """Delta debugging: drops runs of items, of ever smaller length, if the case still fails without them."""
    keep, run = list(range(count)), max(1, count // 2)
    while True:
        start, dropped = 0, False
        while start < len(keep) and len(keep) > 1:
            shorter = keep[:start] + keep[start + run :]
            if shorter and fails(select(shorter)):
                keep, dropped = shorter, True
            else:
                start += run
        if run == 1 and not dropped:
            return select(keep)
        run = max(1, run // 2)


class Progress(NamedTuple):
    """The counts of an attack so far, and its failure if there is one."""

    seconds: float
    cases: int
    rows: int
    scores: int
    failure: Failure | None


def attack(minutes: float, backends: list[str], *, seed: int = 0, device: str = "cpu") -> Iterator[Progress]:
    """Yields after every case, until the time is over or an index is wrong. The last one then has the failure."""
    rng, start = random.Random(seed), time.monotonic()
    cases = rows = scores = 0
    while time.monotonic() - start < minutes * 60:
        case = draw(rng, device)
        for backend in backends:
            if len(wrong_rows(case, backend)):
                yield Progress(time.monotonic() - start, cases, rows, scores, reduce(case, backend))
                return
            cases, rows, scores = cases + 1, rows + len(case.z), scores + len(case.z) * len(case.codebook)
        yield Progress(time.monotonic() - start, cases, rows, scores, None)
