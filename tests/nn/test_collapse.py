"""The collapse suite: how codebooks die elsewhere, reproduced, and that ours does not.

lucidrains' layer is run where it is installed (`pip install vqkernels[test]`). The others are their published update
rules, written out here: one-hot products, Laplace-smoothed counts, an average that starts at the codes.
"""

import pytest
import torch
from torch.nn import functional as F

from vqkernels import reference
from vqkernels.nn import VectorQuantizer

RECOMMENDED = dict(ema_decay=0.99, init="kmeans", revive="rows")


@pytest.fixture
def lucidrains():
    return pytest.importorskip("vector_quantize_pytorch").VectorQuantize


def one_hot_step(codes, cluster_size, embed_avg, z, decay, epsilon=1e-5):
    """The EMA step of rosinality's Quantize and of encodec's EuclideanCodebook: in place, and the new codes."""
    one_hot = F.one_hot(torch.cdist(z, codes).argmin(1), len(codes)).to(z.dtype)
    cluster_size.mul_(decay).add_(one_hot.sum(0), alpha=1 - decay)
    embed_avg.mul_(decay).add_(one_hot.T @ z, alpha=1 - decay)
    total = cluster_size.sum()
    smoothed = (cluster_size + epsilon) / (total + len(codes) * epsilon) * total
    return embed_avg / smoothed.unsqueeze(1)


@pytest.mark.parametrize("start", ["normal", "uniform"])
def test_the_first_step_flings_no_unused_code(start):
    """rosinality (normal codes), encodec without k-means (uniform): counts start at 0, averages at the codes."""
    codes = torch.randn(256, 8) if start == "normal" else torch.rand(256, 8) * 2 - 1
    z = torch.randn(512, 8) * 0.1 + codes[0]
    theirs = one_hot_step(codes, torch.zeros(256), codes.clone(), z, 0.99)
    assert theirs.norm(dim=1).max() > 1e4

    layer = VectorQuantizer(8, 256, ema_decay=0.99)
    layer.codebook.copy_(codes)
    layer(z)
    used = layer.counts > 0
    assert not used.all() and layer.codebook[~used].equal(codes[~used])
    assert layer.codebook.norm(dim=1).max() <= max(codes.norm(dim=1).max(), z.norm(dim=1).max())


def test_unused_codes_do_not_decay_to_zero(lucidrains):
    """lucidrains with its defaults: a code that nobody chooses shrinks towards the smoothing's floor."""
    torch.manual_seed(0)
    theirs = lucidrains(dim=8, codebook_size=64, decay=0.8)
    ours = VectorQuantizer(8, 64, ema_decay=0.8)
    codes = torch.randn(64, 8) * 5
    codes[0] = 0.0
    theirs.codebook = codes
    theirs._codebook.embed_avg.data.copy_(theirs._codebook.embed.data)
    ours.codebook.copy_(codes)
    never = torch.ones(64, dtype=torch.bool)
    for _ in range(120):
        z = torch.randn(64, 8) * 0.1
        theirs(z.unsqueeze(0))
        _, indices, _ = ours(z)
        never[indices] = False
    assert theirs.codebook[never].norm(dim=1).median() < 0.02 * codes[never].norm(dim=1).median()
    assert never.sum() > 50 and ours.codebook[never].equal(codes[never])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ema_decay", [None, 0.99])
def test_tiny_codes_in_a_low_precision_module_do_not_tie(dtype, ema_decay, backend):
    """taming's start in [-1/K, 1/K]: beside |z|^2 no difference between codes survives in 8 or 11 bits."""
    size = 16384
    layer = VectorQuantizer(8, size, ema_decay=ema_decay, backend=backend).to(dtype).eval()
    z = torch.randn(400, 8).to(dtype)
    codes = layer.codebook.detach()
    low = codes.to(dtype)
    distance = z.square().sum(1, keepdim=True) + low.square().sum(1) - 2 * z @ low.T
    theirs = distance.argmin(1).unique()
    _, indices, _ = layer(z)
    assert indices.equal(reference.nearest(z, codes))
    assert len(theirs) < 0.1 * len(indices.unique())


def test_one_nan_poisons_no_code(lucidrains, backend):
    """Elsewhere 0 * NaN in the one-hot product reaches every code."""
    z = torch.randn(256, 8)
    z[17, 3] = torch.nan
    theirs = lucidrains(dim=8, codebook_size=32)
    theirs(z.unsqueeze(0))
    assert theirs.codebook.isnan().any(1).all()
    plain = one_hot_step(torch.randn(32, 8), torch.zeros(32), torch.zeros(32, 8), z, 0.99)
    assert plain.isnan().any(1).all()

    for arguments in (dict(ema_decay=0.99), RECOMMENDED, dict(), dict(revive="rows")):
        layer = VectorQuantizer(8, 32, backend=backend, **arguments)
        for _ in range(3):
            leaf = z.clone().requires_grad_()
            _, _, loss = layer(leaf)
            loss.backward()
            assert loss.isnan() and layer.codebook.isfinite().all()
        if layer.codebook.grad is not None:
            assert layer.codebook.grad.isfinite().all()


def test_k_means_on_fewer_rows_than_codes(lucidrains, backend):
    """lucidrains leaves its surplus codes at zero, silently; ours warns and keeps them apart."""
    z = torch.randn(64, 8) + 3
    theirs = lucidrains(dim=8, codebook_size=512, kmeans_init=True, decay=0.99)
    theirs.eval()
    theirs._codebook.init_embed_(z.view(1, 64, 8))
    assert (theirs.codebook == 0).all(1).sum() > 400

    layer = VectorQuantizer(8, 512, ema_decay=0.99, init="kmeans", backend=backend)
    with pytest.warns(RuntimeWarning, match="k-means initialisation of 512 codes found 64 different usable rows"):
        quantized, indices, _ = layer(z)
    assert len(layer.codebook.unique(dim=0)) == 512 and layer.codebook.isfinite().all()
    assert quantized.equal(z) and len(indices.unique()) == 64  # as many codes as rows: each row is one
    recommended = VectorQuantizer(8, 512, backend=backend, **RECOMMENDED)
    recommended.load_state_dict(layer.state_dict())
    for _ in range(50):
        recommended(torch.randn(512, 8) + 3)
    assert (recommended.ema_counts > 0).all() and recommended.usage > 0.4


def test_a_zero_row_under_the_rotation_trick_is_its_code(lucidrains, backend):
    """lucidrains rotates a zero vector to zero, so that training and evaluation disagree on silence and padding."""
    z = torch.zeros(1, 4, 8)
    theirs = lucidrains(dim=8, codebook_size=16, rotation_trick=True)
    theirs.codebook = torch.randn(16, 8)
    quantized, indices, _ = theirs(z.clone().requires_grad_(), freeze_codebook=True)
    assert quantized.eq(0).all() and theirs.get_codes_from_indices(indices).norm() > 0.1

    layer = VectorQuantizer(8, 16, gradient="rotation", backend=backend)
    with torch.no_grad():
        layer.codebook.copy_(torch.randn(16, 8))
    leaf = z.clone().requires_grad_()
    quantized, indices, loss = layer(leaf)
    (quantized.sum() + loss).backward()
    assert quantized.equal(layer.decode(indices)) and quantized.norm() > 0.1
    assert leaf.grad.isfinite().all() and leaf.grad.abs().max() < 10
