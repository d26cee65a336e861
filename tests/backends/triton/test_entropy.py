"""The entropies and their gradients against plain float64 PyTorch, which autograd differentiates."""

import math

import pytest
import torch

pytest.importorskip("triton")

from backends.triton import hostile

from vqkernels.backends.triton import entropy as kernels

DEFAULT = {"rows": 70, "codes": 37, "dim": 5, "metric": "euclidean", "temperature": 1.0, "dtypes": (torch.float32,) * 2}
FLOAT, DOUBLE, BRAIN, HALF = torch.float32, torch.float64, torch.bfloat16, torch.float16


def probabilities(z, codebook, metric, temperature):
    """p_ij (N, K) and its logarithm, of float64 rows and codes."""
    if metric == "euclidean":
        logits = -(z[:, None] - codebook[None]).square().sum(2)
    else:
        logits = (z[:, None] * codebook[None]).sum(2)
    logarithms = (logits / temperature).log_softmax(1)
    return logarithms.exp(), logarithms


def oracle(z, codebook, mask, metric, temperature, grads):
    """What one head must give: both entropies, mean assignment, gradients of z and codebook; rows and codes that are
    not finite count nowhere."""
    rows, codes = z.double().requires_grad_(), codebook.double().requires_grad_()
    counted = torch.ones(len(z), dtype=torch.bool) if mask is None else mask
    counted = counted & z.isfinite().all(1)
    usable = codebook.isfinite().all(1)
    p, logarithms = probabilities(rows[counted], codes[usable], metric, temperature)
    number = max(1, int(counted.sum()))
    own = -(p * logarithms).sum(1)
    mean = p.sum(0) / number
    sample, usage = own.sum() / number, torch.special.entr(mean).sum()
    grad_z, grad_codebook = torch.autograd.grad(grads[0] * sample + grads[1] * usage, (rows, codes))
    all_means = torch.zeros(len(codebook), dtype=torch.float64)
    all_means[usable] = mean.detach()
    return sample.detach(), usage.detach(), all_means, grad_z, grad_codebook


def problem(seed=0, **changed):
    """z (N, D) and codebook (K, D), random, distances of the order of the temperature's root or of 1."""
    case = DEFAULT | changed
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(case["rows"], case["dim"], generator=generator)
    codebook = torch.randn(case["codes"], case["dim"], generator=generator)
    return z.to(case["dtypes"][0]), codebook.to(case["dtypes"][1]), case["metric"], case["temperature"]


def run(z, codebook, mask, metric, temperature, grads, device, codebook_gradient=True):
    """(entropy's outputs, grad_z, grad_codebook) of canonical views."""
    z, codebook = z.to(device), codebook.to(device)
    mask = None if mask is None else mask.to(device)
    out = kernels.entropy(z, codebook, mask, metric, temperature)
    incoming = [torch.tensor(g, dtype=torch.float64, device=device).reshape(-1) for g in grads]
    heads = [g.expand(z.shape[1]).contiguous() for g in incoming]
    back = kernels.entropy_backward(*heads, z, codebook, mask, *out[2:], metric, temperature, codebook_gradient)
    return [x.cpu() for x in out], *(x.cpu() for x in back)


def run_one(z, codebook, mask, metric, temperature, grads, device):
    """One head of rows (N, D)."""
    view = None if mask is None else mask[None, None]
    out, grad_z, grad_codebook = run(z[None, None], codebook[None], view, metric, temperature, grads, device)
    return [x[0] for x in out], grad_z[0, 0], grad_codebook[0]


def off(found, expected):
    """The largest error, relative to the largest element."""
    if expected.numel() == 0:
        return 0.0
    assert torch.equal(found.isnan(), expected.isnan())
    scale = expected.nan_to_num().abs().max().clamp_min(1e-30)
    return float(((found.double() - expected).nan_to_num().abs() / scale).max())


def tolerances(dtypes, temperature, dim):
    """(of the values, of the gradient of z, of the gradient of the codebook). float32: a logit of size D/τ carries
    rounding of 2^-24 of that; what comes out in 16 bits is rounded to them."""
    real = 2e-13 if DOUBLE in dtypes else 1e-6
    logits = real * (1 + 4 * dim / temperature)
    stored = {BRAIN: 2.0**-8, HALF: 2.0**-10, FLOAT: 1e-6, DOUBLE: 0.0}
    return logits, *(10 * logits + stored[kind] for kind in dtypes)


def check(z, codebook, mask, metric, temperature, device, grads=(0.75, -1.25)):
    (sample, usage, _, _, mean), grad_z, grad_codebook = run_one(z, codebook, mask, metric, temperature, grads, device)
    expected = oracle(z, codebook, mask, metric, temperature, grads)
    values, of_z, of_codebook = tolerances((z.dtype, codebook.dtype), temperature, z.shape[1])
    largest = math.log(max(2, len(codebook)))  # an entropy near 0 is the difference of larger numbers
    assert abs(sample - expected[0]) <= values * largest
    assert abs(usage - expected[1]) <= values * largest
    assert off(mean, expected[2]) <= values * 4
    assert off(grad_z, expected[3]) <= of_z
    assert off(grad_codebook, expected[4]) <= of_codebook


@pytest.mark.parametrize("metric", ["euclidean", "dot"])
def test_values_and_gradients(metric, device):
    z, codebook, _, _ = problem()
    check(z, codebook, None, metric, 1.0, device)
    mask = torch.arange(70) % 3 != 1
    check(z, codebook, mask, metric, 0.5, device)


@pytest.mark.parametrize("metric", hostile.first(["euclidean", "dot"]))
@pytest.mark.parametrize("temperature", hostile.first([0.01, 0.1, 10.0]))
def test_temperatures(temperature, metric, device):
    z, codebook, _, _ = problem(1, rows=33, codes=40)
    check(z, codebook, None, metric, temperature, device)
    check(z.double(), codebook.double(), None, metric, temperature, device)


@pytest.mark.parametrize("grads", hostile.first([(0.0, 1.0), (1.0, 0.0), (-3.0, 1e-3), (0.0, 0.0)]))
def test_either_entropy_alone(grads, device):
    z, codebook, metric, _ = problem(2, rows=40, codes=20)
    check(z.double(), codebook.double(), None, metric, 0.5, device, grads)


@pytest.mark.parametrize("metric", hostile.first(["euclidean", "dot"]))
def test_float64_gradients_to_nine_digits(metric, device):
    z, codebook, _, _ = problem(3, dtypes=(DOUBLE, DOUBLE))
    mask = torch.arange(70) % 4 != 0
    for temperature in (0.05, 2.0):
        grads = (0.3, 0.7)
        out, grad_z, grad_codebook = run_one(z, codebook, mask, metric, temperature, grads, device)
        expected = oracle(z, codebook, mask, metric, temperature, grads)
        assert off(grad_z, expected[3]) < 1e-9
        assert off(grad_codebook, expected[4]) < 1e-9
        assert out[2].dtype == out[3].dtype == out[4].dtype == grad_z.dtype == grad_codebook.dtype == DOUBLE


PAIRS = [(BRAIN, BRAIN), (HALF, HALF), (BRAIN, FLOAT), (FLOAT, HALF), (HALF, BRAIN), (FLOAT, DOUBLE), (DOUBLE, BRAIN)]


@pytest.mark.parametrize("dtypes", hostile.first(PAIRS))
def test_dtypes(dtypes, device):
    z, codebook, metric, _ = problem(4, rows=45, codes=50, dtypes=dtypes)
    check(z, codebook, torch.arange(45) % 5 != 0, metric, 1.0, device)
    out, grad_z, grad_codebook = run_one(z, codebook, None, "dot", 0.3, (1.0, 1.0), device)
    assert grad_z.dtype == z.dtype
    assert grad_codebook.dtype == codebook.dtype
    real = DOUBLE if DOUBLE in dtypes else FLOAT
    assert [x.dtype for x in out] == [DOUBLE, DOUBLE, real, real, real]


SIZES = [(1, 1, 1), (1, 300, 3), (256, 1, 3), (97, 65, 130), (33, 33, 257), (128, 64, 16), (200, 31, 64), (5, 129, 17)]


@pytest.mark.parametrize("size", hostile.first(SIZES))
def test_odd_sizes(size, device):
    rows, codes, dim = size
    z, codebook, metric, _ = problem(5, rows=rows, codes=codes, dim=dim, dtypes=(DOUBLE, DOUBLE))
    check(z, codebook, None, metric, 0.7 * dim, device)
    check(z.float(), codebook.float(), torch.arange(rows) % 2 == 0, "dot", 0.7 * dim, device)


def test_rows_and_codes_that_are_not_finite(device):
    z, codebook, metric, _ = problem(6)
    z[3, 1], z[40], z[69, 0] = torch.nan, torch.inf, -torch.inf
    codebook[0, 0], codebook[36] = torch.nan, -torch.inf
    grads = (0.75, -1.25)
    (sample, usage, own, _, mean), grad_z, grad_codebook = run_one(z, codebook, None, metric, 1.0, grads, device)
    expected = oracle(z, codebook, None, metric, 1.0, grads)
    assert sample.isnan()
    assert usage.isnan()
    bad = ~z.isfinite().all(1)
    assert grad_z[bad].isnan().all()
    assert own.isfinite().all()
    assert off(grad_z[~bad], expected[3][~bad]) < 1e-5
    assert (mean[[0, 36]] == 0).all()
    assert off(mean, expected[2]) < 1e-5
    assert (grad_codebook[[0, 36]] == 0).all()
    assert off(grad_codebook, expected[4]) < 1e-5


def test_masked_rows_are_never_read(device):
    """Not even when they are poisoned: the same bits as with anything else in their place."""
    z, codebook, metric, _ = problem(7, rows=33, codes=20)
    mask = torch.arange(33) % 3 != 0
    check(z, codebook, mask, metric, 1.0, device)
    results = []
    for filling in (torch.nan, torch.inf, 3.0):
        z[~mask] = filling
        out, grad_z, grad_codebook = run_one(z, codebook, mask, metric, 1.0, (1.0, 2.0), device)
        results.append([*out, grad_z, grad_codebook])
        assert (grad_z[~mask] == 0).all()
        assert grad_z.isfinite().all()
        assert (out[2][~mask] == 0).all()
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


def test_a_masked_row_has_no_gradient_whatever_comes_in(device):
    z, codebook, metric, _ = problem(8, rows=20)
    mask = torch.arange(20) != 4
    for incoming in (torch.nan, torch.inf):
        _, grad_z, _ = run_one(z, codebook, mask, metric, 1.0, (incoming, 1.0), device)
        assert (grad_z[4] == 0).all()
        assert grad_z[mask].isnan().all()


def test_no_rows_no_counted_rows_and_no_usable_codes(device):
    z, codebook, metric, _ = problem(9, rows=12)
    for rows, mask, codes in (
        (z[:0], None, codebook),
        (z, torch.zeros(12, dtype=torch.bool), codebook),
        (z, None, torch.full_like(codebook, torch.nan)),
    ):
        out, grad_z, grad_codebook = run_one(rows, codes, mask, metric, 1.0, (1.0, 1.0), device)
        assert out[0] == out[1] == 0
        assert (out[2] == 0).all()
        assert (out[4] == 0).all()
        assert grad_z.shape == rows.shape
        assert (grad_z == 0).all()
        assert (grad_codebook == 0).all()


@pytest.mark.parametrize("offset", hostile.first([1e5, -1e3]))
def test_a_common_offset_costs_nothing(offset, device):
    """The centre is subtracted first: coordinates in units of 1/64 survive an offset of 1e5 in float32 exactly."""
    z, codebook, _, _ = problem(10, rows=40)
    z, codebook = (z * 64).round() / 64, (codebook * 64).round() / 64
    check(z + offset, codebook + offset, None, "euclidean", 1.0, device)


@pytest.mark.slow
def test_codes_alike_share_the_probability(device):
    z, codebook, metric, temperature = problem(11, rows=20, codes=3)
    check(z, codebook.repeat(30, 1), None, metric, temperature, device)
    out, _, _ = run_one(z, codebook[:1].repeat(64, 1), None, metric, temperature, (1.0, 1.0), device)
    assert abs(out[0] - math.log(64)) < 1e-5
    assert abs(out[1] - math.log(64)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("masked", [False, True])
def test_heads_and_strides(masked, device):
    """Each head as it is alone, from views that are not contiguous; apart from how the sums are split."""
    z = torch.randn(2, 3, 6, 11).transpose(2, 3)  # (B, H, P, D) of channels first
    codebook = torch.randn(3, 6, 29).transpose(1, 2)
    mask = (torch.rand(2, 3, 11) < 0.7) if masked else None
    out, grad_z, grad_codebook = run(z, codebook, mask, "euclidean", 0.8, (1.0, -2.0), device)
    for head in range(3):
        rows, codes = z[:, head].reshape(22, 6), codebook[head]
        counted = None if mask is None else mask[:, head].reshape(22)
        alone, alone_z, alone_codebook = run_one(rows, codes, counted, "euclidean", 0.8, (1.0, -2.0), device)
        check(rows, codes, counted, "euclidean", 0.8, device)
        for one, other in zip(out, alone, strict=True):
            torch.testing.assert_close(one[head], other, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(grad_z[:, head].reshape(22, 6), alone_z, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(grad_codebook[head], alone_codebook, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("programs", hostile.first([40, 1]))
def test_splits_of_rows_and_codes(programs, device, monkeypatch):
    """Few tiles on many processors: both sides are cut, and the partial results are added once each."""
    monkeypatch.setattr(kernels, "multiprocessors", lambda _: programs)
    monkeypatch.setattr(kernels, "SPLIT_ROWS", 64)
    z, codebook, metric, _ = problem(12, rows=70, codes=66, dtypes=(DOUBLE, DOUBLE))
    packed = kernels.pack(z[None, None].to(device), codebook[None].to(device), None, metric, 1.0)
    config = packed.config
    for passing_codes in (False, True):
        _, splits = kernels.shared_out(packed, passing_codes, config.resident, config.passing)
        assert splits == (2 if programs == 40 or not passing_codes else 1)
    check(z, codebook, torch.arange(70) % 7 != 0, metric, 0.5, device)
    check(z[:50], codebook, None, "dot", 0.5, device)
    check(z, codebook[:20], None, metric, 0.5, device)


def test_every_bit_repeats(device):
    z, codebook, metric, _ = problem(13, rows=70, codes=70, dim=9)
    mask = torch.arange(70) % 9 != 0
    first, again = (run_one(z, codebook, mask, metric, 0.3, (1.0, -1.0), device) for _ in range(2))
    for one, other in zip([*first[0], *first[1:]], [*again[0], *again[1:]], strict=True):
        assert torch.equal(one, other)


def test_without_the_gradient_of_the_codebook(device):
    z, codebook, metric, temperature = problem(14, rows=20)
    view = z[None, None], codebook[None]
    _, grad_z, none = run(*view, None, metric, temperature, (1.0, 1.0), device, codebook_gradient=False)
    _, both, _ = run(*view, None, metric, temperature, (1.0, 1.0), device)
    assert none.shape == (0,)
    assert torch.equal(grad_z, both)
