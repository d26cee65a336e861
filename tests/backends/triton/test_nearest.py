"""The Triton search against the contract: every index, on inputs chosen to break it."""

import itertools

import pytest
import torch
from backends.triton import hostile

from vqkernels import reference
from vqkernels.verification.adversaries import ADVERSARIES

triton_nearest = pytest.importorskip("vqkernels.backends.triton.nearest", reason="triton is not installed")

METRICS = ["euclidean", "dot", "cosine"]


def search(z, codebook, device, *, mask=None, metric="euclidean", precision="exact"):
    """Indices (N,) and the decided count, through the four-dimensional entry point."""
    view = None if mask is None else mask.to(device)[None, None]
    indices, decided = triton_nearest.nearest(
        z.to(device)[None, None], codebook.to(device)[None], view, metric, precision
    )
    return indices[0, 0].cpu(), int(decided)


@pytest.mark.slow
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("shape", [(40, 70, 3), (24, 130, 40)], ids=str)
@pytest.mark.parametrize("name", ADVERSARIES)
def test_exact_against_the_common_adversaries(name, shape, metric, device):
    z, codebook = ADVERSARIES[name](*shape)
    indices, _ = search(z, codebook, device, metric=metric)
    assert torch.equal(indices, reference.nearest(z, codebook, metric=metric))


@pytest.mark.parametrize("metric", hostile.first(METRICS))
@pytest.mark.parametrize("name", hostile.CASES)
def test_exact_equals_the_contract(name, metric, device):
    z, codebook = hostile.make(name)
    indices, _ = search(z, codebook, device, metric=metric)
    assert torch.equal(indices, reference.nearest(z, codebook, metric=metric))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "name", ["scale 1e-42", *hostile.slow(["near ties", "gaussian", "integer lattice", "non-finite"])]
)
def test_exact_in_every_dtype(name, dtype, device):
    z, codebook = hostile.make(name, dtype)
    indices, _ = search(z, codebook, device)
    assert torch.equal(indices, reference.nearest(z, codebook))


@pytest.mark.parametrize("magnitude", [1e-170, 1e100, 1e160, 1e300])
@pytest.mark.parametrize("metric", hostile.first(METRICS))
def test_float64_beyond_the_range_of_float32(magnitude, metric, device):
    z, codebook = hostile.make("eight dimensions", torch.float64)
    z, codebook = z * magnitude, codebook * magnitude
    indices, _ = search(z, codebook, device, metric=metric)
    assert torch.equal(indices, reference.nearest(z, codebook, metric=metric))


@pytest.mark.parametrize(
    "types",
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float64), (torch.float64, torch.float16)],
)
def test_exact_with_two_dtypes(types, device):
    z, codebook = (x.to(t) for x, t in zip(hostile.make("gaussian"), types, strict=True))
    indices, _ = search(z, codebook, device)
    assert torch.equal(indices, reference.nearest(z, codebook))


def test_the_filter_decides_ordinary_rows(device):
    z, codebook = hostile.make("gaussian")
    _, decided = search(z, codebook, device)
    assert decided >= 0.9 * len(z)
    clustered = codebook[torch.arange(100)] + 0.1 * z
    assert search(clustered, codebook, device)[1] == len(z)
    # both sides are centred, so a common offset leaves the bits to the differences
    assert search(*hostile.make("offset 1e6"), device)[1] >= 36


def test_exact_ties_are_left_to_float64(device):
    g = torch.Generator().manual_seed(3)
    half = torch.randn(35, 8, generator=g)
    indices, decided = search(torch.zeros(20, 8), torch.cat([half, -half]), device)
    assert decided == 0
    assert (indices == half.double().square().sum(1).argmin()).all()


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", ["collapsed", "duplicates", "half repeated, dead codes", "same value", "one code"])
def test_repeated_codes_do_not_compete(name, metric, device):
    z, codebook = hostile.make(name)
    indices, decided = search(z, codebook, device, metric=metric)
    assert torch.equal(indices, reference.nearest(z, codebook, metric=metric))
    assert decided >= 0.9 * len(z)


def test_repetitions_that_the_hash_table_loses_are_only_slow(device, monkeypatch):
    z, codebook = hostile.make("duplicates")
    monkeypatch.setattr(triton_nearest, "HASH_SLOTS", 0)  # two slots
    indices, decided = search(z, codebook, device)
    assert torch.equal(indices, reference.nearest(z, codebook))
    assert decided < 0.5 * len(z)


@pytest.mark.parametrize("name", ["one huge code", "one code 50 times as long", "one huge coordinate"])
def test_a_huge_code_spoils_no_row_but_those_near_it(name, device):
    z, codebook = hostile.make(name)
    indices, decided = search(z, codebook, device)
    assert torch.equal(indices, reference.nearest(z, codebook))
    assert decided >= 0.9 * len(z)


def test_masked_rows_are_not_sampled(device):
    """Every second row is masked: if it were read, the huge code would set the scale of the others again."""
    z, codebook = hostile.make("one huge code")
    mask = torch.arange(len(z)) % 2 == 1
    z[~mask] = 1e30
    indices, decided = search(z, codebook, device, mask=mask)
    assert torch.equal(indices, reference.nearest(z, codebook, mask=mask))
    assert decided >= 0.9 * int(mask.sum())


@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_the_lowest_of_64_equally_near_codes(precision, device):
    """The corners of a cube: exact in any arithmetic, distinct, and half of them tie for every row on an axis."""
    corners = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=7))).to(torch.bfloat16)
    codebook = corners[torch.randperm(128, generator=torch.Generator().manual_seed(4))]
    z = torch.cat([torch.eye(7), -torch.eye(7), torch.zeros(1, 7)]).to(torch.bfloat16)
    indices, _ = search(z, codebook, device, precision=precision)
    assert torch.equal(indices, reference.nearest(z, codebook))


def test_few_candidates_take_the_sparse_path_and_agree(device, monkeypatch):
    z, codebook = hostile.make("near ties")
    expected = reference.nearest(z, codebook)
    for few in (0, 64):
        monkeypatch.setattr(triton_nearest.configs, "RESCORE_FEW", few)
        assert torch.equal(search(z, codebook, device)[0], expected)


@pytest.mark.parametrize("metric", hostile.first(METRICS))
def test_masked_rows_are_never_read(metric, device):
    z, codebook = hostile.make("eight dimensions")
    mask = torch.rand(len(z), generator=torch.Generator().manual_seed(1)) < 0.6
    poisoned = torch.where(mask[:, None], z, float("nan"))
    indices, decided = search(poisoned, codebook, device, mask=mask, metric=metric)
    assert torch.equal(indices, reference.nearest(z, codebook, mask=mask, metric=metric))
    assert decided <= int(mask.sum())


def test_every_row_masked(device):
    z, codebook = hostile.make("eight dimensions")
    indices, decided = search(z, codebook, device, mask=torch.zeros(len(z), dtype=torch.bool))
    assert (indices == -1).all()
    assert decided == 0


@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_no_rows(precision, device):
    indices, decided = search(torch.zeros(0, 4), torch.zeros(3, 4), device, precision=precision)
    assert indices.shape == (0,)
    assert decided == 0


@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_heads_and_strided_layouts(precision, device):
    g = torch.Generator().manual_seed(2)
    codebook = torch.randn(2, 40, 6, generator=g)
    images = torch.randn(3, 12, 5, generator=g)  # (batch, channel, position)
    z = images.view(3, 2, 6, 5).permute(0, 1, 3, 2)  # (B, H, P, D)
    mask = (torch.rand(3, 5, generator=g) < 0.7)[:, None, :].expand(3, 2, 5)
    indices, _ = triton_nearest.nearest(z.to(device), codebook.to(device), mask.to(device), "euclidean", precision)
    assert indices.is_contiguous()
    for head in range(2):
        expected = reference.nearest(z[:, head].reshape(15, 6), codebook[head], mask=mask[:, head].reshape(15))
        assert torch.equal(indices[:, head].cpu().reshape(15), expected)


def test_codebook_with_strides(device):
    z, codebook = hostile.make("three dimensions")
    strided = codebook.t().contiguous().t()
    assert torch.equal(search(z, strided, device)[0], reference.nearest(z, codebook))


def test_splitting_the_codes_changes_nothing(device, monkeypatch):
    z, codebook = hostile.make("integer lattice", torch.bfloat16)
    codebook = codebook.repeat(5, 1)
    expected = search(z, codebook, device)[0]
    for processors in (3, 64):
        monkeypatch.setattr(triton_nearest, "multiprocessors", lambda _, n=processors: n)
        assert torch.equal(search(z, codebook, device)[0], expected)
        fast = search(z, codebook, device, precision="fast")[0]
        assert torch.equal(fast, expected), "small integers are exact, so fast must keep the lowest index too"


@pytest.mark.parametrize("name", ["pairs one tile apart", "pairs three tiles apart", "near ties"])
def test_a_near_tie_between_two_splits_is_not_decided_by_one(name, device, monkeypatch):
    """Every tile its own split, and the pass orders each pair at random: the loser of the merge must still count."""
    monkeypatch.setattr(triton_nearest, "multiprocessors", lambda _: 64)
    z, codebook = hostile.make(name)
    indices, decided = search(z, codebook, device)
    assert torch.equal(indices, reference.nearest(z, codebook))
    assert decided < 0.5 * len(z)


@pytest.mark.parametrize("capability", [(9, 0), *(pytest.param(c, marks=pytest.mark.slow) for c in [(8, 0), (10, 0)])])
@pytest.mark.parametrize("name", ["near ties", "257 dimensions"])
def test_the_shapes_of_the_chips_in_the_interpreter(name, capability, device, monkeypatch):
    """The interpreter's own tiles are small; here it runs those of the chips, descriptors included."""
    if device.type == "cuda":
        pytest.skip("the GPU has shapes of its own")
    monkeypatch.setattr(triton_nearest, "capability", lambda _: capability)
    z, codebook = hostile.make(name)
    expected = reference.nearest(z, codebook)
    assert torch.equal(search(z, codebook, device)[0], expected)
    z, codebook = hostile.make("integer lattice", torch.bfloat16)
    assert torch.equal(search(z, codebook, device, precision="fast")[0], reference.nearest(z, codebook))


@pytest.mark.parametrize(
    "name", ["non-finite", "one huge code", "integer lattice", *hostile.slow(["gaussian", "257 dimensions"])]
)
def test_fast_is_the_nearest_code_of_the_rounded_operands(name, device):
    z, codebook = hostile.make(name)
    indices, _ = search(z, codebook, device, precision="fast")
    expected = reference.nearest(z, codebook)
    table = reference.scores(z.nan_to_num(0, 0, 0), codebook)
    excess = table.gather(1, indices[:, None]) - table.gather(1, expected[:, None])
    rows = z.isfinite().all(1)
    assert (indices[~rows] == 0).all()
    scale = z[rows].double().norm(dim=1).max() * codebook[codebook.isfinite().all(1)].double().norm(dim=1).max()
    assert (excess[rows] <= 2.0**-9 * scale).all()
