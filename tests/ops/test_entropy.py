"""entropy_loss: values and gradients against the reference, bad rows and codes, layouts, compile, determinism."""

import pytest
import torch
from ops.entropy_gradients import WEIGHTS, close, double, gradients, plain, scalar
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

import vqkernels as vq
from vqkernels import reference
from vqkernels.backends.eager import entropy as eager_entropy
from vqkernels.verification.layouts import LAYOUTS, flat, flat_rows

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
METRICS = ["euclidean", "dot"]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    ("rows", "codes", "dim", "temperature"),
    [
        (1, 1, 1, 1.0),
        (3, 2, 1, 0.5),
        (65, 129, 7, 1.0),
        (33, 61, 131, 5.0),
        (257, 97, 16, 1e-3),
        (100, 48, 5, 1e4),
        (40, 1, 6, 1.0),
        (1, 300, 9, 0.1),
        (1200, 1150, 3, 1.0),  # sums that pass from the working type into a double on the way
    ],
)
def test_values_and_gradients_equal_the_reference_in_float64(rows, codes, dim, temperature, metric, backend):
    z, codebook = torch.randn(rows, dim, dtype=torch.float64), torch.randn(codes, dim, dtype=torch.float64)
    found = vq.entropy_loss(z, codebook, temperature, metric=metric, backend=backend)
    expected = reference.entropy_loss(z, codebook, temperature, metric=metric)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    for weights in WEIGHTS.values():
        ours = gradients(vq.entropy_loss, z, codebook, temperature, weights, metric=metric, backend=backend)
        theirs = gradients(reference.entropy_loss, z, codebook, temperature, weights, metric=metric)
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("which", WEIGHTS)
@pytest.mark.parametrize("masked", [False, True])
def test_random_incoming_gradients_together_and_alone(masked, which, metric, backend):
    z, codebook = torch.randn(150, 6, dtype=torch.float64), torch.randn(70, 6, dtype=torch.float64)
    options = {"metric": metric, "mask": torch.rand(150) < 0.6 if masked else None}
    ours = gradients(vq.entropy_loss, z, codebook, 0.8, WEIGHTS[which], **options, backend=backend)
    theirs = gradients(reference.entropy_loss, z, codebook, 0.8, WEIGHTS[which], **options)
    assert all(x.abs().max() > 1e-6 for x in theirs)
    close(ours, theirs, 1e-9)


@pytest.mark.parametrize("metric", METRICS)
def test_gradcheck(metric, backend):
    z, codebook = torch.randn(9, 3, dtype=torch.float64), torch.randn(7, 3, dtype=torch.float64)
    leaves = z.requires_grad_(), codebook.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, e: vq.entropy_loss(x, e, 0.9, metric=metric, backend=backend), leaves)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    ("rows", "codes", "dim", "temperature"), [(500, 300, 16, 1.0), (300, 1000, 32, 0.1), (1300, 70, 3, 20.0)]
)
def test_float32_is_no_worse_than_plain_torch(rows, codes, dim, temperature, metric, backend):
    z, codebook = torch.randn(rows, dim), torch.randn(codes, dim)
    expected = reference.entropy_loss(z, codebook, temperature, metric=metric)
    found = vq.entropy_loss(z, codebook, temperature, metric=metric, backend=backend)
    usual = plain(z, codebook, temperature, metric)
    for ours, theirs, exact in zip(found, usual, expected, strict=True):
        assert ours.dtype == torch.float32
        assert abs(double(ours) - exact) <= 2 * abs(double(theirs) - exact) + 1e-5 * (exact + 0.01)
    for weights in WEIGHTS.values():
        exact = gradients(reference.entropy_loss, z.double(), codebook.double(), temperature, weights, metric=metric)
        ours = gradients(vq.entropy_loss, z, codebook, temperature, weights, metric=metric, backend=backend)
        theirs = gradients(plain, z, codebook, temperature, weights, metric=metric)
        for mine, other, true in zip(ours, theirs, exact, strict=True):
            worst = float((double(other) - true).abs().max())
            assert float((double(mine) - true).abs().max()) <= 2 * worst + 2e-6 * float(true.abs().max())


@pytest.mark.parametrize("code_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype(dtype, code_dtype, backend):
    z, codebook = torch.randn(90, 10).to(dtype), torch.randn(33, 10).to(code_dtype)
    found = vq.entropy_loss(z, codebook, 2.0, backend=backend)
    wide = torch.float64 in (dtype, code_dtype)
    tolerance = 1e-10 if wide else 2e-6
    expected = reference.entropy_loss(z, codebook, 2.0)
    assert all(x.dtype == (torch.float64 if wide else torch.float32) and x.shape == () for x in found)
    close(found, expected, tolerance)
    ours = gradients(vq.entropy_loss, z, codebook, 2.0, WEIGHTS["both"], backend=backend)
    theirs = gradients(reference.entropy_loss, z.double(), codebook.double(), 2.0, WEIGHTS["both"])
    assert ours[0].dtype == dtype and ours[1].dtype == code_dtype
    for mine, true in zip(ours, theirs, strict=True):
        rounding = torch.finfo(mine.dtype).eps
        torch.testing.assert_close(double(mine), true, rtol=rounding, atol=2e-6 if rounding > 1e-10 else 1e-10)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, masked, backend):
    """Masked rows hold NaN here: they are never read, and their gradient is exactly 0."""
    z, channel_dim, codebook, mask = LAYOUTS[layout](masked, torch.device("cpu"))
    batched = codebook.dim() == 3
    rows, kept = flat(z, channel_dim, batched), None if mask is None else flat_rows(mask, batched)
    expected = reference.entropy_loss(rows, codebook, 3.0, mask=kept)
    options = {"mask": mask, "channel_dim": channel_dim, "backend": backend}
    found = vq.entropy_loss(z, codebook, 3.0, **options)
    torch.testing.assert_close(found, tuple(x.float() for x in expected), rtol=1e-5, atol=1e-5)
    ours = gradients(vq.entropy_loss, z, codebook, 3.0, WEIGHTS["both"], **options)
    theirs = gradients(reference.entropy_loss, rows.double(), codebook.double(), 3.0, WEIGHTS["both"], mask=kept)
    torch.testing.assert_close(flat(ours[0], channel_dim, batched).double(), theirs[0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(ours[1].double(), theirs[1], rtol=1e-4, atol=1e-6)
    if kept is not None:
        assert flat(ours[0], channel_dim, batched)[~kept].eq(0).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_bad_row_makes_the_entropies_nan_and_touches_nothing_else(bad, backend):
    z, codebook, keep = torch.randn(70, 5), torch.randn(20, 5), torch.arange(70) != 41
    broken = torch.where(keep[:, None], z, bad)
    assert all(x.isnan() for x in vq.entropy_loss(broken, codebook, 1.0, backend=backend))
    clean = gradients(vq.entropy_loss, z, codebook, 1.0, WEIGHTS["both"], mask=keep, backend=backend)
    found = gradients(vq.entropy_loss, broken, codebook, 1.0, WEIGHTS["both"], backend=backend)
    assert found[0][41].isnan().all()
    torch.testing.assert_close(found[0][keep], clean[0][keep])
    torch.testing.assert_close(found[1], clean[1])
    name = "default" if backend == "cpu" else "eager"
    raw = getattr(torch.ops.vqkernels.entropy, name)
    arguments = (1, "euclidean", scalar(1.0))
    assert raw(broken, codebook, None, *arguments)[4].equal(raw(z, codebook, keep, *arguments)[4])
    heads = torch.stack([broken, z]), torch.stack([codebook, codebook])
    both = vq.entropy_loss(*heads, 1.0, backend=backend)
    assert all(x[0].isnan() and x[1].isfinite() for x in both)


@pytest.mark.parametrize("metric", METRICS)
def test_bad_codes_have_no_probability_and_no_gradient(metric, backend):
    z, codebook, bad = torch.randn(40, 4), torch.randn(13, 4), torch.tensor([0, 5, 12])
    broken = codebook.clone()
    broken[bad, torch.tensor([1, 3, 0])] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    good = torch.ones(13, dtype=torch.bool).index_fill(0, bad, False)
    found = vq.entropy_loss(z, broken, 1.0, metric=metric, backend=backend)
    torch.testing.assert_close(found, vq.entropy_loss(z, codebook[good], 1.0, metric=metric, backend=backend))
    ours = gradients(vq.entropy_loss, z, broken, 1.0, WEIGHTS["both"], metric=metric, backend=backend)
    theirs = gradients(vq.entropy_loss, z, codebook[good], 1.0, WEIGHTS["both"], metric=metric, backend=backend)
    torch.testing.assert_close(ours[0], theirs[0])
    torch.testing.assert_close(ours[1][good], theirs[1])
    assert ours[1][bad].eq(0).all()
    nothing = torch.full((3, 4), torch.nan)
    assert all(x == 0 for x in vq.entropy_loss(z, nothing, 1.0, metric=metric, backend=backend))
    none = gradients(vq.entropy_loss, z, nothing, 1.0, WEIGHTS["both"], metric=metric, backend=backend)
    assert all(x.eq(0).all() for x in none)


@pytest.mark.parametrize("rows", [0, 50])
def test_no_rows_or_all_masked_give_zero(rows, backend):
    z, codebook = torch.full((rows, 4), torch.nan), torch.randn(8, 4)
    mask = torch.zeros(rows, dtype=torch.bool)
    assert all(x == 0 for x in vq.entropy_loss(z, codebook, 1.0, mask=mask, backend=backend))
    found = gradients(vq.entropy_loss, z, codebook, 1.0, WEIGHTS["both"], mask=mask, backend=backend)
    assert all(x.eq(0).all() for x in found) and found[0].shape == z.shape


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("offset", [1e3, 1e4])
def test_offsets_do_not_cancel(offset, metric, backend):
    """The codes' offset drops out of a softmax, and so does the rows' where the metric is a distance."""
    codebook = torch.randn(50, 6) + offset
    z = torch.randn(80, 6) + (offset if metric == "euclidean" else 0)
    expected = reference.entropy_loss(z, codebook, 1.0, metric=metric)
    close(vq.entropy_loss(z, codebook, 1.0, metric=metric, backend=backend), expected, 2e-6)
    theirs = gradients(reference.entropy_loss, z.double(), codebook.double(), 1.0, WEIGHTS["both"], metric=metric)
    ours = gradients(vq.entropy_loss, z, codebook, 1.0, WEIGHTS["both"], metric=metric, backend=backend)
    close(ours, theirs, 1e-5)


def test_clusters_far_apart_and_equal_codes(backend):
    """Probabilities that are exactly 0 and 1, and ties; every logarithm of 0 must stay out of the sums."""
    codebook = torch.cat([torch.zeros(3, 2), torch.full((2, 2), 100.0), torch.full((70, 2), -300.0)])
    z = torch.cat([torch.zeros(10, 2), torch.full((5, 2), 100.0)])
    found = vq.entropy_loss(z, codebook, 0.5, backend=backend)
    close(found, reference.entropy_loss(z, codebook, 0.5), 1e-6)
    ours = gradients(vq.entropy_loss, z, codebook, 0.5, WEIGHTS["both"], backend=backend)
    theirs = gradients(reference.entropy_loss, z.double(), codebook.double(), 0.5, WEIGHTS["both"])
    for mine, true in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.double(), true, rtol=0, atol=2e-5)


def test_batched_codebooks(backend):
    z, codebook = torch.randn(3, 60, 5, dtype=torch.float64), torch.randn(3, 9, 5, dtype=torch.float64)
    mask = torch.rand(3, 60) < 0.7
    mask[1] = False
    found = vq.entropy_loss(z, codebook, 0.6, mask=mask, backend=backend)
    torch.testing.assert_close(found, reference.entropy_loss(z, codebook, 0.6, mask=mask), rtol=1e-11, atol=1e-11)
    ours = gradients(vq.entropy_loss, z, codebook, 0.6, WEIGHTS["both"], mask=mask, backend=backend)
    theirs = gradients(reference.entropy_loss, z, codebook, 0.6, WEIGHTS["both"], mask=mask)
    close(ours, theirs, 1e-9)


def test_only_what_is_asked_for_is_computed(backend):
    z, codebook = torch.randn(30, 4), torch.randn(8, 4)
    sample, _ = vq.entropy_loss(z, codebook.requires_grad_(), 1.0, backend=backend)
    sample.backward()
    assert codebook.grad.abs().max() > 0
    _, whole = vq.entropy_loss(z.requires_grad_(), codebook.detach(), 1.0, backend=backend)
    whole.backward()
    assert z.grad.abs().max() > 0


def test_double_backward_raises_clearly(backend):
    z, codebook = torch.randn(10, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    (grad,) = torch.autograd.grad(vq.entropy_loss(z, codebook, 1.0, backend=backend)[1], z, create_graph=True)
    with pytest.raises(RuntimeError, match="vqkernels does not support double backward: entropy_loss"):
        grad.sum().backward()


@pytest.mark.parametrize("overload", ["default", "eager"])
def test_opcheck(overload, cpu_kernels):
    z, codebook, mask = torch.randn(2, 6, 5, 3), torch.randn(9, 6), torch.rand(2, 5, 3) < 0.8
    forward = getattr(torch.ops.vqkernels.entropy, overload)
    backward = getattr(torch.ops.vqkernels.entropy_backward, overload)
    for x in (z, z.to(memory_format=torch.channels_last), z.transpose(0, 2).contiguous().transpose(0, 2)):
        opcheck(forward, (x, codebook, mask, 1, "euclidean", scalar(1.0)))
    heads = torch.randn(2, 7, 6).double()
    opcheck(forward, (z, heads, mask, 1, "dot", scalar(0.5)))
    for codes, metric, wanted in ((codebook, "euclidean", True), (heads, "dot", True), (codebook, "dot", False)):
        sample, whole, *kept = forward(z, codes, mask, 1, metric, scalar(1.0))
        incoming = torch.ones_like(sample), torch.ones_like(whole)
        opcheck(backward, (*incoming, z, codes, mask, *kept, 1, metric, scalar(1.0), wanted))


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_whole_with_dynamic_shapes(compiler, backend):
    torch._dynamo.reset()
    codebook = torch.randn(30, 8)

    def step(z, codebook, mask):
        sample, whole = vq.entropy_loss(z * 2, codebook, 1.5, mask=mask, channel_dim=1, backend=backend)
        return sample - 0.5 * whole

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=compiler)
    for batch, height in ((2, 4), (3, 6)):
        z, mask = torch.randn(batch, 8, height, 5), torch.rand(batch, height, 5) < 0.7
        results = []
        for function in (step, compiled):
            leaf, codes = z.clone().requires_grad_(), codebook.clone().requires_grad_()
            out = function(leaf, codes, mask)
            out.backward()
            results.append((out, leaf.grad, codes.grad))
        torch.testing.assert_close(results[0], results[1])


def test_autocast_changes_nothing(backend):
    z, codebook = torch.randn(50, 8), torch.randn(10, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = vq.entropy_loss(z, codebook, 1.0, backend=backend)
        ours = gradients(vq.entropy_loss, z, codebook, 1.0, WEIGHTS["both"], backend=backend)
    assert all(a.equal(b) for a, b in zip(found, vq.entropy_loss(z, codebook, 1.0, backend=backend), strict=True))
    theirs = gradients(vq.entropy_loss, z, codebook, 1.0, WEIGHTS["both"], backend=backend)
    assert all(a.equal(b) for a, b in zip(ours, theirs, strict=True))


class Watch(TorchDispatchMode):
    """The largest number of elements of any tensor inside, and every operator that waits for the device."""

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
    z, codebook, mask = torch.randn(20_000, 2), torch.randn(1024, 2), torch.rand(20_000) < 0.5
    with Watch() as watch:
        sample, whole, *kept = eager_entropy.entropy(z, codebook, mask, 1, "euclidean", scalar(1.0))
        eager_entropy.entropy_backward(sample, whole, z, codebook, mask, *kept, 1, "euclidean", scalar(1.0), True)
    assert watch.waits == [] and watch.elements <= 2 * 1024 * 1024 < 20_000 * 1024 / 8


def test_bad_input_is_one_sentence():
    z, codebook = torch.randn(10, 3), torch.randn(4, 3)
    for bad in (0, -1.0, float("nan"), float("inf"), "1", True):
        with pytest.raises(ValueError, match="temperature must be a positive finite number, got"):
            vq.entropy_loss(z, codebook, bad)
    with pytest.raises(ValueError, match="metric must be one of 'euclidean', 'dot', got 'cosine'"):
        vq.entropy_loss(z, codebook, 1.0, metric="cosine")
    with pytest.raises(TypeError, match="mask must be a bool tensor"):
        vq.entropy_loss(z, codebook, 1.0, mask=torch.ones(10))


def test_the_reference_by_hand():
    """Two codes at distances that make the probabilities 3/4 and 1/4, and the other way round."""
    codebook = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    edge = (1 - torch.log(torch.tensor(3.0, dtype=torch.float64))) / 2
    sample, whole = reference.entropy_loss(torch.stack([edge, 1 - edge])[:, None], codebook, 1.0)
    expected = -(0.75 * torch.log(torch.tensor(0.75)) + 0.25 * torch.log(torch.tensor(0.25)))
    assert abs(float(sample - expected)) < 1e-7 and abs(float(whole) - 0.6931471805599453) < 1e-12
