"""The certificate under attack: the very margin function and packing the kernels use, fed with the worst scores that
the accumulation model allows, must keep the contract's choice on every row."""

import numpy as np
import pytest
import torch
from backends.triton import hostile

from vqkernels import reference

pytest.importorskip("triton")

import triton
import triton.language as tl

from vqkernels.backends.triton import configs, nearest
from vqkernels.backends.triton.margin import threshold
from vqkernels.backends.triton.rows import code_units


@triton.jit
def threshold_kernel(best, norm, error, out, radius, spread, PADDED: tl.constexpr, METRIC: tl.constexpr):
    i = tl.program_id(0)
    limit = threshold(
        tl.load(best + i), tl.load(norm + i), tl.load(error + i), tl.load(radius), tl.load(spread), PADDED, METRIC
    )
    tl.store(out + i, limit)


@triton.jit
def units_kernel(state, out):
    exponent, cut = code_units(state)
    tl.store(out, exponent)
    tl.store(out + 1, cut.to(tl.int32))


class Operands:
    """One problem after packing, in float64 numpy: rows q and codes p with everything the certificate is told."""

    def __init__(self, z, codebook, metric, device):
        self.device, self.metric, self.dim = device, metric, z.shape[1]
        config = configs.SearchConfig(32, 64, 16, 4, 1, False)
        codes = nearest.pack_codes(
            z.to(device)[None, None], None, codebook.to(device)[None], metric, config, certified=True
        )
        rows = nearest.pack_rows(z.to(device)[None, None], None, codes, config)
        self.p = codes.packed[: len(codebook)].double().cpu().numpy()
        self.half = codes.half_norms[: len(codebook)].double().cpu().numpy()
        self.q = rows.packed[: len(z)].double().cpu().numpy()
        self.beta, self.norm, self.error = (
            x[: len(z)].double().cpu().numpy() for x in (rows.beta, rows.norm, rows.error)
        )
        state = codes.state[0].cpu()
        units = torch.empty(2, dtype=torch.int32, device=device)
        units_kernel[(1,)](codes.state, units)
        self.exponent, self.cut = int(units[0]), bool(units[1])
        self.radius, self.spread = (float(x) for x in state[1:3].view(torch.float32))
        self.centre = codes.centre[0, : self.dim].double().cpu().numpy()

    def limits(self, best):
        """The kernels' threshold for each row."""
        to = {"dtype": torch.float32, "device": self.device}
        best, norm, error = (torch.tensor(x, **to) for x in (best, self.norm, self.error))
        radius, spread = torch.tensor([self.radius], **to), torch.tensor([self.spread], **to)
        out = torch.empty_like(best)
        threshold_kernel[(len(best),)](
            best, norm, error, out, radius, spread, PADDED=self.p.shape[1], METRIC=self.metric
        )
        return out.double().cpu().numpy()


def truncated_product(q, p, step):
    """A tensor core that aligns `step` products and the running sum to the largest of them, keeps 24 bits of each, and
    truncates the sum to fp32: [N, D'] x [K, D'] -> [N, K]."""
    total = np.zeros((len(q), len(p)))
    for start in range(0, q.shape[1], step):
        terms = q[:, None, start : start + step] * p[None, :, start : start + step]
        terms = np.concatenate([terms, total[:, :, None]], axis=2)
        largest = np.abs(terms).max(axis=2, keepdims=True)
        unit = np.exp2(np.floor(np.log2(np.where(largest > 0, largest, 1.0))) - 23)
        total = (np.trunc(terms / unit) * unit).sum(axis=2)
        unit = np.exp2(np.floor(np.log2(np.where(total != 0, np.abs(total), 1.0))) - 23)
        total = np.trunc(total / unit) * unit
    return total


def scores(operands, product):
    """half - beta · product, rounded once to fp32 as the kernel's FMA does."""
    return np.float64(np.float32(operands.half[None, :] - operands.beta[:, None] * product))


def worst_scores(operands, chosen):
    """Scores shifted by everything the model allows: the contract's choice up, every other code down."""
    exact = operands.half[None, :] - operands.beta[:, None] * (operands.q @ operands.p.T)
    model = 1.25 * operands.p.shape[1] * 2.0**-23 * operands.norm[:, None] * operands.radius
    shift = np.where(np.arange(len(operands.p))[None, :] == chosen[:, None], model, -model)
    return np.float64(np.float32(exact + shift))


def near_ties(dim, codes, rows, seed):
    """Rows on the border between two codes, pushed off it by 2^-40 ... 2^-8 of the distance."""
    g = torch.Generator().manual_seed(seed)
    codebook = torch.randn(codes, dim, generator=g)
    a, b = torch.randint(0, codes, (2, rows), generator=g)
    push = torch.exp2(-8 - 32 * torch.rand(rows, 1, generator=g)) * torch.randn(rows, 1, generator=g).sign()
    return ((codebook[a] + codebook[b]) / 2 + push * (codebook[a] - codebook[b])), codebook


ATTACKS = {
    **{name: (lambda make=make: make(torch.Generator().manual_seed(5))) for name, make in hostile.CASES.items()},
    **{f"border, D={d}": (lambda d=d: near_ties(d, 60, 60, d)) for d in (1, 2, 8, 33, 100)},
    "border, far away": lambda: tuple(x + 1e3 for x in near_ties(8, 60, 60, 1)),
    "border, two codes": lambda: near_ties(16, 2, 60, 2),
}
# non-finite inputs are settled before any score is looked at
FINITE = [name for name in ATTACKS if "non-finite" not in name]


@pytest.mark.parametrize("metric", hostile.first(["euclidean", "dot", "cosine"]))
@pytest.mark.parametrize("name", FINITE)
def test_the_contracts_choice_is_always_kept(name, metric, device):
    z, codebook = ATTACKS[name]()
    operands = Operands(z, codebook, metric, device)
    chosen = reference.nearest(z, codebook, metric=metric).numpy()
    steps = [4, 16] if operands.p.shape[1] <= 128 else [16]
    passes = [scores(operands, truncated_product(operands.q, operands.p, step)) for step in steps]
    for v in [*passes, worst_scores(operands, chosen)]:
        kept = ~(v > operands.limits(v.min(axis=1))[:, None])
        assert kept[np.arange(len(z)), chosen].all()
        alone = kept.sum(axis=1) == 1
        assert (v.argmin(axis=1)[alone] == chosen[alone]).all()


@pytest.mark.parametrize("name", [*FINITE[::3], *hostile.slow([name for i, name in enumerate(FINITE) if i % 3])])
def test_the_measured_bounds_hold(name, device):
    z, codebook = ATTACKS[name]()
    operands = Operands(z, codebook, "euclidean", device)
    scale = 2.0 ** min(10 - operands.exponent, 126)
    x = (z.double().numpy() - operands.centre) * scale
    y = (codebook.double().numpy() - operands.centre) * scale
    image = operands.beta[:, None] * operands.q[:, : operands.dim]
    fits = np.isfinite(operands.error)
    assert (np.linalg.norm(image, axis=1) <= operands.norm)[fits].all()
    assert (np.linalg.norm(image - x, axis=1) <= operands.error)[fits].all()
    assert (np.linalg.norm(operands.p, axis=1) <= operands.radius).all()
    length = np.linalg.norm(y, axis=1)
    left_out = operands.cut & (length >= 2.0**11) & np.isfinite(operands.half)
    packed = ~left_out & np.isfinite(operands.half)
    if np.isfinite(operands.radius):
        assert (np.linalg.norm(operands.p[:, : operands.dim] - y, axis=1) <= operands.spread)[packed].all()
    for vectors in (x[fits], image[fits]):  # what stands for a code that was left out is a lower bound of its score
        true = 0.5 * length**2 - vectors @ y.T
        assert (operands.half <= true)[:, left_out].all()
    assert (operands.p[left_out] == 0).all()


def test_the_attack_has_teeth(device):
    """A threshold of a twentieth of the margin must lose rows to it, or the attack proves nothing."""
    lost = 0
    for name in ("border, D=8", "border, D=33", "border, D=100", "border, two codes"):
        z, codebook = ATTACKS[name]()
        operands = Operands(z, codebook, "euclidean", device)
        chosen = reference.nearest(z, codebook).numpy()
        v = worst_scores(operands, chosen)
        best = v.min(axis=1)
        limit = best + (operands.limits(best) - best) / 20
        lost += int((v > limit[:, None])[np.arange(len(z)), chosen].sum())
    assert lost > 10


def test_an_unprovable_row_keeps_every_code(device):
    z, codebook = hostile.make("far apart scales")
    operands = Operands(z, codebook, "euclidean", device)
    assert not (operands.limits(np.zeros(len(z))) < np.inf).any()
