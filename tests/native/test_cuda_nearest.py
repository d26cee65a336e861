"""The CUDA search without a GPU: its block programs, thread by thread on the executor, against the specification."""

import itertools
import mmap

import pytest
import torch
from backends.triton import hostile
from native import cuda_host
from native.build import compiler

from vqkernels import reference

pytestmark = pytest.mark.skipif(compiler() is None, reason="there is no C++ compiler")


def problem(rows, codes, dim, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    z, codebook = torch.randn(rows, dim, generator=g), torch.randn(codes, dim, generator=g)
    return z.to(dtype), codebook.to(dtype)


def check(z, codebook, mask=None, **options):
    """z (N, D), codebook (K, D), mask (N,): the indices are the specification's; returns what was found."""
    masks = None if mask is None else mask[None, None]
    found = cuda_host.nearest(z[None, None], codebook[None], masks, **options)
    expected = reference.nearest(z, codebook, mask=mask, metric=options.get("metric", "euclidean"))
    assert torch.equal(found.indices[0, 0], expected)
    live = len(z) if mask is None else int(mask.sum())
    assert 0 <= found.decided <= live
    return found


@pytest.mark.parametrize(
    ("rows", "codes", "dim"),
    [
        (1, 1, 1), (5, 2, 3), (40, 33, 16), (30, 64, 17), (129, 65, 8),  # ragged tiles of rows, codes and channels
        (20, 100, 64), (20, 70, 100), (9, 130, 128), (12, 70, 129), (12, 66, 257),  # each bucket; beyond 128 streamed
    ],
)  # fmt: skip
def test_the_contracts_choice_at_every_width(rows, codes, dim):
    check(*problem(rows, codes, dim))


@pytest.mark.parametrize("heads", [0, 2])
def test_without_rows_the_squared_error_is_zero(heads):
    """An empty tensor has no data: that of `quantized` must not pass for its absence."""
    z, codebook = torch.empty(1, heads, 0 if heads else 3, 4), torch.randn(heads, 5, 4)
    found = cuda_host.nearest(z, codebook, quantize=True)
    assert found.squared_error == 0.0 and found.decided == 0 and found.launches == 0


@pytest.mark.parametrize("metric", ["dot", "cosine"])
def test_the_other_metrics(metric):
    z, codebook = problem(40, 90, 12)
    codebook[7] = 0.0
    for certified in (True, False):
        found = check(z, codebook, metric=metric, certified=certified)
        assert found.decided > 30


NAMES = list(hostile.CASES)
OFTEN = ("duplicates", "one huge code", "near ties", "pairs one group apart", "offset 1e6", "scale 1e38", "non-finite")


@pytest.mark.parametrize("name", [*OFTEN, *hostile.slow([name for name in NAMES if name not in OFTEN])])
def test_hostile_inputs(name):
    check(*hostile.make(name))


@pytest.mark.slow
@pytest.mark.parametrize("metric", ["dot", "cosine"])
@pytest.mark.parametrize("name", NAMES[::3])
def test_hostile_inputs_in_the_other_metrics(name, metric):
    check(*hostile.make(name, seed=1), metric=metric, separate=True)


@pytest.mark.parametrize("z_type", cuda_host.TYPES)
@pytest.mark.parametrize("code_type", cuda_host.TYPES)
def test_every_pair_of_types(z_type, code_type):
    z, _ = hostile.make("near ties", z_type)
    _, codebook = hostile.make("near ties", code_type)
    found = check(z, codebook, quantize=True)
    assert found.quantized.dtype == z_type
    assert torch.equal(found.quantized[0, 0], codebook[found.indices[0, 0]].to(z_type))


def test_few_rows_take_three_launches_and_many_no_more_than_five():
    z, codebook = problem(60, 150, 24)
    fused = check(z, codebook, quantize=True)
    apart = check(z, codebook, quantize=True, separate=True)
    assert (fused.launches, apart.launches, check(z, codebook, separate=True).launches) == (3, 5, 4)
    assert fused.decided == apart.decided
    assert torch.equal(fused.quantized, apart.quantized)
    assert fused.squared_error == apart.squared_error, "the order of the sum does not depend on the launches"


def test_the_order_of_threads_changes_nothing():
    z, codebook = hostile.make("pairs within a group")
    runs = [check(z, codebook, quantize=True, separate=s, seed=seed) for s in (False, True) for seed in (0, 1, 2)]
    assert len({(run.decided, run.squared_error) for run in runs}) == 1


def test_split_codes_merge_to_the_lowest_index():
    """Equal codes in every split: the contract's choice is the first, whoever finds it."""
    z, codebook = problem(20, 64, 8)
    repeated = codebook.repeat(5, 1)
    assert {check(z, repeated, processors=n).splits for n in (1, 2, 9)} == {2, 3, 5}
    fast = check(z, repeated, certified=False, processors=9)
    assert fast.decided == 0, "scores that tie are left to float64 in fast precision, too"
    near = codebook[:20] + 0.01
    assert check(near, torch.cat([codebook + 3, codebook]), processors=9).decided == 20


def test_fast_precision_takes_the_operands_for_exact():
    """Of fp16 numbers they are: every row is decided, rightly."""
    z, codebook = (x.round() for x in problem(40, 100, 16))
    codebook = codebook + torch.arange(100)[:, None] * 2.0**-8  # no ties, 11 bits
    half = z.half(), codebook.half()
    assert check(*half, certified=False).decided >= check(*half).decided


def test_clustered_rows_are_all_decided_and_repeated_codes_never():
    z, codebook = problem(50, 80, 32)
    assert check(codebook[:50] + 0.2 * z, codebook).decided == 50
    assert check(codebook[:50] + 0.2 * z, codebook.repeat(2, 1)).decided == 0


def test_a_code_far_longer_than_the_rest_spoils_nothing():
    z, codebook = problem(64, 120, 16)
    undecided = 64 - check(z, codebook).decided
    codebook[70] *= 1e4
    assert 64 - check(z, codebook).decided <= undecided + 1
    z[3] = codebook[70] * 0.9
    assert check(z, codebook).indices[0, 0, 3] == 70


@pytest.mark.parametrize("separate", [False, True])
def test_masked_and_poisoned_rows(separate):
    z, codebook = problem(50, 40, 10)
    mask = torch.arange(50) % 3 != 0
    z[0], z[10], z[20, 4] = torch.nan, torch.inf, torch.nan
    found = check(z, codebook, mask, quantize=True, separate=separate)
    assert found.quantized[0, 0, ~mask].eq(0).all()
    assert found.indices[0, 0, 10] == found.indices[0, 0, 20] == 0
    assert torch.equal(found.quantized[0, 0, 10], codebook[0])
    assert found.squared_error != found.squared_error, "a poisoned row makes the loss NaN"
    z[[10, 20]] = 1.0
    assert found.decided <= int(mask.sum())
    again = check(z, codebook, mask, quantize=True, separate=separate)
    expected = (z[mask].double() - codebook[again.indices[0, 0, mask]].double()).square().sum()
    assert again.squared_error == pytest.approx(float(expected), rel=1e-6)
    everything = check(z, codebook, torch.zeros(50, dtype=torch.bool), quantize=True, separate=separate)
    assert everything.squared_error == 0.0 and everything.decided == 0


@pytest.mark.parametrize("layout", ["rows", "channels", "apart"])
def test_heads_batches_and_strides(layout):
    g = torch.Generator().manual_seed(2)
    batch, heads, positions, dim, codes = 2, 3, 9, 20, 50
    if layout == "channels":
        z = torch.randn(batch, heads * dim, positions, generator=g).view(batch, heads, dim, positions).transpose(2, 3)
    elif layout == "apart":
        z = torch.randn(batch, positions, heads, 2 * dim, generator=g)[..., ::2].transpose(1, 2)
    else:
        z = torch.randn(batch, heads, positions, dim, generator=g)
    codebook = torch.randn(heads, dim, codes, generator=g).transpose(1, 2)
    mask = torch.rand(heads, batch, positions, generator=g).gt(0.2).transpose(0, 1)
    found = cuda_host.nearest(z, codebook, mask, quantize=True, processors=3)
    for b, h in itertools.product(range(batch), range(heads)):
        expected = reference.nearest(z[b, h], codebook[h], mask=mask[b, h])
        assert torch.equal(found.indices[b, h], expected)
        codes_of_rows = torch.where(mask[b, h, :, None], codebook[h][expected.clamp_min(0)], 0.0)
        assert torch.equal(found.quantized[b, h], codes_of_rows)
    assert found.quantized.stride() == torch.empty_like(z).stride()


@pytest.mark.parametrize("processors", [1, 7, 132])
def test_plans_leave_nothing_out(processors):
    for rows, codes, heads in itertools.product((1, 128, 129, 1024, 10**6), (1, 64, 65, 512, 8192, 10**6), (1, 3)):
        plan = cuda_host.plan_of(rows, codes, 64, heads=heads, processors=processors)
        assert rows <= plan.padded_rows < rows + 128 and codes <= plan.padded_codes < codes + 64
        assert plan.padded_codes == 64 * plan.tiles
        assert (plan.splits - 1) * plan.tiles_per_split < plan.tiles <= plan.splits * plan.tiles_per_split
        assert 1 <= plan.splits <= 64 and 1 <= plan.code_parts <= 64 and plan.row_parts <= 8 * processors
        assert plan.row_groups == -(-rows // 16)


def test_the_small_training_step_is_fused_and_spread_over_the_chip():
    plan = cuda_host.plan_of(1024, 512, 64)
    assert plan.fused and plan.splits * plan.padded_rows // 128 >= 64, "64 blocks where rows alone give 8"
    assert not cuda_host.plan_of(8192, 65536, 64).fused, "an undecided row would cost its block all codes"
    assert not cuda_host.plan_of(8193, 16, 64).fused
    assert cuda_host.plan_of(10**6, 512, 64).splits == 1


def test_offsets_pass_two_to_the_31():
    """Two batches of half precision, 2^31 elements apart, in memory of which only what is touched exists."""
    far, rows, dim = 2**31 + 64, 4, 5
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    memory = mmap.mmap(-1, 2 * far + 4096, flags=flags)
    flat = torch.frombuffer(memory, dtype=torch.float16)
    z = flat.as_strided((2, 1, rows, dim), (far, 0, dim, 1))
    values, codebook = problem(2 * rows, 20, dim, dtype=torch.float16)
    z.copy_(values.view(2, 1, rows, dim))
    found = cuda_host.nearest(z, codebook[None])
    assert torch.equal(found.indices.flatten(), reference.nearest(values, codebook))


def test_the_workspace_of_large_problems():
    """N·K and N·D' beyond 2^31 are counted in 64 bits; more than 2^30 rows or codes are refused."""
    z, codebook = torch.empty(1), torch.empty(1)
    big = z.expand(1, 1, 2**26, 512), codebook.expand(1, 2**17, 512)
    size = cuda_host.workspace_bytes(cuda_host.problem_of(*big), 132)
    assert 2**26 * 512 * 2 < size < 2**26 * (512 * 2 + 64) + 2**17 * (512 * 2 + 64)
    for shape in ((2**31, 2**10), (2**10, 2**31)):
        huge = z.expand(1, 1, shape[0], 4), codebook.expand(1, shape[1], 4)
        assert cuda_host.workspace_bytes(cuda_host.problem_of(*huge), 132) == -1
