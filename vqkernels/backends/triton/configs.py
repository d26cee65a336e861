"""Tile shapes by regime: a table, not a run-time search, so that the first call is as fast as the last and what ships
is what was compiled, counted and tested ahead of time (benchmarks/budgets).

Keyed by architecture family, D bucket and size bucket; both epilogues share the shapes. Families: 80 covers
sm_8x and sm_12x (mma.sync, at most 99 KiB of shared memory), 90 is Hopper (wgmma, descriptors), 100 is sm_10x (tcgen05,
descriptors).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SearchConfig:
    """One compiled shape of the candidate pass: BM rows by BK codes, D in slices of BD."""

    block_rows: int
    block_codes: int
    slice_dim: int
    warps: int
    stages: int
    descriptors: bool


INTERPRETED = "interpreter"
FEW_ROWS = 64
SLICED = 256  # the D bucket of every D above 128, however large
RESOLVE_ROWS = 16
RESCORE_ROWS = 16
RESCORE_CODES = 64
RESCORE_FEW = 4
PACK_ROWS = 32
PACK_CODES = 64


def padded_dim(dim: int) -> int:
    """D as the packed operands store it: a power of two up to 128, then a multiple of 64."""
    if dim <= 128:
        return max(16, 1 << (dim - 1).bit_length())
    return (dim + 63) // 64 * 64


def slice_dim(padded: int) -> int:
    """How much of D one tile covers: all of it up to 128, then 64 at a time."""
    return padded if padded <= 128 else 64


def family(capability: tuple[int, int] | str) -> int | str:
    """The architecture family of a compute capability."""
    if capability == INTERPRETED:
        return INTERPRETED
    major = int(capability[0])
    return {9: 90, 10: 100, 11: 100}.get(major, 80)


# family -> D bucket -> size bucket -> (BM, BK, warps, stages). Chosen by counted cycles per score among shapes that do
# not spill. 90: 128 x 128 with 4 warps leaves two programs per multiprocessor, whose products and reductions then
# overlap. 80: the product costs issue slots too, and narrow tiles free registers. Sliced: every code tile reads the row
# tile again, so it should not be narrow. Few rows: nothing is gained by a row tile that is mostly padding.
TABLE: dict[int, dict[int, dict[str, tuple[int, int, int, int]]]] = {
    80: {
        16: {"few": (64, 32, 4, 3), "many": (128, 32, 4, 3)},
        32: {"few": (64, 32, 4, 3), "many": (128, 32, 4, 3)},
        64: {"few": (64, 32, 4, 3), "many": (128, 32, 4, 3)},
        128: {"few": (64, 32, 4, 3), "many": (128, 32, 4, 3)},
        SLICED: {"few": (64, 64, 4, 3), "many": (64, 64, 4, 3)},
    },
    90: {
        16: {"few": (64, 128, 4, 3), "many": (128, 128, 4, 3)},
        32: {"few": (64, 128, 4, 3), "many": (128, 128, 4, 3)},
        64: {"few": (64, 128, 4, 3), "many": (128, 128, 4, 3)},
        128: {"few": (64, 128, 4, 2), "many": (128, 128, 4, 2)},
        SLICED: {"few": (64, 128, 4, 3), "many": (128, 128, 4, 3)},
    },
    100: {
        16: {"few": (64, 64, 4, 3), "many": (128, 64, 4, 3)},
        32: {"few": (64, 64, 4, 3), "many": (128, 64, 4, 3)},
        64: {"few": (64, 64, 4, 3), "many": (128, 64, 4, 3)},
        128: {"few": (64, 64, 4, 3), "many": (128, 64, 4, 3)},
        SLICED: {"few": (64, 64, 4, 3), "many": (128, 64, 4, 3)},
    },
}


def dim_bucket(padded: int) -> int:
    """The column of the table that serves a padded D."""
    return padded if padded <= 128 else SLICED


def size_bucket(rows: int) -> str:
    """The column of the table that serves this many rows of one head."""
    return "few" if rows <= FEW_ROWS else "many"


def search_config(capability: tuple[int, int] | str, padded: int, rows: int) -> SearchConfig:
    """The shape of the candidate pass for one call. `rows` is the number of rows of one head."""
    kind = family(capability)
    if isinstance(kind, str):
        return SearchConfig(32, 64, slice_dim(padded), 4, 1, False)
    block_rows, block_codes, warps, stages = TABLE[kind][dim_bucket(padded)][size_bucket(rows)]
    return SearchConfig(block_rows, block_codes, slice_dim(padded), warps, stages, kind != 80)


@dataclass(frozen=True)
class ResidualConfig:
    """One compiled shape of the chained search: BM rows through all levels, BK codes at a time."""

    block_rows: int
    block_codes: int
    warps: int
    stages: int


# The residual of a row block stays in registers beside the scores up to this D; from there on it would spill.
CHAINED_DIM = 64
# Beyond, a launch per step costs less than row blocks that leave multiprocessors idle: search.py shares the codes out.
CHAINED_CODES = 16384

# family -> D bucket -> (BM, BK, warps, stages), by the rule of TABLE: no spills. 64 rows, since residual, operand and
# scores of a row share the registers; batches of residual codecs are small, too. Twice the codes would save a
# cycle per score on sm_90 at D = 32 and half of one on sm_80 at D = 64, but spill a register or two.
CHAINED: dict[int, dict[int, tuple[int, int, int, int]]] = {
    80: {16: (64, 64, 4, 2), 32: (64, 64, 4, 2), 64: (64, 32, 4, 2)},
    90: {16: (64, 128, 4, 3), 32: (64, 64, 4, 3), 64: (64, 128, 4, 3)},
    100: {16: (64, 64, 4, 3), 32: (64, 64, 4, 3), 64: (64, 64, 4, 3)},
}


def chained_config(
    capability: tuple[int, int] | str, dim: int, codes: int, rows: int, processors: int
) -> ResidualConfig | None:
    """The shape of the chained search, or None where the levels should be searched one after the other.

    `rows` counts the rows of all heads.
    """
    padded, kind = padded_dim(dim), family(capability)
    if padded > CHAINED_DIM:
        return None
    if isinstance(kind, str):
        return ResidualConfig(16, 32, 4, 1)
    config = ResidualConfig(*CHAINED[kind][padded])
    return None if codes > CHAINED_CODES and rows < processors * config.block_rows else config
