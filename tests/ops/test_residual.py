"""residual_vector_quantize: every level's index under the contract, sums, gradients, bad rows, layouts, determinism."""

import itertools

import pytest
import torch
from torch.library import opcheck

import vqkernels as vq
from vqkernels import reference
from vqkernels.nn.lookup import sum_codes
from vqkernels.ops.quantization import residual_quantize_backward
from vqkernels.ops.residual import residual_quantize, residual_quantize_with_statistics
from vqkernels.verification.adversaries import ADVERSARIES

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
OUTPUTS = ["quantized", "codebook_losses", "commitment_losses"]


def stack(levels, size, dim, dtype=torch.float32, shrink=0.6):
    """Codebooks of which the later ones are finer."""
    scale = shrink ** torch.arange(levels, dtype=torch.float64)
    return (torch.randn(levels, size, dim, dtype=torch.float64) * scale[:, None, None]).to(dtype)


def cotangents_for(z, levels):
    wide = torch.float64 if z.dtype == torch.float64 else torch.float32
    return {
        "quantized": torch.randn(z.shape, dtype=z.dtype),
        "codebook_losses": torch.randn(levels, dtype=wide),
        "commitment_losses": torch.randn(levels, dtype=wide),
    }


def gradients(function, z, codebooks, cotangents, which, **arguments):
    z, codebooks = z.clone().requires_grad_(), codebooks.clone().requires_grad_()
    results = function(z, codebooks, **arguments)
    named = dict(zip(["quantized", "indices", "codebook_losses", "commitment_losses"], results, strict=True))
    sum((named[name] * cotangents[name]).sum() for name in which).backward()
    zero = torch.zeros_like
    return (zero(z) if z.grad is None else z.grad), (zero(codebooks) if codebooks.grad is None else codebooks.grad)


def statistics_of(z, codebooks, indices):
    """Counts and sums of every level by loops."""
    residual = z.detach().to(torch.float64 if z.dtype == torch.float64 else torch.float32)
    counts, sums = [], []
    for q, codes in enumerate(codebooks):
        c, s = reference.statistics(residual, indices[:, q], len(codes))
        counts.append(c), sums.append(s.to(residual.dtype))
        kept = (indices[:, q] >= 0)[:, None]
        step = (residual.double() - codes[indices[:, q].clamp_min(0)].double()).to(residual.dtype)
        residual = torch.where(kept, step, residual)
    return torch.stack(counts), torch.stack(sums)


@pytest.mark.parametrize("metric", ["euclidean", "dot", "cosine"])
@pytest.mark.parametrize("code_dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_indices_and_statistics_are_the_references(dtype, code_dtype, metric, backend):
    z, codebooks = torch.randn(150, 7).to(dtype), stack(4, 33, 7, code_dtype)
    levels = torch.randint(0, 5, (150,))
    for passed in (None, levels):
        expected = reference.residual_vector_quantize(z, codebooks, levels=passed, metric=metric)
        found = residual_quantize_with_statistics(z, codebooks, levels=passed, metric=metric, backend=backend)
        assert found.indices.equal(expected[1]) and found.indices.shape == (150, 4)
        assert found.quantized.dtype == dtype and found.quantized.equal(expected[0])
        for loss in (found.codebook_losses[0], found.commitment_losses[0]):
            torch.testing.assert_close(loss.double(), expected[2].double(), rtol=2e-6, atol=1e-12)
        counts, sums = statistics_of(z, codebooks, expected[1])
        assert found.counts[0].equal(counts) and found.sums[0].equal(sums)


@pytest.mark.parametrize("gradient", ["straight_through", "rotation"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("which", [[name] for name in OUTPUTS] + [OUTPUTS], ids="+".join)
def test_gradients_equal_the_reference_in_float64(which, masked, gradient, backend):
    z, codebooks = torch.randn(200, 5, dtype=torch.float64), stack(3, 20, 5, torch.float64)
    levels = torch.randint(0, 4, (200,)) if masked else None
    arguments = dict(levels=levels, gradient=gradient)
    cotangents = cotangents_for(z, 3)
    expected = gradients(reference.residual_vector_quantize, z, codebooks, cotangents, which, **arguments)
    found = gradients(vq.residual_vector_quantize, z, codebooks, cotangents, which, backend=backend, **arguments)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_the_commitment_gradient_of_deep_levels_is_not_zero(backend):
    """encodec's is: it applies the straight-through estimator level by level."""
    z, codebooks = torch.randn(50, 4, dtype=torch.float64), stack(3, 8, 4, torch.float64)
    for level in range(3):
        leaf = z.clone().requires_grad_()
        vq.residual_vector_quantize(leaf, codebooks, backend=backend)[3][level].backward()
        assert leaf.grad.abs().min() > 0
    fixed = z[:10].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: vq.residual_vector_quantize(x, codebooks, backend=backend)[3], fixed)
    books = codebooks.clone().requires_grad_()  # of one level: deeper residuals depend on its codes without a gradient
    assert torch.autograd.gradcheck(lambda e: vq.residual_vector_quantize(z[:10], e, backend=backend)[2], books[:1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_in_every_dtype_are_those_of_float64_rounded_once(dtype, backend):
    z, codebooks = torch.randn(100, 12).to(dtype), stack(3, 10, 12)
    cotangents = cotangents_for(z, 3)
    exact = gradients(
        reference.residual_vector_quantize,
        z.double(),
        codebooks.double(),
        {name: value.double() for name, value in cotangents.items()},
        OUTPUTS,
    )
    found = gradients(vq.residual_vector_quantize, z, codebooks, cotangents, OUTPUTS, backend=backend)
    torch.testing.assert_close(found[0].double(), exact[0], rtol=torch.finfo(dtype).eps, atol=1e-7)
    torch.testing.assert_close(found[1].double(), exact[1], rtol=3e-6, atol=1e-6)


@pytest.mark.parametrize("name", ADVERSARIES)
def test_adversarial_residuals(name, backend):
    """Near-ties, repeated codes, huge norms and bad rows at every level: by data first, by residuals after."""
    z, codebook = ADVERSARIES[name](64, 40, 6)
    codebooks = torch.stack([codebook, codebook.flip(0), codebook * 0.5])
    _, indices, _, _ = vq.residual_vector_quantize(z, codebooks, backend=backend)
    assert indices.equal(reference.residual_vector_quantize(z, codebooks)[1])


def test_rounded_residuals_that_nearly_tie(backend):
    """Codes at equal distances of what is left after a rounding: the rounding of r, not the real number, decides."""
    z = (1 + torch.arange(200.0)[:, None] * 2**-20) * torch.tensor([1.0, 3.0])
    first = torch.tensor([[1.0, 3.0], [1.0 + 2**-13, 3.0 - 2**-13]])
    second = torch.tensor([[2**-12, 0.0], [-(2**-12), 0.0], [0.0, 2**-12], [0.0, 2**-12]])
    codebooks = torch.stack([first.repeat(2, 1), second, -second])
    _, indices, _, _ = vq.residual_vector_quantize(z, codebooks, backend=backend)
    assert indices.equal(reference.residual_vector_quantize(z, codebooks)[1])
    assert (indices[:, 1] != 3).all()  # never the second of two equal codes


def test_bad_rows_stay_apart(backend):
    z, codebooks = torch.randn(40, 6), stack(3, 12, 6)
    z[3, 2], z[7, 0], z[9] = torch.nan, torch.inf, 3e38
    codebooks[1, 4] = torch.nan
    codebooks[2, 0, 1] = -torch.inf
    leaf, books = z.clone().requires_grad_(), codebooks.clone().requires_grad_()
    quantized, indices, codebook_losses, commitment_losses = vq.residual_vector_quantize(leaf, books, backend=backend)
    assert indices.equal(reference.residual_vector_quantize(z, codebooks)[1])
    assert indices[[3, 7]].eq(0).all() and quantized[3].equal(codebooks[0, 0] + codebooks[1, 0] + codebooks[2, 0])
    assert not (indices[:, 1] == 4).any() and codebook_losses.isnan().all() and commitment_losses.isnan().all()
    (quantized.sum() + codebook_losses.sum() + commitment_losses.sum()).backward()
    bad = torch.zeros(40, dtype=torch.bool)
    bad[[3, 7]] = True
    assert leaf.grad[bad].isnan().all() and leaf.grad[~bad].isfinite().all()
    good = vq.residual_vector_quantize(z[~bad], codebooks.clone().requires_grad_(), backend=backend)
    assert books.grad.isfinite().all() and good[1].equal(indices[~bad])
    counts = residual_quantize_with_statistics(z, codebooks, backend=backend).counts
    assert counts.sum(-1).tolist() == [[38, 38, 38]]


def test_a_row_that_overflows_on_its_way(backend):
    z, codebooks = torch.full((4, 2), 3e38), torch.full((2, 3, 2), -3e38)
    z[1:] = 1.0
    leaf, books = z.clone().requires_grad_(), codebooks.clone().requires_grad_()
    _, indices, losses, _ = vq.residual_vector_quantize(leaf, books, backend=backend)
    found = residual_quantize_with_statistics(z, codebooks, backend=backend)
    assert indices.eq(0).all() and found.counts[0, :, 0].tolist() == [4, 3]
    assert not losses[0].isnan() and losses[1].isnan()
    losses[0].backward()
    assert leaf.grad[0].isnan().all()  # it is not finite at a level that it passes


def test_masked_rows_and_levels_not_passed(backend):
    z, codebooks = torch.randn(30, 5), stack(3, 9, 5)
    mask = torch.arange(30) % 3 > 0
    z[~mask] = torch.nan
    levels = torch.arange(30) % 4
    leaf, books = z.clone().requires_grad_(), codebooks.clone().requires_grad_()
    results = vq.residual_vector_quantize(leaf, books, mask=mask, levels=levels, backend=backend)
    passed = torch.where(mask, levels, 0)
    assert (results[1] >= 0).equal(torch.arange(3) < passed[:, None])
    assert results[0][passed == 0].eq(0).all() and results[0].isfinite().all()
    sum(x.sum() for x in (results[0], results[2], results[3])).backward()
    assert leaf.grad[passed == 0].eq(0).all() and leaf.grad.isfinite().all() and books.grad.isfinite().all()
    alone = vq.residual_vector_quantize(z[passed == 2], codebooks[:2], backend=backend)
    assert alone[0].equal(results[0][passed == 2]) and alone[1].equal(results[1][passed == 2, :2])


@pytest.mark.parametrize("shape", [(0, 4), (3, 0, 4)])
def test_no_rows(shape, backend):
    leaf, books = torch.empty(shape, requires_grad=True), stack(2, 3, 4).requires_grad_()
    quantized, indices, codebook_losses, commitment_losses = vq.residual_vector_quantize(leaf, books, backend=backend)
    assert quantized.shape == shape and indices.shape == (*shape[:-1], 2)
    assert codebook_losses.eq(0).all() and commitment_losses.eq(0).all()
    (quantized.sum() + codebook_losses.sum()).backward()
    assert books.grad.eq(0).all()
    result = residual_quantize_with_statistics(leaf, books, backend=backend)
    assert result.counts.eq(0).all() and result.sums.eq(0).all()


@pytest.mark.parametrize("size,levels,dim", [(1, 1, 1), (1, 3, 5), (5, 1, 3), (64, 9, 2), (700, 2, 17)])
def test_odd_sizes(size, levels, dim, backend):
    z, codebooks = torch.randn(301, dim), stack(levels, size, dim)
    found = vq.residual_vector_quantize(z, codebooks, backend=backend)
    expected = reference.residual_vector_quantize(z, codebooks)
    assert found[1].equal(expected[1]) and found[0].equal(expected[0])
    one = vq.vector_quantize(z, codebooks[0], backend=backend)
    assert one[1].equal(found[1][:, 0]) and (levels > 1 or one[0].equal(found[0]))


@pytest.mark.parametrize("channel_dim", [1, -1])
def test_layouts_and_views_give_the_same_bits(channel_dim, backend):
    rows, codebooks = torch.randn(6, 10, 8), stack(3, 20, 8)
    flat = gradients_and_values(rows, codebooks, -1, backend)
    if channel_dim == 1:
        views = [rows.transpose(1, 2), rows.transpose(1, 2).contiguous()]
    else:
        views = [rows.transpose(0, 1).contiguous().transpose(0, 1), rows.repeat(1, 1, 2)[..., ::2].contiguous()]
        views[1] = torch.stack([rows, rows + 1], -1)[..., 0]  # channels two apart
        views.append(rows.unsqueeze(2).expand(6, 10, 1, 8))
    for view in views:
        quantized, indices, losses, grad, grad_books = gradients_and_values(view, codebooks, channel_dim, backend)
        assert quantized.shape == view.shape
        assert quantized.movedim(channel_dim, -1).reshape(rows.shape).equal(flat[0])
        assert indices.reshape(flat[1].shape).equal(flat[1]) and losses.equal(flat[2])
        assert grad.movedim(channel_dim, -1).reshape(rows.shape).equal(flat[3]) and grad_books.equal(flat[4])


def gradients_and_values(z, codebooks, channel_dim, backend):
    leaf, books = z.detach().clone(memory_format=torch.preserve_format).requires_grad_(), codebooks.clone()
    books.requires_grad_()
    quantized, indices, losses, commitment = vq.residual_vector_quantize(
        leaf, books, channel_dim=channel_dim, backend=backend
    )
    (quantized.square().sum() + losses.sum() + commitment.sum()).backward()
    return quantized.detach(), indices, losses.detach(), leaf.grad, books.grad


def test_batched_stacks_are_independent_problems(backend):
    z, codebooks = torch.randn(3, 4, 5, 6), torch.stack([stack(2, 11, 6) for _ in range(3)])
    levels = torch.randint(0, 3, (3, 4, 5))
    result = residual_quantize_with_statistics(z, codebooks, levels=levels, backend=backend)
    assert result.codebook_losses.shape == (3, 2) and result.counts.shape == (3, 2, 11)
    for head in range(3):
        one = residual_quantize_with_statistics(z[head], codebooks[head], levels=levels[head], backend=backend)
        for ours, alone in zip(result, one, strict=True):
            assert ours[head].equal(alone.view(ours[head].shape))
    books = codebooks.clone().requires_grad_()
    leaf = z.clone().requires_grad_()
    out = vq.residual_vector_quantize(leaf, books, levels=levels, backend=backend)
    (out[0].sum() + (out[2] * torch.arange(6.0).view(3, 2)).sum() + out[3].sum()).backward()
    for head in range(3):
        book, one = codebooks[head].clone().requires_grad_(), z[head].clone().requires_grad_()
        part = vq.residual_vector_quantize(one, book, levels=levels[head], backend=backend)
        weight = torch.arange(6.0).view(3, 2)[head]
        (part[0].sum() + (part[2] * weight).sum() + part[3].sum()).backward()
        assert leaf.grad[head].equal(one.grad) and books.grad[head].equal(book.grad)


def test_one_codebook_for_all_levels_is_expanded_and_gets_the_sum_of_the_gradients(backend):
    z, codebook = torch.randn(60, 4), torch.randn(10, 4)
    shared, copies = codebook.clone().requires_grad_(), codebook.expand(3, -1, -1).clone().requires_grad_()
    for books in (shared.expand(3, -1, -1), copies):
        out = vq.residual_vector_quantize(z, books, backend=backend)
        out[2].sum().backward()
    torch.testing.assert_close(shared.grad, copies.grad.sum(0))


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_decoding_repeats_the_sum_bit_for_bit(dtype, backend):
    z, codebooks = torch.randn(500, 16).to(dtype), stack(6, 32, 16)
    levels = torch.randint(0, 7, (500,))
    quantized, indices, _, _ = vq.residual_vector_quantize(z, codebooks, levels=levels, backend=backend)
    assert sum_codes(codebooks, indices).to(dtype).equal(quantized)


def test_neither_threads_nor_batch_splits_change_a_bit(threads, cpu_kernels):
    z, codebooks = torch.randn(3000, 24), stack(4, 200, 24)
    runs = []
    for number in (1, 2, 7):
        threads(number)
        result = residual_quantize_with_statistics(z, codebooks, backend="cpu")
        runs.append([*result, *gradients_and_values(z, codebooks, -1, "cpu")])
    for other in runs[1:]:
        assert all(a.equal(b) for a, b in zip(runs[0], other, strict=True))
    parts = [vq.residual_vector_quantize(part, codebooks, backend="cpu")[:2] for part in z.split([1, 31, 900, 2068])]
    for place in (0, 1):
        assert torch.cat([part[place] for part in parts]).equal(runs[0][place])


def test_backends_agree_to_the_bit(cpu_kernels):
    z, codebooks = torch.randn(1000, 32), stack(5, 128, 32)
    ours, theirs = (residual_quantize_with_statistics(z, codebooks, backend=name) for name in ("cpu", "eager"))
    for name in ("quantized", "indices", "counts", "sums"):
        assert getattr(ours, name).equal(getattr(theirs, name)), name


def test_opcheck(backend):
    z, codebooks = torch.randn(4, 6, 5), torch.stack([stack(2, 7, 6)] * 4)
    levels = torch.randint(0, 3, (4, 5))
    for operation in (residual_quantize.overloads[name] for name in ("cpu", "eager")):
        for statistics, passed in itertools.product((True, False), (None, levels)):
            opcheck(operation, (z, codebooks, passed, 1, "euclidean", "exact", statistics))
    indices = torch.randint(-1, 7, (4, 5, 2))
    indices[..., 1] = torch.where(indices[..., 0] < 0, -1, indices[..., 1])
    losses = torch.randn(4, 2)
    for operation in (residual_quantize_backward.overloads[name] for name in ("cpu", "eager")):
        for wanted in (True, False):
            opcheck(operation, (z, losses, losses, z, codebooks, indices, 1, "straight_through", wanted))


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_whole_with_dynamic_shapes(compiler, backend):
    torch._dynamo.reset()

    def call(z, codebooks, mask):
        return vq.residual_vector_quantize(z, codebooks, mask=mask, channel_dim=1, backend=backend)

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=compiler)
    for batch, time in ((2, 5), (3, 7), (4, 9)):
        z, codebooks, mask = torch.randn(batch, 6, time), stack(3, 8, 6), torch.rand(batch, time) < 0.7
        runs = []
        for function in (call, compiled):
            leaf, books = z.clone().requires_grad_(), codebooks.clone().requires_grad_()
            out = function(leaf, books, mask)
            (out[0].square().sum() + out[2].sum() + out[3].sum()).backward()
            runs.append([*out, leaf.grad, books.grad])
        for one, other in zip(*runs, strict=True):
            torch.testing.assert_close(one, other)


def test_double_backward_is_refused(backend):
    leaf = torch.randn(5, 3, requires_grad=True)
    loss = vq.residual_vector_quantize(leaf, stack(2, 4, 3), backend=backend)[3].sum()
    (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="residual_vector_quantize is differentiable only once"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    "change,error,message",
    [
        (dict(codebooks=torch.randn(4, 3)), ValueError, r"codebooks must be \(Q, K, D\).*got \[4, 3\]"),
        (dict(codebooks=torch.randn(0, 4, 3)), ValueError, "at least one level"),
        (dict(codebooks=torch.randn(2, 4, 5)), ValueError, "5 channels, but z"),
        (dict(levels=torch.ones(5)), TypeError, "levels must be an int64 tensor, got torch.float32"),
        (dict(levels=torch.ones(4, dtype=torch.int64)), ValueError, r"levels must have z's shape .*\[5\], got \[4\]"),
        (dict(mask=torch.ones(4, dtype=torch.bool)), ValueError, r"mask must have z's shape"),
        (dict(gradient="none"), ValueError, "gradient must be one of"),
    ],
)
def test_bad_input_is_one_clear_sentence(change, error, message):
    arguments = dict(z=torch.randn(5, 3), codebooks=torch.randn(2, 4, 3)) | change
    with pytest.raises(error, match=message):
        vq.residual_vector_quantize(arguments.pop("z"), arguments.pop("codebooks"), **arguments)


def test_indices_out_of_range_are_refused_in_the_backward_operator(cpu_kernels):
    z, books, losses = torch.randn(3, 2), torch.randn(2, 4, 2), torch.zeros(1, 2)
    for bad in (4, -2):
        indices = torch.full((3, 2), bad)
        with pytest.raises(RuntimeError, match="indices must be int64 codes"):
            residual_quantize_backward.overloads["cpu"](
                z, losses, losses, z, books, indices, 1, "straight_through", True
            )
