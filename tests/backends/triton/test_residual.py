"""Residual quantization with Triton against its specification: the contract at every level, sums in level order."""

import pytest
import torch
from backends.triton import hostile, residual_oracle

from vqkernels.backends.triton import configs

triton_residual = pytest.importorskip("vqkernels.backends.triton.residual", reason="triton is not installed")

METRICS = ["euclidean", "dot", "cosine"]
GRADIENTS = ["straight_through", "rotation"]
triton_nearest = pytest.importorskip("vqkernels.backends.triton.nearest", reason="triton is not installed")
WAYS = hostile.first(["one launch", "by level"])  # quick by level: float64 codes, which no chained search takes


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    """Whether the levels are chained in one launch or searched one after the other; the other one is not called."""
    if request.param == "by level":
        monkeypatch.setattr(configs, "CHAINED_DIM", 0)
    unused = "search_chained" if request.param == "by level" else "search_by_level"
    monkeypatch.setattr(triton_residual, unused, lambda *_: pytest.fail(f"{unused} was called"))
    return request.param


def forward(z, codebooks, device, levels=None, *, metric="euclidean", precision="exact", statistics=True):
    """The kernels' outputs for z (N, D), codebooks (Q, K, D), levels (N,), on the CPU, without the head axes."""
    view = None if levels is None else levels.to(device)[None, None]
    quantized, indices, errors, counts, sums = triton_residual.residual_quantize(
        z.to(device)[None, None], codebooks.to(device)[None], view, metric, precision, statistics
    )
    parts = [quantized[0, 0], indices[0, 0], errors[0], *((counts[0], sums[0]) if statistics else (counts, sums))]
    return residual_oracle.Expected(*(part.cpu() for part in parts))


def check(z, codebooks, device, levels=None, metric="euclidean", statistics=False):
    """Every output against the specification; rows of no level hold what `z` holds there, which nothing may read."""
    read = z if levels is None else torch.where((levels > 0)[:, None], z, 0)
    found = forward(z, codebooks, device, levels, metric=metric, statistics=statistics)
    expected = residual_oracle.forward(read, codebooks, levels, metric)
    assert torch.equal(found.indices, expected.indices)
    same_bits = found.quantized.isnan() | (found.quantized == expected.quantized)
    assert found.quantized.dtype == z.dtype
    assert same_bits.all()
    assert torch.equal(found.quantized.isnan(), expected.quantized.isnan())
    torch.testing.assert_close(found.squared_errors, expected.squared_errors, rtol=1e-12, atol=0, equal_nan=True)
    assert found.sums.dtype == residual_oracle.wide_or_single(z)
    if statistics:
        assert torch.equal(found.counts, expected.counts)
        torch.testing.assert_close(found.sums.double(), expected.sums, rtol=1e-6, atol=1e-6)
    return found


def stack(codebook, depth=3, scale=0.5, seed=1):
    """A codebook per level: the given one, then ones of the size of what it leaves."""
    g = torch.Generator().manual_seed(seed)
    others = [torch.randn(codebook.shape, generator=g) * scale**level for level in range(1, depth)]
    return torch.stack([codebook, *(x.to(codebook.dtype) for x in others)])


@pytest.mark.parametrize("depth", hostile.first([3, 1, 2, 4]))
def test_every_level_equals_the_contract(depth, way, device):
    z, codebook = hostile.make("gaussian")
    check(z[:19], stack(codebook[:67], depth), device)


SMALL = [name for name in hostile.CASES if name not in ("257 dimensions", "512 dimensions")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "metric"),
    [(name, "euclidean") for name in SMALL]
    + [(name, metric) for name in ("near ties", "collapsed", "non-finite") for metric in METRICS[1:]],
)
def test_hostile_data_in_one_launch(name, metric, device):
    """What is hostile to one search, at the first level of two, and again at the last."""
    z, codebook = hostile.make(name)
    check(z[:30], torch.stack([codebook, codebook]), device, metric=metric)


@pytest.mark.parametrize("metric", hostile.slow(["euclidean", "cosine"]))
@pytest.mark.parametrize("name", ["one dimension", "257 dimensions", "one code", "one row"])
def test_every_shape_equals_the_contract(name, metric, device):
    z, codebook = hostile.make(name)
    check(z[:20], stack(codebook), device, metric=metric)


def test_candidates_that_one_slot_hides_are_swept_for(device):
    """Pairs three tiles apart stand in one slot: the pass keeps one; the second sweep finds the other."""
    z, codebook = hostile.make("pairs three tiles apart")
    check(z[:16], codebook[None], device)


def test_repetitions_that_the_hash_table_loses_are_only_slow(device, monkeypatch):
    monkeypatch.setattr(triton_nearest, "HASH_SLOTS", 0)
    z, codebook = hostile.make("duplicates")
    check(z[:12], codebook[None], device)


@pytest.mark.parametrize("level", hostile.first([1, 0]))
def test_ties_at_any_level_go_to_the_lowest_index(level, way, device):
    """The corners of a cube around every residual: sixteen equally near codes, in an order of their own."""
    g = torch.Generator().manual_seed(5)
    corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 4)[torch.randperm(16, generator=g)]
    coarse = 8.0 * torch.randint(-2, 3, (21, 4), generator=g)
    corners = torch.cat([torch.full((3, 4), 9.0), corners, corners[:2]])
    z = coarse[torch.randint(21, (20,), generator=g)] if level == 1 else torch.zeros(20, 4)
    codebooks = torch.stack([coarse, corners] if level == 1 else [corners, coarse])
    found = check(z, codebooks, device)
    assert (found.indices[:, level] == 3).all()


@pytest.mark.parametrize("name", ["near ties", *hostile.slow(["halfway", "duplicates", "same value", "collapsed"])])
def test_near_ties_at_the_second_level(name, way, device):
    """The first level takes a coarse code off and leaves the hostile case to the second."""
    z, codebook = hostile.make(name)
    coarse = 64.0 * torch.randint(-3, 4, codebook.shape, generator=torch.Generator().manual_seed(2))
    rows = z[:20] + coarse[torch.randint(len(coarse), (len(z[:20]),))]
    check(rows, torch.stack([coarse, codebook, codebook * 2.0**-20]), device)


@pytest.mark.parametrize("name", ["non-finite", *hostile.slow(["all codes non-finite", "zero rows and codes"])])
def test_one_bad_row_poisons_itself_alone(name, device):
    z, codebook = hostile.make(name)
    z, codebook = z[:20], codebook[:11]
    found = check(z, stack(codebook), device, statistics=True)
    if name == "non-finite":
        assert found.squared_errors.isnan().all()
        assert (found.indices[[3, 7, 9]] == 0).all()
        assert (found.counts.sum(1) == len(z) - 3).all()
        assert found.sums.isfinite().all()


def test_a_code_that_overflows_poisons_from_the_next_level_on(device):
    z, codebooks = torch.randn(9, 5), torch.randn(3, 9, 5)
    z[4] = torch.tensor([3e38, 3e38, 0, 0, 0])
    codebooks[0, 7] = torch.tensor([3e38, -1e38, 0, 0, 0])
    found = check(z, codebooks, device, metric="dot")
    assert found.squared_errors[1:].isnan().all()
    assert not found.squared_errors[0].isnan()


def test_rows_pass_as_many_levels_as_they_are_told(way, device):
    z, codebook = torch.randn(19, 7), torch.randn(5, 7)
    levels = torch.arange(len(z)) % 6 - 1
    z[levels <= 0] = torch.nan
    found = check(z, stack(codebook), device, levels, statistics=True)
    assert torch.equal((found.indices >= 0).sum(1), levels.clamp(0, 3))
    assert (found.quantized[levels <= 0] == 0).all()
    assert torch.equal(found.counts.sum(1), (levels[:, None] > torch.arange(3)).sum(0))


def test_zero_residuals_stay_zero(device):
    """Rows that are codes: nothing is left after the first level, and of equal distances the lowest index is taken."""
    codebook = torch.randn(16, 6)
    others = torch.cat([torch.randn(12, 6), torch.zeros(4, 6)])
    found = check(codebook.clone(), torch.stack([codebook, others, others]), device)
    assert torch.equal(found.quantized, codebook)
    assert (found.squared_errors == 0).all()
    assert (found.indices[:, 1:] == 12).all()


def test_the_sum_keeps_the_order_of_levels(device):
    """Codes of which every other order of addition gives another sum."""
    codebooks = torch.tensor([1.0, 2.0**24, -(2.0**24), 3.0]).view(4, 1, 1).expand(4, 1, 5)
    found = check(torch.randn(10, 5), codebooks, device)
    assert (found.quantized == 3.0).all()
    minus_zero = torch.full((2, 1, 3), -0.0)
    assert forward(torch.randn(4, 3), minus_zero, device).quantized.signbit().all()


@pytest.mark.parametrize(
    "types",
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.float64),
        *hostile.slow([(torch.float16, torch.float32), (torch.float64, torch.float64), (torch.float64, torch.float16)]),
    ],
    ids=str,
)
def test_every_type(types, device):
    z, codebook = hostile.make("three dimensions", torch.float64)
    z, codebooks = z[:19].to(types[0]), stack(codebook[:5]).to(types[1])
    check(z, codebooks, device, torch.arange(19) % 4, statistics=True)


@pytest.mark.parametrize("statistics", [False, True])
def test_no_rows(statistics, device):
    found = forward(torch.zeros(0, 3), torch.zeros(2, 4, 3), device, statistics=statistics)
    assert found.quantized.shape == (0, 3)
    assert found.indices.shape == (0, 2)
    assert (found.squared_errors == 0).all()
    assert found.counts.shape == ((2, 4) if statistics else (0,))
    assert (found.counts == 0).all()


def test_no_row_passes_any_level(device):
    z = torch.full((9, 3), torch.nan)
    found = forward(z, torch.randn(2, 4, 3), device, torch.zeros(9, dtype=torch.int64))
    assert (found.indices == -1).all()
    assert (found.quantized == 0).all()
    assert (found.squared_errors == 0).all()


def test_heads_images_and_strided_levels(way, device):
    g = torch.Generator().manual_seed(2)
    codebooks = torch.randn(2, 3, 5, 6, generator=g)
    images = torch.randn(2, 12, 5, generator=g)  # (batch, channel, position)
    z = images.view(2, 2, 6, 5).permute(0, 1, 3, 2)  # (B, H, P, D)
    levels = torch.randint(0, 4, (2, 5), generator=g)[:, None, :].expand(2, 2, 5)
    quantized, indices, errors, counts, _ = triton_residual.residual_quantize(
        z.to(device), codebooks.to(device), levels.to(device), "euclidean", "exact", True
    )
    assert quantized.stride() == z.stride()
    assert indices.shape == (2, 2, 5, 3)
    for head in range(2):
        expected = residual_oracle.forward(z[:, head].reshape(10, 6), codebooks[head], levels[:, head].reshape(10))
        assert torch.equal(quantized[:, head].cpu().reshape(10, 6), expected.quantized)
        assert torch.equal(indices[:, head].cpu().reshape(10, 3), expected.indices)
        torch.testing.assert_close(errors[head].cpu(), expected.squared_errors, rtol=1e-12, atol=0)
        assert torch.equal(counts[head].cpu(), expected.counts)


def test_one_codebook_shared_by_all_levels(device):
    z, codebook = hostile.make("eight dimensions")
    check(z[:16], codebook.expand(2, *codebook.shape), device)


@pytest.mark.slow
def test_fast_takes_near_codes(way, device):
    z, codebook = hostile.make("eight dimensions")
    z, levels = z[:30], torch.arange(30) % 4
    found = forward(z, stack(codebook), device, levels, precision="fast", statistics=False)
    exact = residual_oracle.forward(z, stack(codebook), levels)
    assert (found.indices != exact.indices).any(1).sum() <= 2


def backward(z, codebooks, indices, incoming, device, gradient, codebook_gradient=True):
    """The kernels' (grad_z, grad_codebooks) without the head axes."""
    grads = [x.to(device)[None] for x in incoming]
    grad_z, grad_codebooks = triton_residual.residual_quantize_backward(
        grads[0][None], grads[1], grads[2], z.to(device)[None, None], codebooks.to(device)[None],
        indices.to(device)[None, None], gradient, codebook_gradient,
    )  # fmt: skip
    return grad_z[0, 0].cpu(), grad_codebooks[0].cpu() if codebook_gradient else grad_codebooks


def some_incoming(z, depth):
    kind = residual_oracle.wide_or_single(z)
    return [torch.randn_like(z), torch.randn(depth, dtype=kind), torch.randn(depth, dtype=kind)]


@pytest.mark.parametrize("gradient", hostile.first(GRADIENTS[::-1]))
@pytest.mark.parametrize("name", hostile.first(["eight dimensions", "257 dimensions", "one dimension"]))
def test_gradients_in_float64(name, gradient, device):
    z, codebook = hostile.make(name, torch.float64)
    z, codebook = z[:20], codebook[:9]
    levels = torch.arange(len(z)) % 5
    z[levels == 0] = torch.nan
    codebooks = stack(codebook)
    rows = torch.where((levels > 0)[:, None], z, 0)
    indices = residual_oracle.forward(rows, codebooks, levels).indices
    incoming = some_incoming(z, 3)
    found = backward(z, codebooks, indices, incoming, device, gradient)
    for one, other in zip(found, residual_oracle.backward(*incoming, rows, codebooks, indices, gradient), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_the_commitment_gradient_is_autograds(device):
    """Against autograd through the losses written out, with the codes detached."""
    z, codebook = hostile.make("three dimensions", torch.float64)
    z, codebooks = z[:12], stack(codebook[:5])
    indices = residual_oracle.forward(z, codebooks).indices
    incoming = some_incoming(z, 3)
    held, codes = z.clone().requires_grad_(), codebooks.clone().requires_grad_()
    r, total = held, 0
    for level in range(3):
        e = codes[level][indices[:, level]]
        total = total + incoming[1][level] * (r.detach() - e).square().mean()
        total = total + incoming[2][level] * (r - e.detach()).square().mean()
        r = r - e.detach()
    ((held * incoming[0]).sum() + total).backward()
    found = backward(z, codebooks, indices, incoming, device, "straight_through")
    torch.testing.assert_close(found[0], held.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found[1], codes.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("dtype", hostile.slow([torch.float32, torch.bfloat16, torch.float16]))
def test_gradients_in_narrow_types(dtype, gradient, device):
    z, codebook = hostile.make("three dimensions", dtype)
    codebooks = stack(codebook[:9])
    indices = residual_oracle.forward(z, codebooks).indices
    incoming = some_incoming(z, 3)
    found = backward(z, codebooks, indices, incoming, device, gradient)
    unit = torch.finfo(dtype).eps
    for one, other in zip(found, residual_oracle.backward(*incoming, z, codebooks, indices, gradient), strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one.double(), other, rtol=4 * unit, atol=1e-6)


@pytest.mark.parametrize("gradient", hostile.first(GRADIENTS))
def test_gradients_of_poisoned_and_unknown_rows(gradient, device):
    z, codebook = hostile.make("non-finite")
    z, codebooks = z[:20], stack(codebook[:11])
    indices = residual_oracle.forward(z, codebooks).indices
    indices[5, 1] = codebooks.shape[1]  # a code that is not there
    indices[6, 2] = 2**40
    indices[12:, 2] = -1
    indices[15:] = -1
    z[16] = torch.nan
    grad_z, grad_codebooks = backward(z, codebooks, indices, some_incoming(z, 3), device, gradient)
    bad = [3, 5, 6, 7, 9]
    assert grad_z[bad].isnan().all()
    assert (grad_z[15:] == 0).all()
    assert grad_z[[i for i in range(15) if i not in bad]].isfinite().all()
    assert grad_codebooks[codebooks.isfinite().all(2)].isfinite().all()
    rows = torch.tensor([i for i in range(12) if i not in bad])
    unused = [k for k in range(codebooks.shape[1]) if k not in indices[rows, 2].tolist()]
    assert (grad_codebooks[2, unused] == 0).all()


def test_codebook_gradient_only_where_wanted(device):
    z, codebook = hostile.make("three dimensions")
    codebooks = stack(codebook[:9])
    indices = residual_oracle.forward(z, codebooks).indices
    _, empty = backward(z, codebooks, indices, some_incoming(z, 3), device, "straight_through", False)
    assert empty.shape == (0,)


def test_no_rows_backward(device):
    z, codebooks = torch.zeros(0, 3), torch.randn(2, 4, 3)
    indices = torch.zeros(0, 2, dtype=torch.int64)
    grad_z, grad_codebooks = backward(z, codebooks, indices, some_incoming(z, 2), device, "rotation")
    assert grad_z.shape == (0, 3)
    assert (grad_codebooks == 0).all()
