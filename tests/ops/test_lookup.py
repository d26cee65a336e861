"""quantize_with_statistics(indices=...): what follows the search, for indices that are given."""

import pytest
import torch
from torch.library import opcheck

from vqkernels import reference
from vqkernels.ops.quantize import quantize_with_statistics
from vqkernels.verification.layouts import LAYOUTS

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def step(z, codebook, backend, **arguments):
    """Every output, and the gradients of all of them together."""
    z, codebook = z.detach().clone(memory_format=torch.preserve_format).requires_grad_(), codebook.clone()
    result = quantize_with_statistics(z, codebook.requires_grad_(), backend=backend, **arguments)
    weight = torch.linspace(-1, 1, z.numel()).reshape(z.shape).to(z.dtype)
    total = (result.quantized * weight).sum() + 0.3 * result.codebook_loss - 0.7 * result.commitment_loss
    return result, torch.autograd.grad(total, (z, codebook))


def same_bits(one, other):
    values = [[*x[0], *x[1]] for x in (one, other)]
    return all(a.nan_to_num(7).equal(b.nan_to_num(7)) for a, b in zip(*values, strict=True))


@pytest.mark.parametrize("gradient", ["straight_through", "rotation"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_indices_of_the_search_give_its_every_bit(layout, masked, gradient, backend):
    z, channel_dim, codebook, mask = LAYOUTS[layout](masked, torch.device("cpu"))
    arguments = {"channel_dim": channel_dim, "gradient": gradient}
    searched = step(z, codebook, backend, mask=mask, **arguments)
    indices = searched[0].indices
    assert same_bits(step(z, codebook, backend, indices=indices, **arguments), searched)
    if mask is not None:  # what stands under the mask is not looked at
        indices = torch.where(mask, indices, 5)
        assert same_bits(step(z, codebook, backend, indices=indices, mask=mask, **arguments), searched)


@pytest.mark.parametrize("code_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_other_indices_than_the_nearest(dtype, code_dtype, backend):
    z, codebook = torch.randn(257, 20).to(dtype), torch.randn(33, 20).to(code_dtype)
    indices = torch.randint(-1, 33, (257,))
    result, (grad_z, grad_codebook) = step(z, codebook, backend, indices=indices)
    kept = (indices >= 0)[:, None]
    expected = torch.where(kept, codebook[indices.clamp_min(0)], 0.0)
    assert result.quantized.equal(expected.to(dtype)) and result.indices.equal(indices)
    residual = torch.where(kept, z.double() - expected.double(), 0.0)
    elements = int(kept.sum()) * 20
    torch.testing.assert_close(result.codebook_loss.double(), residual.square().sum() / elements, rtol=1e-6, atol=0)
    counts, sums = reference.statistics(z, indices, 33)
    assert result.counts[0].equal(counts)
    torch.testing.assert_close(result.sums[0].double(), sums, rtol=1e-6, atol=1e-6)
    weight = torch.linspace(-1, 1, z.numel()).reshape(z.shape).to(dtype).double()
    exact = torch.where(kept, weight - 0.7 * 2 / elements * residual, 0.0)
    torch.testing.assert_close(grad_z.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-7)
    exact = torch.zeros(33, 20, dtype=torch.float64).index_add(0, indices[kept[:, 0]], -residual[kept[:, 0]])
    unit = torch.finfo(code_dtype).eps
    torch.testing.assert_close(grad_codebook.double(), 0.3 * 2 / elements * exact, rtol=2 * unit, atol=1e-7)


def test_a_bad_row_gets_its_given_code_and_touches_nothing_else(backend):
    z, codebook, indices = torch.randn(60, 5), torch.randn(7, 5), torch.randint(7, (60,))
    clean, (clean_gradient, _) = step(z, codebook, backend, indices=indices)
    z[4, 1], z[30] = torch.nan, torch.inf
    result, (grad_z, grad_codebook) = step(z, codebook, backend, indices=indices)
    assert result.quantized.equal(clean.quantized) and result.codebook_loss.isnan()
    assert result.counts.sum() == 58 and result.sums.isfinite().all() and grad_codebook.isfinite().all()
    others = ~torch.isin(torch.arange(60), torch.tensor([4, 30]))
    assert grad_z[[4, 30]].isnan().all() and grad_z[others].equal(clean_gradient[others])


def test_masked_rows_are_not_read(backend):
    z, codebook, indices = torch.randn(60, 5), torch.randn(7, 5), torch.randint(7, (60,))
    mask = torch.rand(60) < 0.5
    expected = step(z, codebook, backend, indices=indices, mask=mask)
    assert same_bits(
        step(torch.where(mask[:, None], z, torch.nan), codebook, backend, indices=indices, mask=mask), expected
    )
    assert expected[0].indices.equal(torch.where(mask, indices, -1))
    assert expected[0].quantized[~mask].eq(0).all() and expected[1][0][~mask].eq(0).all()


@pytest.mark.parametrize("bad", [-2, 7])
def test_indices_out_of_range_raise_on_the_cpu(bad, backend):
    with pytest.raises(RuntimeError, match="indices hold a code out of range"):
        quantize_with_statistics(
            torch.randn(3, 5), torch.randn(7, 5), indices=torch.tensor([0, bad, 1]), backend=backend
        )


def test_bad_input_is_one_sentence():
    z, codebook = torch.randn(3, 5), torch.randn(7, 5)
    with pytest.raises(TypeError, match=r"indices must be an int64 tensor, got torch.int32"):
        quantize_with_statistics(z, codebook, indices=torch.zeros(3, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"indices must have z's shape without channels, \[3\], got \[4\]"):
        quantize_with_statistics(z, codebook, indices=torch.zeros(4, dtype=torch.int64))


def test_the_given_indices_are_not_the_ones_returned(backend):
    indices = torch.tensor([0, 1, 2])
    result = quantize_with_statistics(torch.randn(3, 5), torch.randn(7, 5), indices=indices, backend=backend)
    indices.zero_()
    assert result.indices.tolist() == [0, 1, 2]


def test_bits_do_not_depend_on_threads(threads, cpu_kernels):
    z, codebook, indices = torch.randn(3, 24, 1700), torch.randn(60, 24), torch.randint(60, (3, 1700))
    runs = []
    for count in (1, 2, 7):
        threads(count)
        runs.append(step(z, codebook, "cpu", indices=indices, channel_dim=1))
    assert all(same_bits(run, runs[0]) for run in runs[1:])


@pytest.mark.parametrize("overload", ["default", "eager"])
def test_opcheck(overload, cpu_kernels):
    z, codebook, mask = torch.randn(2, 6, 5, 3), torch.randn(9, 6), torch.rand(2, 5, 3) < 0.8
    operator, indices = getattr(torch.ops.vqkernels.lookup, overload), torch.randint(-1, 9, (2, 5, 3))
    for x in (z, z.to(memory_format=torch.channels_last), z.transpose(0, 2).contiguous().transpose(0, 2)):
        opcheck(operator, (x, codebook, indices, mask, 1, True))
    opcheck(operator, (z, codebook, indices, None, 1, False))
    opcheck(operator, (z, torch.randn(2, 7, 6), indices.clamp_max(6), mask, 1, True))


def test_compiles_whole_with_dynamic_shapes(backend):
    torch._dynamo.reset()
    codebook = torch.randn(30, 8)

    def loss(z, codebook, indices, mask):
        result = quantize_with_statistics(
            z, codebook, indices=indices, mask=mask, channel_dim=1, gradient="rotation", backend=backend
        )
        return result.quantized.square().sum() + result.codebook_loss + result.commitment_loss + result.counts.sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    for batch, positions in ((2, 5), (3, 7)):
        z, indices = torch.randn(batch, 8, positions), torch.randint(30, (batch, positions))
        mask = torch.rand(batch, positions) < 0.7
        found, expected = (
            torch.autograd.grad(function(*leaves, indices, mask), leaves)
            for function in (compiled, loss)
            for leaves in [(z.clone().requires_grad_(), codebook.clone().requires_grad_())]
        )
        torch.testing.assert_close(found, expected)
