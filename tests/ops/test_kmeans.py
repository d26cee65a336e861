"""kmeans: inertia beside scikit-learn's, determinism, too few rows, bad rows, memory, layouts, compile."""

import pytest
import torch
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

import vqkernels as vq
from vqkernels.ops import merging
from vqkernels.ops.kmeans import cluster, kmeans, kmeans_init
from vqkernels.ops.merging import merge_clusters
from vqkernels.ops.seeding import seed_codes
from vqkernels.verification.layouts import LAYOUTS, flat, flat_rows


def inertia(rows, codes):
    return float((rows.double() - codes[vq.nearest_code(rows, codes)].double()).square().sum())


def blobs(rows, centres, dim, spread=1.0, generator=None):
    means = 20 * torch.rand(centres, dim, generator=generator) - 10
    which = torch.randint(centres, (rows,), generator=generator)
    return means[which] + spread * torch.randn(rows, dim, generator=generator)


def no_equal_codes(codes):
    return len(codes.unique(dim=0)) == len(codes) and bool(codes.isfinite().all())


@pytest.mark.parametrize(
    ("rows", "size", "dim", "spread"), [(3000, 40, 2, 1.0), (4000, 100, 8, 1.0), (4000, 150, 4, 0.3)]
)
def test_inertia_is_no_worse_than_that_of_scikit_learn(rows, size, dim, spread, backend):
    """k-means++ as scikit-learn does it (greedy, one start), as many iterations; on the mean of five data sets."""
    cluster_module = pytest.importorskip("sklearn.cluster")
    ours = theirs = 0.0
    for seed in range(5):
        z = blobs(rows, size, dim, spread, torch.Generator().manual_seed(seed))
        codes, distinct = kmeans(z, size, seed=seed, backend=backend)
        assert distinct == size and no_equal_codes(codes)
        peer = cluster_module.KMeans(size, init="k-means++", n_init=1, max_iter=10, random_state=seed).fit(z.numpy())
        found, expected = inertia(z, codes), inertia(z, torch.tensor(peer.cluster_centers_))
        assert found < 1.05 * expected
        ours, theirs = ours + found, theirs + expected
    assert ours < 1.01 * theirs


def test_separated_blobs_get_a_code_each(backend):
    z = blobs(2000, 64, 16, 0.01)
    codes, _ = kmeans(z, 64, backend=backend)
    assert inertia(z, codes) < 1.05 * 2000 * 16 * 0.01**2


def test_more_iterations_never_hurt_and_converge(backend):
    z = torch.randn(2000, 3)
    found = [inertia(z, kmeans(z, 50, iterations=i, backend=backend)[0]) for i in (0, 1, 5, 20, 500, 501)]
    assert found == sorted(found, reverse=True) and found[-1] == found[-2] < found[0]


def test_the_seeds_are_drawn_like_those_of_k_means_plus_plus():
    """Two far groups and one row between them, three codes: the chances of each row, against 4000 draws."""
    z = torch.tensor([[0.0], [1.0], [3.0], [7.0]])
    squares = (z - z.T).square().double()
    expected = torch.zeros(4, 4, 4, dtype=torch.float64)
    for a in range(4):
        for b in range(4):
            weight = torch.minimum(squares[a], squares[b])
            for c in range(4):
                if weight.sum() > 0:
                    expected[a, b, c] = 0.25 * squares[a, b] / squares[a].sum() * weight[c] / weight.sum()
    draws, found = 4000, torch.zeros(4, 4, 4, dtype=torch.float64)
    for seed in range(draws):
        first = seed_codes(z, 3, torch.tensor(seed), lambda rows, codes: vq.nearest_code(rows, codes))
        found[tuple(first.tolist())] += 1
    used = expected > 0
    assert found[~used].sum() == 0
    statistic = float(((found - draws * expected)[used].square() / (draws * expected[used])).sum())
    freedom = int(used.sum()) - 1
    assert abs(statistic - freedom) < 4 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("wanted", [1, 17, 40, 59, 60])
@pytest.mark.parametrize("dim", [1, 4, 64])
def test_merging_equals_ward_one_pair_at_a_time(dim, wanted):
    means, counts = torch.randn(60, dim, dtype=torch.float64), torch.randint(1, 20, (60,))
    left = [(mean, float(count)) for mean, count in zip(means, counts, strict=True)]
    while len(left) > wanted:
        cost, i, j = min(
            (float((a - b).square().sum()) * n * m / (n + m), i, j)
            for i, (a, n) in enumerate(left)
            for j, (b, m) in enumerate(left[:i])
        )
        (a, n), (b, m) = left[i], left[j]
        left = [pair for k, pair in enumerate(left) if k not in (i, j)] + [((n * a + m * b) / (n + m), n + m)]
    expected, found = torch.stack([mean for mean, _ in left]), merge_clusters(means, counts, wanted)
    torch.testing.assert_close(found[found[:, 0].argsort()], expected[expected[:, 0].argsort()])


def _clusters(kind, count, dim):
    if kind == "noise":
        return torch.randn(count, dim, dtype=torch.float64)
    if kind == "blobs":
        return blobs(count, count // 8, dim).double()
    return torch.eye(count, dtype=torch.float64)  # all distances are equal


@pytest.mark.parametrize(("kind", "dim"), [("noise", 2), ("noise", 16), ("noise", 128), ("blobs", 16), ("equal", 256)])
def test_merging_searches_for_few_partners_more_than_once(kind, dim, monkeypatch):
    """All rounds together compute a small multiple of the costs of one: what was not merged keeps its partner."""
    count = 256 if kind == "equal" else 1024
    search, asked, costs = merging._cheapest_partners, [], []

    def counted(means, counts, rows):
        asked.append(len(rows))
        costs.append(len(rows) * len(means))
        return search(means, counts, rows)

    monkeypatch.setattr(merging, "_cheapest_partners", counted)
    merge_clusters(_clusters(kind, count, dim), torch.ones(count), count // 2)
    assert sum(asked) < 4 * count and sum(costs) < 3 * count**2
    assert len(asked) < (count // 2 if kind == "equal" else 100)


def test_the_same_seed_gives_the_same_bits_and_another_does_not(backend, threads):
    z = torch.randn(3000, 6)
    runs = []
    for count in (1, 2, 5):
        threads(count)
        torch.manual_seed(count)  # torch's own generator plays no part
        runs.append(kmeans(z, 64, seed=7, backend=backend)[0])
    assert all(run.equal(runs[0]) for run in runs)
    assert not kmeans(z, 64, seed=8, backend=backend)[0].equal(runs[0])


def test_it_leaves_the_generator_of_torch_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    kmeans(torch.randn(100, 2, generator=torch.Generator().manual_seed(0)), 8)
    assert torch.get_rng_state().equal(before)


@pytest.mark.parametrize("metric", ["euclidean", "cosine", "dot"])
@pytest.mark.parametrize(("rows", "size"), [(1, 1), (1, 8), (5, 8), (8, 8), (9, 8), (16, 8), (17, 8), (3, 200)])
def test_few_rows(rows, size, metric, backend):
    z = torch.randn(rows, 4) + 3
    codes, distinct = kmeans(z, size, metric=metric, backend=backend)
    assert distinct == min(rows, size) and codes.shape == (size, 4) and no_equal_codes(codes)
    data = z if metric == "euclidean" else torch.nn.functional.normalize(z)
    if rows <= size:  # all of them are codes, and the others lie close by
        torch.testing.assert_close(codes[:rows][codes[:rows, 0].argsort()], data[data[:, 0].argsort()])
        spread = max(float((data - data.mean(0)).square().mean().sqrt()), 0.1)
        assert torch.cdist(codes, data).min(1).values.max() < 0.1 * spread
    if metric != "euclidean":
        torch.testing.assert_close(codes.norm(dim=1), torch.ones(size))


@pytest.mark.parametrize("value", [0.0, 1e-30, 2.5, 1e6, -3e38])
def test_rows_that_are_all_equal(value, backend):
    codes, distinct = kmeans(torch.full((50, 3), value), 16, backend=backend)
    assert distinct == 1 and no_equal_codes(codes)
    assert codes[0].eq(torch.tensor(value)).all()
    assert not codes[1:].eq(0).all(1).any()


def test_duplicated_rows_count_once(backend):
    z = torch.randn(5, 3).repeat(40, 1)
    codes, distinct = kmeans(z, 12, backend=backend)
    assert distinct == 5 and no_equal_codes(codes) and inertia(z, codes) == 0


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("kind", ["no rows", "masked", "nan"])
def test_without_usable_rows_the_codes_are_uniform(kind, metric, backend):
    z = torch.randn(0 if kind == "no rows" else 20, 4)
    mask = torch.zeros(20, dtype=torch.bool) if kind == "masked" else None
    z = torch.full_like(z, torch.nan) if kind != "no rows" else z
    codes, distinct = kmeans(z, 16, mask=mask, metric=metric, backend=backend)
    assert distinct == 0 and no_equal_codes(codes)
    assert codes.abs().max() <= 1 / 16 if metric == "euclidean" else codes.norm(dim=1).allclose(torch.ones(16))


def test_bad_rows_and_masked_rows_are_not_there(backend):
    z, mask = torch.randn(600, 5), torch.rand(600) < 0.7
    expected = kmeans(z[mask], 20, backend=backend)[0]
    z[~mask] = torch.nan
    assert kmeans(z, 20, mask=mask, backend=backend)[0].equal(expected)
    assert kmeans(z, 20, backend=backend)[0].equal(expected)
    z[~mask] = -torch.inf
    assert kmeans(z, 20, backend=backend)[0].equal(expected)
    wide = torch.where(z.isfinite(), z.double(), 1e200)  # finite, but beyond float32
    assert kmeans(wide, 20, backend=backend)[0].equal(expected)


def test_directions_ignore_zeros_and_lengths(backend):
    z = torch.randn(500, 6)
    z[::5] = 0
    codes, distinct = kmeans(z, 30, metric="cosine", backend=backend)
    scaled = kmeans(z * 2.0 ** torch.randint(-20, 20, (500, 1)), 30, metric="dot", backend=backend)[0]
    assert distinct == 30 and codes.equal(scaled)
    torch.testing.assert_close(codes.norm(dim=1), torch.ones(30))


def test_one_channel_of_directions(backend):
    codes, distinct = kmeans(torch.randn(50, 1), 6, metric="cosine", backend=backend)
    assert distinct == 2 and no_equal_codes(codes)


@pytest.mark.parametrize("scale", [1e-38, 1e-20, 1e20, 1e38])
def test_scales(scale, backend):
    z = torch.randn(800, 4).clamp(-3, 3) * scale
    codes, distinct = kmeans(z, 30, backend=backend)
    assert distinct == 30 and no_equal_codes(codes)
    reference = kmeans(torch.randn(800, 4), 30)[0]
    assert inertia(z / scale, codes / scale) < 1.3 * inertia(torch.randn(800, 4), reference)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_every_dtype_gives_float32_codes(dtype, backend):
    z = blobs(800, 20, 6).to(dtype)
    codes, distinct = kmeans(z, 20, backend=backend)
    assert codes.dtype == torch.float32 and distinct == 20
    assert codes.equal(kmeans(z.float(), 20, backend=backend)[0])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(layout, masked, backend):
    z, channel_dim, codebook, mask = LAYOUTS[layout](masked, torch.device("cpu"))
    batched = codebook.dim() == 3
    found, distinct = kmeans(z, 9, mask=mask, channel_dim=channel_dim, batched=batched, backend=backend)
    rows, kept = flat(z, channel_dim, batched), None if mask is None else flat_rows(mask, batched)
    expected, count = kmeans(rows.contiguous(), 9, mask=kept, batched=batched, backend=backend)
    assert found.equal(expected) and distinct.equal(count) and distinct.shape == ((3,) if batched else ())


def test_heads_have_codebooks_of_their_own(backend):
    z = torch.randn(3, 200, 4)
    z[2] = 1.0
    codes, distinct = kmeans(z, 16, batched=True, backend=backend)
    assert codes.shape == (3, 16, 4) and distinct.tolist() == [16, 16, 1]
    same, _ = kmeans(z[:1].expand(2, -1, -1), 16, batched=True, backend=backend)
    assert not same[0].equal(same[1])  # of a seed of their own, too


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operation returns."""

    elements = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        results = function(*arguments, **(keywords or {}))
        for result in results if isinstance(results, tuple | list) else (results,):
            if isinstance(result, torch.Tensor):
                self.elements = max(self.elements, result.untyped_storage().nbytes() // result.element_size())
        return results


def test_neither_rows_by_codes_nor_more_is_built():
    z, size = torch.randn(40000, 8), 1024
    with Largest() as largest:
        cluster("cpu", z, size, None, 1, "euclidean", 2, torch.tensor(0), False)
    assert largest.elements <= 4 * 1024 * 1024 < 40000 * size / 8


@pytest.mark.parametrize("name", ["cpu", "eager"])
def test_opcheck(name, cpu_kernels):
    z, mask = torch.randn(2, 6, 5, 3), torch.rand(2, 5, 3) < 0.8
    operator = kmeans_init.overloads[name]
    opcheck(operator, (z, 7, mask, 1, "euclidean", 3, torch.tensor(0), False))
    opcheck(operator, (z, 7, mask, 1, "cosine", 3, torch.tensor(5), True))


def test_compiles_whole_with_dynamic_shapes(backend):
    torch._dynamo.reset()
    compiled = torch.compile(lambda z: kmeans(z * 2, 12, channel_dim=1, backend=backend), fullgraph=True, dynamic=True)
    for batch, positions in ((2, 30), (3, 40)):
        z = torch.randn(batch, 4, positions)
        found, expected = compiled(z), kmeans(z * 2, 12, channel_dim=1, backend=backend)
        assert all(a.equal(b) for a, b in zip(found, expected, strict=True))


def test_no_gradient_flows():
    codes, _ = kmeans(torch.randn(50, 3, requires_grad=True), 4)
    assert not codes.requires_grad


def test_bad_input_is_one_sentence():
    z = torch.randn(10, 3)
    with pytest.raises(ValueError, match="codebook_size must be a positive int, got 0"):
        kmeans(z, 0)
    with pytest.raises(ValueError, match="iterations must be an int of at least 0, got -1"):
        kmeans(z, 4, iterations=-1)
    with pytest.raises(TypeError, match="seed must be an int or a 0-d int64 tensor, got float"):
        kmeans(z, 4, seed=0.5)
    with pytest.raises(ValueError, match="metric must be one of 'euclidean', 'dot', 'cosine', got 'l1'"):
        kmeans(z, 4, metric="l1")
    with pytest.raises(ValueError, match=r"channel_dim must be in \[-2, 1\] for z of 2 axes, got 2"):
        kmeans(z, 4, channel_dim=2)
    with pytest.raises(TypeError, match="z must be float32, bfloat16, float16 or float64, got torch.int64"):
        kmeans(z.long(), 4)
    with pytest.raises(ValueError, match=r"mask must have z's shape without channels, \[10\], got \[3\]"):
        kmeans(z, 4, mask=torch.ones(3, dtype=torch.bool))
