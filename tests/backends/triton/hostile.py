"""Inputs on which fast arithmetic goes wrong: (name, z (N, D), codebook (K, D)). Shapes suit the interpreter."""

import pytest
import torch


def _normal(generator, *shape):
    return torch.randn(*shape, generator=generator)


def _nonfinite(g):
    z, e = _normal(g, 40, 12), _normal(g, 70, 12)
    z[3, 4], z[7, 0], z[9] = float("nan"), float("inf"), float("-inf")
    e[0, 0], e[5, 1], e[69, 11] = float("nan"), float("inf"), float("-inf")
    return z, e


def _one_huge_coordinate(g):
    z, e = _normal(g, 30, 16), _normal(g, 70, 16)
    z[4, 2], e[50, 3] = -1e12, 1e9
    return z, e


def _near_ties(g):
    e = _normal(g, 70, 24)
    e[35:] = e[:35] * (1 + 2.0**-23)
    return e[torch.randint(0, 70, (40,), generator=g)] + 1e-3 * _normal(g, 40, 24), e


def _pairs(g, period):
    """Codes repeated once, apart by less than fp16 resolves: the candidate pass orders each pair at random."""
    e = _normal(g, period, 16).repeat(2, 1) + 1e-4 * _normal(g, 2 * period, 16)
    return e[torch.randint(0, len(e), (60,), generator=g)] + 0.1 * _normal(g, 60, 16), e


def _one_huge_code(g, length=1e4):
    """One code sets the scale of all; some rows are near it, and only some rows are sampled."""
    z, e = _normal(g, 200, 16), _normal(g, 70, 16)
    e[50] *= length
    z[2], z[3], z[4] = e[50] * 0.999, e[50] * 0.5, e[50] * 0.49
    return z, e


def _long_codes(g):
    """Codes of lengths on both sides of what is left out of the pack, and rows among the longer ones."""
    z, e = _normal(g, 90, 12), _normal(g, 140, 12)
    e[::2] *= torch.exp2(torch.linspace(0, 8, 70))[:, None]
    z[::9] *= torch.exp2(torch.linspace(0, 7, 10))[:, None]
    return z, e


def _halfway(g):
    e = _normal(g, 70, 8)
    pairs = torch.randint(0, 70, (2, 50), generator=g)
    return (e[pairs[0]] + e[pairs[1]]) / 2, e


def _same_value(g):
    return torch.full((20, 3), 2.5), torch.full((40, 3), 2.5)


def _all_nonfinite(g):
    return _normal(g, 20, 4), torch.full((10, 4), float("nan"))


CASES = {
    "gaussian": lambda g: (_normal(g, 100, 64), _normal(g, 200, 64)),
    "one dimension": lambda g: (_normal(g, 60, 1), _normal(g, 100, 1)),
    "three dimensions": lambda g: (_normal(g, 60, 3), _normal(g, 33, 3)),
    "eight dimensions": lambda g: (_normal(g, 60, 8), _normal(g, 129, 8)),
    "257 dimensions": lambda g: (_normal(g, 20, 257), _normal(g, 40, 257)),
    "512 dimensions": lambda g: (_normal(g, 12, 512), _normal(g, 70, 512)),
    "one code": lambda g: (_normal(g, 20, 5), _normal(g, 1, 5)),
    "two codes": lambda g: (_normal(g, 20, 5), _normal(g, 2, 5)),
    "one row": lambda g: (_normal(g, 1, 64), _normal(g, 65, 64)),
    "integer lattice": lambda g: (
        torch.randint(-1, 2, (60, 3), generator=g).float(),
        torch.randint(-1, 2, (90, 3), generator=g).float(),
    ),
    "duplicates": lambda g: (_normal(g, 40, 8), _normal(g, 30, 8).repeat(3, 1)),
    "half repeated, dead codes": lambda g: (
        _normal(g, 90, 8),
        torch.cat([_normal(g, 40, 8).repeat(2, 1), torch.zeros(20, 8), -torch.zeros(20, 8)]),
    ),
    "one huge code": _one_huge_code,
    "one code 50 times as long": lambda g: _one_huge_code(g, 50.0),
    "long codes": _long_codes,
    "only long codes": lambda g: (_normal(g, 40, 8), _normal(g, 70, 8) * 300),
    "collapsed": lambda g: (_normal(g, 40, 8), _normal(g, 1, 8).expand(70, 8)),
    "nearly collapsed": lambda g: (_normal(g, 40, 8), _normal(g, 1, 8) + 1e-6 * _normal(g, 70, 8)),
    "same value": _same_value,
    "halfway": _halfway,
    "near ties": _near_ties,
    "pairs within a group": lambda g: _pairs(g, 8),
    "pairs one group apart": lambda g: _pairs(g, 32),
    "pairs one tile apart": lambda g: _pairs(g, 64),
    "pairs three tiles apart": lambda g: _pairs(g, 192),
    "offset 1e6": lambda g: (_normal(g, 40, 8) + 1e6, _normal(g, 70, 8) + 1e6),
    "offset rows": lambda g: (_normal(g, 40, 8) + 1e5, _normal(g, 70, 8)),
    "scale 1e-30": lambda g: (_normal(g, 40, 32) * 1e-30, _normal(g, 70, 32) * 1e-30),
    "scale 1e-42": lambda g: (_normal(g, 40, 8) * 1e-42, _normal(g, 70, 8) * 1e-42),
    "scale 1e15": lambda g: (_normal(g, 40, 32) * 1e15, _normal(g, 70, 32) * 1e15),
    "scale 1e38": lambda g: (_normal(g, 40, 8) * 1e38, _normal(g, 70, 8) * 1e38),
    "far apart scales": lambda g: (_normal(g, 40, 8) * 1e15, _normal(g, 70, 8) * 1e-15),
    "tiny rows": lambda g: (_normal(g, 40, 8) * 1e-15, _normal(g, 70, 8) * 1e15),
    "rows over ten decades": lambda g: (
        _normal(g, 60, 16) * 10 ** (10 * torch.rand(60, 1, generator=g) - 5),
        _normal(g, 70, 16),
    ),
    "codes over eight decades": lambda g: (
        _normal(g, 40, 16),
        _normal(g, 70, 16) * 10 ** (8 * torch.rand(70, 1, generator=g) - 4),
    ),
    "one huge coordinate": _one_huge_coordinate,
    "zero rows and codes": lambda g: (torch.zeros(10, 6), torch.cat([_normal(g, 8, 6), torch.zeros(3, 6)])),
    "non-finite": _nonfinite,
    "all codes non-finite": _all_nonfinite,
}


def make(name, dtype=torch.float32, seed=0):
    """The named case in a dtype (float64: with all its digits in use)."""
    z, e = CASES[name](torch.Generator().manual_seed(seed))
    if dtype == torch.float64:
        return z.double() * (1 + 1e-11), e.double() * (1 - 1e-11)
    return z.to(dtype), e.to(dtype)


def slow(values):
    """Parameters for the long suite alone."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


def first(values):
    """Parameters of which only the first belongs to the quick suite: the interpreter is slow."""
    return [values[0], *slow(values[1:])]
