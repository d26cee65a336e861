"""The operands of the CUDA search and its certificate under attack: measured bounds must hold, and the worst scores
that the accumulation model allows must keep the contract's choice on every row. The attack is the Triton kernels'."""

import numpy as np
import pytest
import torch
from backends.triton import hostile
from native import cuda_host
from native.build import compiler

from vqkernels import reference

pytestmark = pytest.mark.skipif(compiler() is None, reason="there is no C++ compiler")

LEFT_OUT = 2.0**13  # length in code units


def near_ties(dim, codes, rows, seed):
    """Rows on the border between two codes, pushed off it by 2^-40 ... 2^-8 of the distance."""
    g = torch.Generator().manual_seed(seed)
    codebook = torch.randn(codes, dim, generator=g)
    a, b = torch.randint(0, codes, (2, rows), generator=g)
    push = torch.exp2(-8 - 32 * torch.rand(rows, 1, generator=g)) * torch.randn(rows, 1, generator=g).sign()
    return ((codebook[a] + codebook[b]) / 2 + push * (codebook[a] - codebook[b])), codebook


BORDERS = {
    **{f"border, D={d}": (lambda d=d: near_ties(d, 60, 60, d)) for d in (1, 2, 8, 33, 100)},
    "border, far away": lambda: tuple(x + 1e3 for x in near_ties(8, 60, 60, 1)),
    "border, two codes": lambda: near_ties(16, 2, 60, 2),
}
# non-finite inputs are settled before any score is looked at
ATTACKS = {name: (lambda name=name: hostile.make(name, seed=5)) for name in hostile.CASES if "non-finite" not in name}
ATTACKS |= BORDERS


def worst_scores(packed, chosen):
    """Scores shifted by everything the model allows: the contract's choice up, every other code down."""
    exact = packed.half[None, :] - packed.beta[:, None] * (packed.q @ packed.p.T)
    radius = packed.radius if np.isfinite(packed.radius) else 0.0  # where nothing is proved there is nothing to attack
    model = 1.25 * packed.p.shape[1] * 2.0**-23 * packed.norm[:, None] * radius
    shift = np.where(np.arange(len(packed.p))[None, :] == chosen[:, None], model, -model)
    return np.float64(np.float32(exact + shift))


@pytest.mark.parametrize("metric", ["euclidean", "dot", "cosine"])
@pytest.mark.parametrize("name", ATTACKS)
def test_the_contracts_choice_is_always_kept(name, metric):
    z, codebook = ATTACKS[name]()
    packed = cuda_host.pack(z, codebook, metric)
    chosen = reference.nearest(z, codebook, metric=metric).numpy()
    v = worst_scores(packed, chosen)
    kept = ~(v > packed.limits(v.min(axis=1))[:, None])
    assert kept[np.arange(len(z)), chosen].all()
    alone = kept.sum(axis=1) == 1
    assert (v.argmin(axis=1)[alone] == chosen[alone]).all()


@pytest.mark.parametrize("name", ATTACKS)
def test_the_measured_bounds_hold(name):
    z, codebook = ATTACKS[name]()
    packed = cuda_host.pack(z, codebook)
    scale, codes = 2.0**packed.exponent, len(codebook)
    x, y = ((part.double().numpy() - packed.centre) * scale for part in (z, codebook))
    image = packed.beta[:, None] * packed.q[:, : z.shape[1]]
    fits = np.isfinite(packed.error)
    assert (np.linalg.norm(image, axis=1) <= packed.norm)[fits].all()
    assert (np.linalg.norm(image - x, axis=1) <= packed.error)[fits].all()
    assert np.isposinf(packed.half[codes:]).all() and (packed.p[codes:] == 0).all(), "padding is never chosen"
    if np.isposinf(packed.radius):
        return  # nothing is proved, and nothing claimed
    assert (np.linalg.norm(packed.p, axis=1) <= packed.radius).all()
    length = np.linalg.norm(y, axis=1)
    left_out = length >= LEFT_OUT
    assert left_out.any() == packed.left_out
    assert (np.linalg.norm(packed.p[:codes, : z.shape[1]] - y, axis=1) <= packed.spread)[~left_out].all()
    assert (packed.p[:codes][left_out] == 0).all()
    # what stands for a code that was left out is a lower bound of its score, for every row that it is used for
    used = fits & (packed.norm + packed.error <= 2.0**11)
    for vectors in (x[used], image[used]):
        true = 0.5 * length**2 - vectors @ y.T
        assert (packed.half[:codes] <= true)[:, left_out].all()


def test_the_attack_has_teeth():
    """A threshold of a twentieth of the margin must lose rows to it, or the attack proves nothing."""
    lost = 0
    for name in ("border, D=8", "border, D=33", "border, D=100", "border, two codes"):
        z, codebook = ATTACKS[name]()
        packed = cuda_host.pack(z, codebook)
        chosen = reference.nearest(z, codebook).numpy()
        v = worst_scores(packed, chosen)
        best = v.min(axis=1)
        limit = best + (packed.limits(best) - best) / 20
        lost += int((v > limit[:, None])[np.arange(len(z)), chosen].sum())
    assert lost > 10


def test_codes_are_left_out_of_some_attacks():
    """And rows too long for their bounds keep every code."""
    z, codebook = hostile.make("one huge code", seed=5)
    packed = cuda_host.pack(z, codebook)
    assert packed.left_out
    long = packed.norm + packed.error > 2.0**11
    limits = packed.limits(np.zeros(len(z)))
    assert long.any() and np.isposinf(limits[long]).all() and np.isfinite(limits[~long]).any()


def test_shared_memory_is_what_the_budget_says():
    for slice_, streamed, said in ((16, 0, 6912), (32, 0, 13056), (64, 0, 25344), (128, 0, 49920), (64, 1, 74496)):
        assert cuda_host.library().cuda_search_shared_bytes(slice_, streamed) == said
