"""vector_quantize: values, gradients against the detached reference, bad rows, masks, layouts, compile, determinism."""

import itertools

import pytest
import torch
from torch.library import opcheck

import vqkernels as vq
from vqkernels import reference
from vqkernels.ops.quantize import quantize_with_statistics
from vqkernels.verification.adversaries import ADVERSARIES

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
OUTPUTS = ["quantized", "codebook_loss", "commitment_loss"]


def value_of(results, cotangents, which):
    """A scalar that has the given cotangents as its incoming gradients."""
    named = dict(zip(["quantized", "indices", "codebook_loss", "commitment_loss"], results, strict=True))
    return sum((named[name] * cotangents[name]).sum() for name in which)


def gradients(function, z, codebook, cotangents, which, **arguments):
    z, codebook = z.clone().requires_grad_(), codebook.clone().requires_grad_()
    value_of(function(z, codebook, **arguments), cotangents, which).backward()
    zero = torch.zeros_like
    return (zero(z) if z.grad is None else z.grad), (zero(codebook) if codebook.grad is None else codebook.grad)


def cotangents_for(z):
    return {
        "quantized": torch.randn(z.shape, dtype=z.dtype),
        "codebook_loss": torch.randn((), dtype=z.dtype),
        "commitment_loss": torch.randn((), dtype=z.dtype),
    }


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("which", [[name] for name in OUTPUTS] + [OUTPUTS], ids="+".join)
def test_gradients_equal_the_reference_in_float64(which, masked, backend):
    z, codebook = torch.randn(300, 7, dtype=torch.float64), torch.randn(40, 7, dtype=torch.float64)
    mask = torch.rand(300) < 0.7 if masked else None
    cotangents = cotangents_for(z)
    expected = gradients(reference.vector_quantize, z, codebook, cotangents, which, mask=mask)
    found = gradients(vq.vector_quantize, z, codebook, cotangents, which, mask=mask, backend=backend)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("metric", ["dot", "cosine"])
def test_the_metric_governs_the_search_only(metric, backend):
    z, codebook = torch.randn(200, 5, dtype=torch.float64), torch.randn(30, 5, dtype=torch.float64)
    cotangents = cotangents_for(z)
    expected = gradients(reference.vector_quantize, z, codebook, cotangents, OUTPUTS, metric=metric)
    found = gradients(vq.vector_quantize, z, codebook, cotangents, OUTPUTS, metric=metric, backend=backend)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_gradcheck_where_stop_gradients_allow_it(backend):
    z, codebook = torch.randn(20, 3, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)
    quantize = vq.vector_quantize
    leaf = codebook.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda e: quantize(z, e, backend=backend)[2], leaf)
    leaf = z.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: quantize(x, codebook, backend=backend)[3], leaf)


@pytest.mark.parametrize("code_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_dtypes(dtype, code_dtype, backend):
    z, codebook = torch.randn(257, 20).to(dtype), torch.randn(33, 20).to(code_dtype)
    quantized, indices, codebook_loss, commitment_loss = vq.vector_quantize(z, codebook, backend=backend)
    assert indices.equal(reference.nearest(z, codebook))
    assert quantized.dtype == dtype and quantized.equal(codebook[indices].to(dtype))
    exact = (z.double() - codebook[indices].double()).square().mean()
    for loss in (codebook_loss, commitment_loss):
        assert loss.dtype == (torch.float64 if torch.float64 in (dtype, code_dtype) else torch.float32)
        torch.testing.assert_close(loss.double(), exact, rtol=1e-7 if loss.dtype == torch.float32 else 1e-13, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_in_every_dtype_are_those_of_float64_rounded_once(dtype, backend):
    z, codebook = torch.randn(100, 12).to(dtype), torch.randn(10, 12)
    cotangents = cotangents_for(z)
    exact = gradients(
        reference.vector_quantize,
        z.double(),
        codebook.double(),
        {name: value.double() for name, value in cotangents.items()},
        OUTPUTS,
    )
    cotangents |= {
        name: cotangents[name].to(torch.float64 if dtype == torch.float64 else torch.float32) for name in OUTPUTS[1:]
    }
    found = gradients(vq.vector_quantize, z, codebook, cotangents, OUTPUTS, backend=backend)
    ulp = torch.finfo(dtype).eps
    torch.testing.assert_close(found[0].double(), exact[0], rtol=ulp, atol=1e-7)
    torch.testing.assert_close(found[1].double(), exact[1], rtol=3e-6, atol=1e-7)


def test_losses_near_a_converged_codebook_do_not_cancel(backend):
    codebook = 1e3 + torch.randn(64, 16)
    z = codebook[torch.randint(64, (1000,))] + 1e-3 * torch.randn(1000, 16)
    loss = vq.vector_quantize(z, codebook, backend=backend)[2]
    exact = (z.double() - codebook[vq.nearest_code(z, codebook)].double()).square().mean()
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=0)


def test_a_bad_row_makes_the_losses_nan_and_touches_nothing_else(backend):
    z, codebook = torch.randn(100, 6), torch.randn(16, 6)
    clean_z, clean_codebook = gradients(
        vq.vector_quantize, z, codebook, (cotangents := cotangents_for(z)), OUTPUTS, backend=backend
    )
    for bad in (torch.nan, torch.inf, -torch.inf):
        broken = z.clone()
        broken[17, 3] = bad
        quantized, indices, codebook_loss, commitment_loss = vq.vector_quantize(broken, codebook, backend=backend)
        assert indices[17] == 0 and quantized[17].equal(codebook[0])
        assert codebook_loss.isnan() and commitment_loss.isnan()
        grad_z, grad_codebook = gradients(vq.vector_quantize, broken, codebook, cotangents, OUTPUTS, backend=backend)
        others = torch.arange(100) != 17
        assert grad_z[17].isnan().all() and grad_z[others].equal(clean_z[others])
        code = reference.nearest(z, codebook)[17]
        expected = clean_codebook.clone()
        expected[code] -= cotangents["codebook_loss"] * 2 * (codebook[code] - z[17]) / z.numel()
        torch.testing.assert_close(grad_codebook, expected)


def test_bad_rows_count_in_no_statistic(backend):
    z, codebook = torch.randn(100, 6), torch.randn(16, 6)
    z[3, 0], z[50, 5] = torch.nan, torch.inf
    result = quantize_with_statistics(z, codebook, backend=backend)
    counts, sums = reference.statistics(z, result.indices, 16)
    assert result.counts[0].equal(counts) and counts.sum() == 98
    assert result.sums[0].equal(sums.float()) and result.sums.isfinite().all()


def test_masked_rows_change_nothing(backend):
    z, codebook, mask = torch.randn(200, 5), torch.randn(12, 5), torch.rand(200) < 0.5
    cotangents = cotangents_for(z)
    kept = {**cotangents, "quantized": cotangents["quantized"][mask]}
    expected = gradients(vq.vector_quantize, z[mask], codebook, kept, OUTPUTS, backend=backend)
    poisoned = torch.where(mask[:, None], z, torch.nan)
    quantized, indices, codebook_loss, _ = vq.vector_quantize(poisoned, codebook, mask=mask, backend=backend)
    assert indices[~mask].eq(-1).all() and quantized[~mask].eq(0).all()
    torch.testing.assert_close(codebook_loss, vq.vector_quantize(z[mask], codebook)[2], rtol=1e-6, atol=0)
    grad_z, grad_codebook = gradients(
        vq.vector_quantize, poisoned, codebook, cotangents, OUTPUTS, mask=mask, backend=backend
    )
    assert grad_z[~mask].eq(0).all()
    torch.testing.assert_close(grad_z[mask], expected[0])
    torch.testing.assert_close(grad_codebook, expected[1])


@pytest.mark.parametrize("rows", [0, 50])
def test_no_rows_or_all_masked_give_zero_losses_and_gradients(rows, backend):
    z, codebook = torch.full((rows, 4), torch.nan).requires_grad_(), torch.randn(8, 4).requires_grad_()
    mask = torch.zeros(rows, dtype=torch.bool)
    quantized, indices, codebook_loss, commitment_loss = vq.vector_quantize(z, codebook, mask=mask, backend=backend)
    assert codebook_loss == 0 and commitment_loss == 0 and quantized.shape == z.shape
    (quantized.sum() + codebook_loss + commitment_loss).backward()
    assert z.grad.eq(0).all() and codebook.grad.eq(0).all() and indices.eq(-1).all()


@pytest.mark.parametrize("shape", [(2, 12, 5, 7), (3, 12, 9), (4, 12)])
def test_channels_first_keeps_the_memory_format(shape, backend):
    z, codebook = torch.randn(shape), torch.randn(20, 12)
    variants = [z, z.movedim(1, -1).contiguous().movedim(-1, 1)]
    expected = None
    for variant in variants:
        leaf = variant.clone(memory_format=torch.preserve_format).requires_grad_()
        quantized, indices, loss, _ = vq.vector_quantize(leaf, codebook, channel_dim=1, backend=backend)
        assert quantized.stride() == variant.stride()
        rows = z.movedim(1, -1)
        assert indices.equal(reference.nearest(rows.reshape(-1, 12), codebook).view(rows.shape[:-1]))
        assert quantized.equal(codebook[indices].movedim(-1, 1))
        (quantized.square().sum() + loss).backward()
        expected = leaf.grad if expected is None else expected
        assert leaf.grad.equal(expected)


def test_axes_that_interleave_and_empty_slices(backend):
    """Layouts that are read by two strides, but whose like is not written by two."""
    interleaved = torch.randn(60).as_strided((2, 3, 2, 4), (12, 4, 6, 1))
    for z in (interleaved, torch.randn(4, 7, 6, 4)[:0, ::2, ::2], torch.randn(0, 5, 0, 4)[:, ::2]):
        leaf, codebook = z.detach().requires_grad_(), torch.randn(20, 4)
        quantized, indices, loss, _ = vq.vector_quantize(leaf, codebook, backend=backend)
        assert indices.equal(reference.nearest(z.reshape(-1, 4), codebook).view(z.shape[:-1]))
        assert quantized.equal(codebook[indices]) and bool(loss.isfinite())
        incoming = torch.randn(z.shape)
        (gradient,) = torch.autograd.grad(quantized, leaf, incoming)
        assert gradient.equal(incoming)


def test_batched_codebooks_have_gradients_of_their_own(backend):
    z, codebook = torch.randn(3, 60, 5, dtype=torch.float64), torch.randn(3, 9, 5, dtype=torch.float64)
    cotangents = cotangents_for(z)
    expected = gradients(reference.vector_quantize, z, codebook, cotangents, OUTPUTS)
    found = gradients(vq.vector_quantize, z, codebook, cotangents, OUTPUTS, backend=backend)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_double_backward_raises_clearly(backend):
    z, codebook = torch.randn(10, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    loss = vq.vector_quantize(z, codebook, backend=backend)[3]
    (grad,) = torch.autograd.grad(loss, z, create_graph=True)
    with pytest.raises(RuntimeError, match="vqkernels does not support double backward"):
        grad.sum().backward()


def test_bits_do_not_depend_on_threads(threads, cpu_kernels):
    z, codebook = ADVERSARIES["clustered"](5000, 60, 24)
    runs = []
    for count in (1, 2, 7, 2):
        threads(count)
        leaf, codes = z.clone().requires_grad_(), codebook.clone().requires_grad_()
        result = quantize_with_statistics(leaf, codes, backend="cpu")
        (result.quantized.square().sum() + result.codebook_loss + 0.25 * result.commitment_loss).backward()
        runs.append([*(t.detach() for t in result), leaf.grad, codes.grad])
    for run in runs[1:]:
        assert all(a.equal(b) for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("overload", ["default", "eager"])
def test_opcheck(overload, cpu_kernels):
    z, codebook, mask = torch.randn(2, 6, 5, 3), torch.randn(9, 6), torch.rand(2, 5, 3) < 0.8
    ops = {
        name: getattr(getattr(torch.ops.vqkernels, name), overload) for name in ("nearest", "quantize", "statistics")
    }
    variants = [z, z.to(memory_format=torch.channels_last), z.transpose(0, 2).contiguous().transpose(0, 2)]
    for x in variants:
        opcheck(ops["nearest"], (x, codebook, mask, 1, "euclidean", "exact"))
        opcheck(ops["quantize"], (x, codebook, mask, 1, "cosine", "fast", True))
    opcheck(ops["quantize"], (z, codebook, None, 1, "dot", "exact", False))
    opcheck(ops["quantize"], (z, torch.randn(2, 7, 6), mask, 1, "euclidean", "exact", True))
    _, indices, *_ = ops["quantize"](z, codebook, mask, 1, "euclidean", "exact", False)
    opcheck(ops["statistics"], (z, indices, 9, None, 1, False))
    backward = getattr(torch.ops.vqkernels.quantize_backward, overload)
    incoming = (torch.randn_like(z), torch.tensor(0.5), torch.tensor(0.25))
    for gradient, wanted in itertools.product(("straight_through", "rotation"), (True, False)):
        opcheck(backward, (*incoming, z, codebook, indices, 1, gradient, wanted))


def test_compiles_whole_with_dynamic_shapes(backend):
    torch._dynamo.reset()
    codebook = torch.randn(30, 8)

    def step(z, codebook, mask):
        quantized, indices, codebook_loss, commitment_loss = vq.vector_quantize(
            z, codebook, mask=mask, channel_dim=1, backend=backend
        )
        found = vq.nearest_code(z, codebook, channel_dim=1, backend=backend)
        counts, _ = vq.codebook_statistics(z, indices, 30, channel_dim=1, backend=backend)
        return quantized.square().sum() + codebook_loss + commitment_loss, indices, found, counts

    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    for batch, height in itertools.product((2, 3), (4, 6)):
        z, mask = torch.randn(batch, 8, height, 5), torch.rand(batch, height, 5) < 0.7
        results, grads = [], []
        for function in (step, compiled):
            leaf, codes = z.clone().requires_grad_(), codebook.clone().requires_grad_()
            out = function(leaf, codes, mask)
            out[0].backward()
            results.append(out)
            grads.append((leaf.grad, codes.grad))
        torch.testing.assert_close(results[0], results[1])
        torch.testing.assert_close(grads[0], grads[1])


def test_autocast_leaves_inputs_and_losses_alone(backend):
    z, codebook = torch.randn(50, 8), torch.randn(10, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        quantized, indices, loss, _ = vq.vector_quantize(z, codebook, backend=backend)
    assert quantized.dtype == torch.float32 and loss.dtype == torch.float32
    assert indices.equal(reference.nearest(z, codebook))


def test_one_dimensional_row(backend):
    codebook = torch.randn(5, 3)
    quantized, index, _, _ = vq.vector_quantize(codebook[4].clone(), codebook, backend=backend)
    assert index.shape == () and index == 4 and quantized.equal(codebook[4])


def test_the_raw_backward_refuses_what_would_read_outside(cpu_kernels):
    z, codebook = torch.randn(4, 3), torch.randn(5, 3)
    backward = torch.ops.vqkernels.quantize_backward.default
    one = torch.ones(())
    with pytest.raises(RuntimeError, match="indices hold a code out of range"):
        backward(z, one, one, z, codebook, torch.tensor([0, 1, 5, 2]), 1, "rotation", True)
    with pytest.raises(RuntimeError, match="grad_quantized must have z's dtype and shape"):
        backward(z[:2], one, one, z, codebook, torch.zeros(4, dtype=torch.int64), 1, "rotation", True)
    with pytest.raises(RuntimeError, match="gradient must be 'straight_through' or 'rotation', got 'none'"):
        backward(z, one, one, z, codebook, torch.zeros(4, dtype=torch.int64), 1, "none", True)
