"""sample_code: its distribution, row by row and by chi-square; splits, threads, SIMD levels, bad rows, compile."""

import pytest
import torch
from ops.entropy_gradients import scalar
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

import vqkernels as vq
from vqkernels import reference
from vqkernels.backends import counter, cpu
from vqkernels.backends.eager import sample as sampling
from vqkernels.ops.quantize import quantize_with_statistics
from vqkernels.verification.layouts import LAYOUTS, flat, flat_rows

METRICS = ["euclidean", "dot", "cosine"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def noise(rows, codes, seed, head=0):
    """The Gumbel numbers that the draws are defined by."""
    keys = counter.row_keys(torch.tensor(seed), head, torch.arange(rows))
    return counter.gumbel(counter.code_bits(keys[:, None], torch.arange(codes)))


def is_the_draw(found, z, codebook, temperature, seed, metric="euclidean", slack=1e-5):
    """Whether every index has the largest score plus noise, to within the rounding of float32 scores."""
    score = -reference.scores(z, codebook, metric) / temperature
    total = score + noise(len(z), len(codebook), seed)
    behind = total.amax(1) - total.gather(1, found[:, None]).squeeze(1)
    return bool((behind <= slack * (1 + score.amax(1).abs())).all())


@pytest.mark.parametrize("temperature", [0.05, 1.0, 30.0, 1e6])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("rows", "codes", "dim"), [(400, 37, 5), (130, 300, 64), (1, 1, 1), (33, 7, 131)])
def test_every_row_gets_the_code_with_the_largest_noisy_score(rows, codes, dim, metric, temperature, backend):
    z, codebook = torch.randn(rows, dim), torch.randn(codes, dim)
    found = vq.sample_code(z, codebook, temperature=temperature, seed=5, metric=metric, backend=backend)
    assert is_the_draw(found, z, codebook, temperature, 5, metric)


@pytest.mark.parametrize("temperature", [0.5, 4.0, 100.0])
@pytest.mark.parametrize("metric", METRICS)
def test_frequencies_against_the_exact_softmax(metric, temperature, backend):
    """Chi-square over 40,000 draws: within four standard deviations of its mean, on either side."""
    rows, codes = 40_000, 12
    row, codebook = torch.randn(1, 4), torch.randn(codes, 4)
    found = vq.sample_code(
        row.expand(rows, 4), codebook, temperature=temperature, seed=1, metric=metric, backend=backend
    )
    expected = rows * reference.code_probabilities(row, codebook, temperature, metric=metric)[0]
    common = expected >= 5
    counts = torch.bincount(found, minlength=codes).double()
    groups = [(counts[common], expected[common]), (counts[~common].sum()[None], expected[~common].sum()[None])]
    statistic = sum(float(((c - e).square() / e)[e > 0].sum()) for c, e in groups)
    freedom = int(common.sum()) - int(bool(common.all()))
    assert abs(statistic - freedom) < 4 * (2 * freedom) ** 0.5 + 1


def test_draws_of_different_rows_seeds_heads_and_codes_are_independent(backend):
    """All scores are equal, so that only the random numbers speak: pairs of draws fill their table evenly."""
    rows, codes = 20_000, 10
    z, codebook = torch.zeros(2, rows, 3), torch.zeros(2, codes, 3)
    draws = [vq.sample_code(z, codebook, temperature=1.0, seed=seed, backend=backend) for seed in (0, 1, 2**40)]
    first = draws[0][0]
    pairs = [(first, draws[1][0]), (first, draws[2][0]), (first, draws[0][1]), (first[:-1], first[1:])]
    pairs.append((first[: rows // 2], first[rows // 2 :]))
    for one, other in pairs:
        table = torch.bincount(one * codes + other, minlength=codes**2).double()
        statistic, freedom = float((table - len(one) / codes**2).square().sum() * codes**2 / len(one)), codes**2 - 1
        assert abs(statistic - freedom) < 4 * (2 * freedom) ** 0.5
    gumbel = noise(500, 500, 0)
    assert abs(float(torch.corrcoef(torch.stack([gumbel[:, :-1].flatten(), gumbel[:, 1:].flatten()]))[0, 1])) < 0.01
    assert abs(float(gumbel.mean()) - 0.5772) < 0.01 and abs(float(gumbel.var()) - torch.pi**2 / 6) < 0.03


@pytest.mark.parametrize("metric", METRICS)
def test_temperature_zero_is_the_nearest_code_and_little_temperature_nearly(metric, backend):
    z, codebook, mask = torch.randn(300, 6), torch.randn(40, 6), torch.rand(300) < 0.8
    expected = reference.nearest(z, codebook, mask=mask, metric=metric)
    for temperature in (0, 0.0, 1e-30, 1e-300):
        found = vq.sample_code(z, codebook, temperature=temperature, seed=0, mask=mask, metric=metric, backend=backend)
        assert found.equal(expected)


def test_much_temperature_is_uniform(backend):
    found = vq.sample_code(torch.randn(20_000, 3), torch.randn(8, 3), temperature=1e300, seed=0, backend=backend)
    assert (torch.bincount(found, minlength=8) - 2500).abs().max() < 4 * 2500**0.5


@pytest.mark.parametrize("code_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype(dtype, code_dtype, backend):
    z, codebook = torch.randn(150, 20).to(dtype), torch.randn(33, 20).to(code_dtype)
    found = vq.sample_code(z, codebook, temperature=3.0, seed=9, backend=backend)
    assert is_the_draw(found, z, codebook, 3.0, 9)


@pytest.mark.parametrize("offset", [1e3, 1e6])
def test_offsets_do_not_cancel(offset, backend):
    z, codebook = torch.randn(300, 8) + offset, torch.randn(40, 8) + offset
    found = vq.sample_code(z, codebook, temperature=1.0, seed=2, backend=backend)
    assert is_the_draw(found, z, codebook, 1.0, 2)
    found = vq.sample_code(z.double(), codebook.double(), temperature=1.0, seed=2, backend=backend)
    assert is_the_draw(found, z, codebook, 1.0, 2)


@pytest.mark.parametrize("scale", [1e-38, 1e-25, 1e25, 1e37])
def test_scales_that_float32_cannot_square(scale, backend):
    z, codebook = torch.randn(200, 4) * scale, torch.randn(30, 4) * scale
    temperature = scale**2
    found = vq.sample_code(z, codebook, temperature=temperature, seed=3, backend=backend)
    agrees = (found == vq.sample_code(z / scale, codebook / scale, temperature=1.0, seed=3, backend="eager")).float()
    assert agrees.mean() > 0.99


def test_a_row_far_beyond_the_codes(backend):
    z, codebook = torch.randn(40, 4), torch.randn(30, 4)
    expected = vq.sample_code(z, codebook, temperature=1.0, seed=3, backend=backend)
    z[7] = 2e38
    found = vq.sample_code(z, codebook, temperature=1.0, seed=3, backend=backend)
    others = torch.arange(40) != 7
    assert found[others].equal(expected[others]) and 0 <= found[7] < 30


def test_bad_rows_masked_rows_and_bad_codes(backend):
    z, codebook = torch.randn(500, 4), torch.randn(10, 4)
    codebook[2, 1], codebook[0, 0] = torch.nan, torch.inf
    mask = torch.rand(500) < 0.8
    expected = vq.sample_code(z, codebook, temperature=100.0, seed=3, mask=mask, backend=backend)
    assert set(expected.unique().tolist()) == {-1, 1, 3, 4, 5, 6, 7, 8, 9}
    assert expected.eq(-1).equal(~mask)
    broken = torch.where(mask[:, None], z, torch.nan)
    good = mask.clone()
    for row, bad in zip(mask.nonzero()[:3].flatten().tolist(), (torch.nan, torch.inf, -torch.inf), strict=True):
        broken[row, 2], good[row] = bad, False
    found = vq.sample_code(broken, codebook, temperature=100.0, seed=3, mask=mask, backend=backend)
    assert found[good].equal(expected[good]) and found[mask & ~good].eq(0).all() and found[~mask].eq(-1).all()
    nothing = vq.sample_code(z, torch.full((5, 4), torch.nan), temperature=1.0, seed=0, backend=backend)
    assert nothing.eq(0).all()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(layout, masked, backend):
    z, channel_dim, codebook, mask = LAYOUTS[layout](masked, torch.device("cpu"))
    found = vq.sample_code(z, codebook, temperature=2.0, seed=4, mask=mask, channel_dim=channel_dim, backend=backend)
    batched = codebook.dim() == 3
    rows, kept = flat(z, channel_dim, batched).contiguous(), None if mask is None else flat_rows(mask, batched)
    expected = vq.sample_code(rows, codebook, temperature=2.0, seed=4, mask=kept, backend=backend)
    assert flat_rows(found, batched).equal(expected)


def test_heads_draw_with_noise_of_their_own(backend):
    z, codebook = torch.randn(1, 300, 4).expand(2, -1, -1), torch.randn(1, 20, 4).expand(2, -1, -1)
    found = vq.sample_code(z, codebook, temperature=30.0, seed=4, backend=backend)
    assert found[0].equal(vq.sample_code(z[0], codebook[0], temperature=30.0, seed=4, backend=backend))
    assert not found[0].equal(found[1])


def test_a_split_batch_draws_the_same(backend):
    z, codebook = torch.randn(5, 8, 6, 7), torch.randn(50, 8)
    whole = vq.sample_code(z, codebook, temperature=5.0, seed=11, channel_dim=1, backend=backend)
    parts, number = [], 0
    for part in z.split((1, 3, 1)):
        parts.append(
            vq.sample_code(part, codebook, temperature=5.0, seed=11, channel_dim=1, row_offset=number, backend=backend)
        )
        number += parts[-1].numel()
    assert torch.cat(parts).equal(whole)
    rows = z.movedim(1, -1).reshape(-1, 8)
    single = [
        vq.sample_code(row, codebook, temperature=5.0, seed=11, row_offset=i, backend=backend)
        for i, row in enumerate(rows)
    ]
    assert torch.stack(single).equal(whole.flatten())


def test_blocks_of_the_fallback_change_nothing(monkeypatch):
    z, codebook = torch.randn(300, 8), torch.randn(50, 8)
    whole = vq.sample_code(z, codebook, temperature=5.0, seed=11, backend="eager")
    monkeypatch.setattr(sampling, "_BLOCK_ELEMENTS", 50 * 7)
    assert vq.sample_code(z, codebook, temperature=5.0, seed=11, backend="eager").equal(whole)


def test_threads_and_simd_levels_change_nothing(threads, monkeypatch, cpu_kernels):
    z, codebook = torch.randn(3, 24, 700), torch.randn(133, 24)
    runs = []
    for level in cpu.simd_levels():
        monkeypatch.setenv("VQKERNELS_SIMD", level)
        for count in (1, 2, 7):
            threads(count)
            for temperature in (0.3, 20.0):
                runs.append(vq.sample_code(z, codebook, temperature=temperature, seed=1, channel_dim=1, backend="cpu"))
    assert all(run.equal(runs[i % 2]) for i, run in enumerate(runs))


def test_a_seed_may_be_a_tensor(backend):
    z, codebook = torch.randn(100, 4), torch.randn(30, 4)
    for seed in (0, -1, 2**62):
        one = vq.sample_code(z, codebook, temperature=9.0, seed=seed, backend=backend)
        assert one.equal(vq.sample_code(z, codebook, temperature=9.0, seed=torch.tensor(seed), backend=backend))


def test_sampled_codes_train_like_any_other(backend):
    z, codebook = torch.randn(100, 4, requires_grad=True), torch.randn(30, 4, requires_grad=True)
    indices = vq.sample_code(z, codebook, temperature=9.0, seed=1, backend=backend)
    result = quantize_with_statistics(z, codebook, indices=indices, gradient="rotation", backend=backend)
    (result.quantized.sum() + result.codebook_loss).backward()
    assert result.quantized.equal(codebook[indices]) and z.grad.abs().sum() > 0 and codebook.grad.abs().sum() > 0


class Watch(TorchDispatchMode):
    """The largest result, and whatever waits for the device."""

    def __init__(self):
        super().__init__()
        self.elements, self.waits = 0, []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if function.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero", "equal", "masked_select", "unique"):
            self.waits.append(str(function))
        result = function(*arguments, **(keywords or {}))
        for one in result if isinstance(result, tuple | list) else (result,):
            if isinstance(one, torch.Tensor):
                self.elements = max(self.elements, one.untyped_storage().nbytes() // one.element_size())
        return result


def test_the_fallback_builds_no_matrix_and_waits_for_nothing():
    z, codebook, seed = torch.randn(20_000, 2), torch.randn(1024, 2), torch.tensor(3)
    with Watch() as watch:
        sampling.sample(z, codebook, seed, torch.rand(20_000) < 0.5, 1, "euclidean", scalar(1.0), 0)
    assert watch.waits == [] and watch.elements <= 2 * 1024 * 1024 < 20_000 * 1024 / 8


@pytest.mark.parametrize("overload", ["default", "eager"])
def test_opcheck(overload, cpu_kernels):
    z, codebook, mask, seed = torch.randn(2, 6, 5, 3), torch.randn(9, 6), torch.rand(2, 5, 3) < 0.8, torch.tensor(4)
    operator = getattr(torch.ops.vqkernels.sample, overload)
    for x in (z, z.to(memory_format=torch.channels_last), z.transpose(0, 2).contiguous().transpose(0, 2)):
        opcheck(operator, (x, codebook, seed, mask, 1, "euclidean", scalar(1.0), 3))
    opcheck(operator, (z, torch.randn(2, 7, 6), seed, None, 1, "cosine", scalar(0.5), 0))


def test_compiles_whole_and_a_new_seed_does_not_recompile(backend):
    torch._dynamo.reset()
    codebook, compilations = torch.randn(30, 8), []

    def count(graph, inputs):
        compilations.append(graph)
        return graph

    def draw(z, seed, temperature):
        return vq.sample_code(z * 2, codebook, temperature=temperature, seed=seed, channel_dim=1, backend=backend)

    for compiled in (
        torch.compile(draw, fullgraph=True, dynamic=True),
        torch.compile(draw, backend=count, dynamic=True),
    ):
        for batch, seed in ((2, 5), (3, 6), (4, 7)):
            z, seed = torch.randn(batch, 8, 5), torch.tensor(seed)
            assert compiled(z, seed, 2.0).equal(draw(z, seed, 2.0))
    assert len(compilations) == 1
    z = torch.randn(4, 8, 5)
    for temperature in (0.5, 0.0, 4.0):
        assert compiled(z, seed, temperature).equal(draw(z, seed, temperature))
    whole = torch.compile(
        lambda x: vq.sample_code(x, codebook, temperature=1.0, seed=3, backend=backend), fullgraph=True
    )
    z = torch.randn(6, 8)
    assert whole(z).equal(vq.sample_code(z, codebook, temperature=1.0, seed=3, backend=backend))


def test_bad_input_is_one_sentence():
    z, codebook = torch.randn(10, 3), torch.randn(4, 3)
    for bad in (-1.0, float("nan"), float("inf"), "1"):
        with pytest.raises(ValueError, match="temperature must be a finite number of at least 0, got"):
            vq.sample_code(z, codebook, temperature=bad, seed=0)
    with pytest.raises(
        ValueError, match="seed must be an int, or a 0-d int64 tensor on z's device cpu, got torch.int32"
    ):
        vq.sample_code(z, codebook, temperature=1.0, seed=torch.tensor(1, dtype=torch.int32))
    with pytest.raises(TypeError, match="seed must be an int or a 0-d int64 tensor, got NoneType"):
        vq.sample_code(z, codebook, temperature=1.0, seed=None)
    with pytest.raises(ValueError, match="metric must be one of"):
        vq.sample_code(z, codebook, temperature=1.0, seed=0, metric="l1")


def test_the_reference_probabilities():
    z, codebook = torch.zeros(1, 1), torch.tensor([[0.0], [1.0], [2.0], [torch.nan]])
    expected = torch.tensor([1, 2.718281828459045**-0.5, 2.718281828459045**-2, 0], dtype=torch.float64)
    found = reference.code_probabilities(z, codebook, 2.0)
    torch.testing.assert_close(found[0], expected / expected.sum())
