"""Calls that between them make every kind of program that `auto` can launch: a covering design over the table of tiles.

The candidate pass and what merges it depend on the tile and on how the codes are split: every entry of the table, with
few, many and one tile of codes (`search_regimes`). The other kernels depend on D, dtypes, metric, mask, layout and
heads: every triple (z dtype, codebook dtype, metric) on one chip, every pair of any two of these on all
(`element_regimes`). `sweep` is far wider, too wide to compile; `ahead_of_time.py --unseen` compares what the compiler
is told about single arguments there and here.

Everything is called on meta tensors with the launch intercepted (benchmarks/budgets/launches.py): no memory, no GPU.
"""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch

from vqkernels.backends.triton import configs

FLOAT, BRAIN, HALF, DOUBLE = torch.float32, torch.bfloat16, torch.float16, torch.float64
CROSSED = (9, 0)  # where every triple of dtypes and metric is compiled


class Regime(NamedTuple):
    """One call of every entry point, or of those of residual quantization."""

    dim: int = 64
    codes: int = 1000
    rows: int = 4096
    z: torch.dtype = FLOAT
    codebook: torch.dtype = FLOAT
    metric: str = "euclidean"
    masked: bool = False
    layout: str = "rows"
    heads: int = 1
    statistics: bool = True
    gradient: str = "straight_through"


AXES = {
    "z": (FLOAT, BRAIN, HALF, DOUBLE),
    "codebook": (FLOAT, BRAIN, HALF, DOUBLE),
    "metric": ("euclidean", "dot", "cosine"),
    "dim": (3, 32, 64, 128, 257),
    "layout": ("rows", "channels", "misaligned"),
    "masked": (False, True),
    "heads": (1, 3),
    "statistics": (False, True),
    "gradient": ("straight_through", "rotation"),
    "codes": (1000, 40000),
    "rows": (4096, 101),
}
# z of two images of 2^26 positions: a stride that needs 64 bits; one channel and one code: strides of 1
RARE = (
    Regime(rows=2**27, layout="channels", masked=True, heads=3),
    Regime(dim=1, codes=1, rows=1),
    Regime(dim=1, codes=1, rows=1, layout="channels", masked=True),
    Regime(dim=16, codes=16, rows=32, heads=16),
    Regime(rows=101, layout="misaligned"),
)
QUICK = (Regime(masked=True), Regime(dim=257, rows=40, gradient="rotation"))
# (rows, codes): one row, rows that 16 divides or not, one tile of codes, tiles per program that 16 divides or not
SEARCHES = {
    "few": ((40, 1000), (40, 16384), (64, 1), (1, 300)),
    "many": ((32768, 1000), (32768, 1), (65, 65536), (10000, 16384)),
}
# of residual quantization: the chained search in every D bucket and metric, then level by level; masked: levels given
CHAINED = (
    Regime(),
    Regime(dim=32, z=BRAIN, metric="dot", masked=True, heads=3, layout="channels"),
    Regime(metric="cosine", masked=True, heads=3, layout="channels"),
    Regime(dim=3, z=HALF, codebook=BRAIN, metric="cosine", rows=101, codes=1, statistics=False),
)
BY_LEVEL = (
    Regime(z=DOUBLE, gradient="rotation"),
    Regime(dim=257, codebook=DOUBLE, masked=True, layout="misaligned", rows=101),
    Regime(dim=128, z=BRAIN, codebook=BRAIN, heads=3, layout="channels", gradient="rotation"),
)
QUICK_RESIDUAL = (CHAINED[-1]._replace(statistics=True), Regime(dim=80))
DIMS_OF_BUCKET = {configs.SLICED: (256, 512)}


def search_regimes(capability: tuple[int, int]) -> list[Regime]:
    """Every entry of the table for this chip, with every way to share its codes among programs."""
    regimes = []
    for bucket, sizes in configs.TABLE[configs.family(capability)].items():
        for size, dim in itertools.product(sizes, DIMS_OF_BUCKET.get(bucket, (bucket,))):
            # how codes are shared out and D meet in the loop over tiles alone: the rarer ways once per size bucket
            ways = SEARCHES[size] if dim in (64, 512) else SEARCHES[size][:2]
            regimes += [Regime(dim, codes, rows) for rows, codes in ways]
    return regimes


def element_regimes(capability: tuple[int, int]) -> list[Regime]:
    """Every pair of values of two axes; on one chip every triple (z dtype, codebook dtype, metric) too."""
    crossed = ("z", "codebook", "metric") if capability == CROSSED else ("z", "codebook")
    seeds = [dict(zip(crossed, values, strict=True)) for values in itertools.product(*(AXES[a] for a in crossed))]
    return [Regime(**values) for values in covering(seeds)] + list(RARE)


def covering(seeds: list[dict]) -> list[dict]:
    """The seeds, completed and continued until every pair of values of two axes is in one of them. Greedy."""
    missing = {pair for a, b in itertools.combinations(AXES, 2) for pair in itertools.product(_values(a), _values(b))}
    done = []
    for seed in itertools.chain(seeds, itertools.repeat({})):
        if not missing and len(done) >= len(seeds):
            return done
        row = dict(seed) or _first(missing)
        for axis in AXES:
            if axis not in row:
                row[axis] = max(AXES[axis], key=lambda value, a=axis: len(missing & _pairs(row | {a: value})))
        missing -= _pairs(row)
        done.append(row)
    raise AssertionError("unreachable: the seeds never end")


def _values(axis: str) -> list[tuple]:
    return [(axis, value) for value in AXES[axis]]


def _pairs(row: dict) -> set[tuple]:
    """The pairs in a row, in the order of the axes."""
    return set(itertools.combinations([(axis, row[axis]) for axis in AXES if axis in row], 2))


def _first(missing: set[tuple]) -> dict:
    return dict(min(missing, key=repr))


def sweep(capability: tuple[int, int]) -> Iterator[Regime]:
    """Far more calls than can be compiled: what single arguments may look like. What depends on the chip is swept on
    every chip, the rest on one."""
    dims = (1, 2, 3, 7, 16, 17, 32, 33, 48, 63, 64, 65, 100, 127, 128, 129, 192, 256, 257, 320, 512, 1024)
    for dim, rows, codes in itertools.product(dims, (1, 2, 16, 64, 65, 8191, 10**6), (1, 2, 16, 64, 500, 8192)):
        yield Regime(dim, codes, rows)
    if capability != CROSSED:
        return
    names = [axis for axis in AXES if axis not in ("dim", "codes", "rows")]
    for dim, *values in itertools.product((5, 100), *(AXES[name] for name in names)):
        yield Regime(dim=dim, **dict(zip(names, values, strict=True)))
    for codes, heads, layout, rows in itertools.product((1, 32, 33000), (1, 2, 16), AXES["layout"], (1, 96, 97)):
        yield Regime(dim=48, codes=codes, heads=heads, layout=layout, rows=rows)


def operands(regime: Regime) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """z (B, H, P, D), codebook (H, K, D) and mask (B, H, P) on the meta device."""
    heads, rows, dim = regime.heads, regime.rows, regime.dim
    batch = 2 if rows % 2 == 0 and regime.layout == "channels" else 1
    with torch.device("meta"):
        if regime.layout == "channels":
            images = torch.empty(batch, heads * dim, rows // batch, dtype=regime.z)
            z = images.view(batch, heads, dim, rows // batch).transpose(2, 3)
        elif regime.layout == "misaligned":
            z = torch.empty(batch, heads, rows, dim + 1, dtype=regime.z)[..., 1:]
        else:
            z = torch.empty(batch, heads, rows, dim, dtype=regime.z)
        extra = int(regime.layout == "misaligned")
        codebook = torch.empty(heads, regime.codes, dim + extra, dtype=regime.codebook)[..., extra:]
        mask = torch.empty(z.shape[:3], dtype=torch.bool) if regime.masked else None
    return z, codebook, mask


def stacks(regime: Regime, depth: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """z (B, H, P, D), codebooks (H, Q, K, D) and levels (B, H, P) on the meta device."""
    z, codebook, mask = operands(regime)
    codebooks = codebook.unsqueeze(1).expand(-1, depth, -1, -1)
    if regime.heads > 1:
        codebooks = torch.empty(codebooks.shape, dtype=regime.codebook, device="meta")
    levels = None if mask is None else torch.empty(mask.shape, dtype=torch.int64, device="meta")
    return z, codebooks, levels
