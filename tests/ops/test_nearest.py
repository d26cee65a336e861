"""nearest_code against the contract: adversarial data, shapes, dtypes, metrics, layouts, SIMD levels, threads."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vqkernels as vq
from vqkernels import reference
from vqkernels.backends import cpu
from vqkernels.verification.adversaries import ADVERSARIES

METRICS = ["euclidean", "dot", "cosine"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def agree(z, codebook, backend, metric="euclidean", **arguments):
    found = vq.nearest_code(z, codebook, metric=metric, backend=backend, **arguments)
    expected = reference.nearest(z, codebook, metric=metric)
    wrong = (found != expected).nonzero().flatten().tolist()
    assert not wrong, (
        f"{len(wrong)} of {len(z)} rows differ, first row {wrong[0]}: {found[wrong[0]]} for {expected[wrong[0]]}"
    )


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", ADVERSARIES)
def test_adversarial_data(name, metric, backend):
    for n, k, d in [(65, 33, 5), (300, 100, 64), (3, 5, 257)]:
        agree(*ADVERSARIES[name](n, k, d), backend, metric)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", ADVERSARIES)
def test_adversarial_data_in_every_dtype_and_size(name, metric, dtype, backend):
    for n, k, d in [(4097, 17, 3), (257, 1000, 64), (100, 300, 257), (64, 7, 1)]:
        z, codebook = ADVERSARIES[name](n, k, d)
        agree(z.to(dtype), codebook.to(dtype), backend, metric)


@pytest.mark.parametrize("d", [1, 3, 8, 64, 257])
@pytest.mark.parametrize("k", [1, 15, 16, 17, 1000])
@pytest.mark.parametrize("n", [0, 1, 5, 4097])
def test_every_size(n, k, d, backend):
    if n == 4097 and k == 1000 and d == 257:
        n = 1025  # the oracle's table, not the kernel, is what takes long here
    agree(torch.randn(n, d), torch.randn(k, d), backend)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("code_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_pair_of_dtypes(dtype, code_dtype, metric, backend):
    agree(torch.randn(333, 24).to(dtype), torch.randn(70, 24).to(code_dtype), backend, metric)


@pytest.mark.parametrize("scale", [1e-300, 1e-170, 1e-40, 1.0, 1e40, 1e170, 1e300])
@pytest.mark.parametrize("metric", METRICS)
def test_float64_beyond_the_range_of_float32(scale, metric, backend):
    z, codebook = torch.randn(100, 6, dtype=torch.float64) * scale, torch.randn(30, 6, dtype=torch.float64) * scale
    agree(z, codebook, backend, metric)
    agree(z, codebook / scale, backend, metric)


def test_float64_near_ties_below_float32_resolution(backend):
    codebook = 1 + 1e-12 * torch.randn(50, 16, dtype=torch.float64)
    agree(codebook[torch.randint(50, (200,))] + 1e-13 * torch.randn(200, 16, dtype=torch.float64), codebook, backend)


def test_float32_rows_against_an_offset_float64_codebook(backend):
    codebook = 1e6 + 1e-3 * torch.randn(50, 16, dtype=torch.float64)
    agree(torch.full((20, 16), 1e6) + torch.randn(20, 16) / 8, codebook, backend)


def test_all_codes_non_finite_gives_index_zero(backend):
    codebook = torch.full((7, 3), torch.nan)
    assert vq.nearest_code(torch.randn(5, 3), codebook, backend=backend).tolist() == [0] * 5


def test_ties_go_to_the_lowest_index(backend):
    z = torch.zeros(40, 4)
    corners = torch.tensor([[1.0, 0, 0, 0], [-1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, -1]])
    for shift in range(4):
        assert vq.nearest_code(z, corners.roll(shift, 0), backend=backend).eq(0).all()
    far = torch.cat([torch.full((1, 4), 9.0), corners])
    assert vq.nearest_code(z, far, backend=backend).eq(1).all()


def test_masked_rows_are_not_read(backend):
    z, codebook, mask = torch.randn(500, 8), torch.randn(60, 8), torch.rand(500) < 0.6
    clean = vq.nearest_code(z, codebook, backend=backend)
    z[~mask] = torch.nan
    found, decided = vq.nearest_code(z, codebook, mask=mask, backend=backend, return_certificate=True)
    assert found.equal(torch.where(mask, clean, -1))
    assert 0.9 < decided <= 1


@pytest.mark.parametrize("channel_dim", [0, 1, 2, 3, -1, -3])
def test_every_channel_axis_and_strides(channel_dim, backend):
    codebook = torch.randn(40, 12)
    last = torch.randn(3, 5, 7, 12)
    expected = reference.nearest(last.reshape(-1, 12), codebook).view(3, 5, 7)
    z = last.movedim(-1, channel_dim)
    for view in (z, z.contiguous(), z.repeat_interleave(2, dim=2)[:, :, ::2], torch.cat([z, z])[len(z) :]):
        assert vq.nearest_code(view, codebook, channel_dim=channel_dim, backend=backend).equal(expected)


def test_layouts_need_no_copy():
    from vqkernels.backends.layout import layout_of

    for shape, channel_dim in [
        ((2, 6, 3, 5), 1),
        ((2, 3, 5, 6), 3),
        ((7, 6), 1),
        ((6,), 0),
        ((2, 6, 9), 1),
        ((6, 4, 5), 0),
    ]:
        z = torch.randn(shape)
        layout = layout_of(z, channel_dim, batched=False)
        assert layout.merged and layout.rows(z).data_ptr() == z.data_ptr() and layout.rows(z).shape[3] == 6, shape
        assert layout.restore_rows(layout.rows(z)).equal(z)
    z = torch.randn(4, 9, 5, 6)[:, 1:4]  # a slice in the middle: batch and position still have a stride each
    assert layout_of(z, 3, batched=False).rows(z).data_ptr() == z.data_ptr()
    z = torch.randn(4, 9, 5, 6).transpose(1, 2)
    assert not layout_of(z, 3, batched=False).merged


def test_batched_codebooks(backend):
    z, codebook = torch.randn(3, 50, 2, 9), torch.randn(3, 20, 9)
    found = vq.nearest_code(z, codebook, backend=backend)
    for head in range(3):
        assert found[head].equal(reference.nearest(z[head].reshape(-1, 9), codebook[head]).view(50, 2))
    mask = torch.rand(3, 50, 2) < 0.5
    assert vq.nearest_code(z, codebook, mask=mask, backend=backend).equal(torch.where(mask, found, -1))
    first = z.permute(0, 3, 1, 2).contiguous()
    assert vq.nearest_code(first, codebook, channel_dim=1, backend=backend).equal(found)


def test_noncontiguous_codebook(backend):
    z, codebook = torch.randn(64, 10), torch.randn(10, 30).T
    agree(z, codebook, backend)
    agree(z, torch.randn(60, 10)[::2], backend)


@pytest.mark.parametrize("level", cpu.simd_levels())
def test_every_simd_level_and_thread_count_gives_the_same_indices(level, threads, monkeypatch, cpu_kernels):
    monkeypatch.setenv("VQKERNELS_SIMD", level)
    for name in ("gaussian", "one ulp apart", "norms over eight decades", "half-integer lattice"):
        z, codebook = ADVERSARIES[name](2000, 77, 19)
        expected = reference.nearest(z, codebook)
        for count in (1, 2, 7):
            threads(count)
            assert vq.nearest_code(z, codebook, backend="cpu").equal(expected), (name, count)


@pytest.mark.slow
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("level", cpu.simd_levels())
@pytest.mark.parametrize("name", ADVERSARIES)
def test_every_simd_level_on_adversarial_data(name, level, metric, monkeypatch, cpu_kernels):
    monkeypatch.setenv("VQKERNELS_SIMD", level)
    for n, k, d in [(500, 130, 31), (70, 65, 128)]:
        agree(*ADVERSARIES[name](n, k, d), "cpu", metric)


def test_unknown_simd_level_is_refused(monkeypatch, cpu_kernels):
    monkeypatch.setenv("VQKERNELS_SIMD", "mmx")
    with pytest.raises(RuntimeError, match="VQKERNELS_SIMD must be baseline, avx2, avx512 or vnni, got 'mmx'"):
        vq.nearest_code(torch.randn(3, 2), torch.randn(3, 2), backend="cpu")


def test_batch_split_anywhere_gives_the_same_indices(backend):
    z, codebook = ADVERSARIES["one ulp apart"](700, 50, 12)
    whole = vq.nearest_code(z, codebook, backend=backend)
    for cut in (1, 15, 255, 256, 257, 699):
        parts = [vq.nearest_code(part, codebook, backend=backend) for part in (z[:cut], z[cut:])]
        assert torch.cat(parts).equal(whole)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_small_integers_with_many_ties(data):
    n, k, d = (data.draw(st.integers(1, high)) for high in (40, 40, 6))
    values = st.lists(st.sampled_from([-1.0, -0.5, 0.0, 0.5, 1.0, 1e8, 1e-8]), min_size=d, max_size=d)
    z = torch.tensor(data.draw(st.lists(values, min_size=n, max_size=n)))
    codebook = torch.tensor(data.draw(st.lists(values, min_size=k, max_size=k)))
    for metric in METRICS:
        for backend in ("auto", "eager"):
            agree(z, codebook, backend, metric)


def test_filter_decides_nearly_all_gaussian_rows(backend):
    _, decided = vq.nearest_code(torch.randn(8192, 64), torch.randn(512, 64), backend=backend, return_certificate=True)
    assert decided > 0.985


def test_fast_is_nearly_always_right(backend):
    z, codebook = torch.randn(4096, 64), torch.randn(512, 64)
    fast = vq.nearest_code(z, codebook, precision="fast", backend=backend)
    assert (fast != reference.nearest(z, codebook)).float().mean() < 1e-3


def test_low_matmul_precision_does_not_reach_the_indices():
    z, codebook = ADVERSARIES["one ulp apart"](200, 40, 32)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        agree(z, codebook, "eager")
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("library", [torch.backends.mkldnn.matmul, torch.backends.cuda.matmul, torch.backends])
def test_precision_of_one_library_does_not_reach_the_indices(library):
    z, codebook = ADVERSARIES["one ulp apart"](200, 40, 32)
    before = library.fp32_precision
    try:
        library.fp32_precision = "tf32"
        agree(z, codebook, "eager")
    finally:
        library.fp32_precision = before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_does_not_reach_the_indices(dtype, backend):
    z, codebook = ADVERSARIES["gaussian"](1000, 512, 64)
    with torch.autocast("cpu", dtype=dtype):
        agree(z, codebook, backend)


def test_flushed_subnormals_do_not_reach_the_indices(cpu_kernels):
    z, codebook = ADVERSARIES["subnormal"](200, 40, 8)
    expected = reference.nearest(z, codebook)
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush subnormals")
    try:
        found = vq.nearest_code(z, codebook, backend="cpu")
        assert torch.tensor(1e-39) * 0.5 == 0  # the caller's own setting is left alone
    finally:
        torch.set_flush_denormal(False)
    assert found.equal(expected)


def test_scratch_does_not_grow_with_rows_times_codes(cpu_kernels):
    import resource

    z, codebook = torch.randn(1 << 15, 8), torch.randn(1 << 14, 8)
    vq.nearest_code(z[:64], codebook, backend="cpu")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    vq.nearest_code(z, codebook, backend="cpu")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024  # KiB; N x K would be 2 GiB


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            dict(z=torch.randn(4, 3)),
            "codebook of shape .5, 2. has 2 channels, but z of shape .4, 3. has 3 at channel_dim=1",
        ),
        (
            dict(z=torch.zeros(4, 2, dtype=torch.int32)),
            "z must be float32, bfloat16, float16 or float64, got torch.int32",
        ),
        (dict(codebook=torch.randn(2)), "codebook must be .K, D., or .H, K, D. for batched codebooks, got .2."),
        (dict(codebook=torch.randn(0, 2)), "codebook must hold at least one code of at least one channel, got .0, 2."),
        (dict(mask=torch.ones(4)), "mask must be a bool tensor .True: the row counts., got torch.float32"),
        (dict(mask=torch.ones(3, dtype=torch.bool)), "mask must have z's shape without channels, .4., got .3."),
        (dict(metric="manhattan"), "metric must be one of 'euclidean', 'dot', 'cosine', got 'manhattan'"),
        (dict(precision="low"), "precision must be one of 'exact', 'fast', got 'low'"),
        (dict(backend="tpu"), "backend must be one of auto, .*eager, got 'tpu'"),
        (dict(channel_dim=2), "channel_dim must be in .-2, 1. for z of shape .4, 2., got 2"),
        (dict(z=[[1.0, 2.0]]), "z and codebook must be tensors, got list and Tensor"),
    ],
)
def test_bad_input_is_one_clear_sentence(change, message):
    arguments = {"z": torch.randn(4, 2), "codebook": torch.randn(5, 2)} | change
    with pytest.raises((TypeError, ValueError), match=message):
        vq.nearest_code(**arguments)


@pytest.mark.slow
def test_sizes_past_two_to_the_31(cpu_kernels):
    z, codebook = torch.randn(1 << 16, 3), torch.randn(1 << 16, 3)
    found = vq.nearest_code(z, codebook, backend="cpu")  # N * K is 2^32
    assert found[::4096].equal(reference.nearest(z[::4096], codebook))
    rows = torch.randn(1, 64).expand((1 << 25) + 3, 64)  # N * D is above 2^31, in 256 bytes
    found = vq.nearest_code(rows, torch.cat([rows[:1] + 1, rows[:1]]), backend="cpu")
    assert found.shape == ((1 << 25) + 3,) and found.eq(1).all()


@pytest.mark.slow
def test_offsets_past_two_to_the_31(cpu_kernels):
    codebook = torch.randn(5, 4).bfloat16()
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        storage = torch.empty((1 << 32) + 4, dtype=torch.bfloat16)  # only the pages of three rows are ever touched
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = True
    z = storage.as_strided((3, 4), (1 << 31, 1))
    for row, code in enumerate((4, 0, 2)):
        z[row] = codebook[code]
    assert vq.nearest_code(z, codebook, backend="cpu").tolist() == [4, 0, 2]
    assert vq.codebook_statistics(z, torch.tensor([4, 0, 2]), 5)[1][2].equal(codebook[2].float())
