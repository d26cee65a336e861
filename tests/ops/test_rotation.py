"""gradient="rotation": against autograd of the plain formula, without direction, at extreme norms, in every layout."""

import itertools

import pytest
import torch

import vqkernels as vq
from vqkernels import reference
from vqkernels.ops.quantize import quantize_with_statistics
from vqkernels.verification.layouts import LAYOUTS, flat, flat_rows

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def gradients(function, z, codebook, incoming, **arguments):
    """Gradients of all three outputs together; `incoming` is of quantized."""
    z, codebook = z.clone().requires_grad_(), codebook.clone().requires_grad_()
    quantized, _, codebook_loss, commitment_loss = function(z, codebook, gradient="rotation", **arguments)
    total = (quantized * incoming).sum() - 0.7 * codebook_loss + 1.3 * commitment_loss
    return torch.autograd.grad(total, (z, codebook))


def rotated(incoming, z, codebook, backend, **arguments):
    """The gradient of quantized alone."""
    z = z.clone().requires_grad_()
    quantized = vq.vector_quantize(z, codebook, gradient="rotation", backend=backend, **arguments)[0]
    return torch.autograd.grad(quantized, z, incoming)[0]


def turned(incoming, z, codes):
    """The transpose of `reference.rotate`, by autograd."""
    step = torch.zeros_like(z, dtype=torch.float64, requires_grad=True)
    return torch.autograd.grad(reference.rotate(step, z, codes), step, incoming.double())[0]


def test_the_reference_is_a_rotation_and_a_scaling_that_takes_z_to_its_code():
    z, codes = torch.randn(50, 6, dtype=torch.float64), torch.randn(50, 6, dtype=torch.float64)
    torch.testing.assert_close(reference.rotate(z, z, codes), codes)
    basis = torch.eye(6, dtype=torch.float64)
    for row, code in zip(z, codes, strict=True):
        matrix = reference.rotate(basis, row.expand(6, 6), code.expand(6, 6)) * (row.norm() / code.norm())
        torch.testing.assert_close(matrix @ matrix.T, basis)
        torch.testing.assert_close(matrix.det(), torch.ones((), dtype=torch.float64))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dim", [1, 2, 7, 64, 131])
def test_gradients_equal_the_reference_in_float64(dim, masked, backend):
    z, codebook = torch.randn(150, dim, dtype=torch.float64), torch.randn(20, dim, dtype=torch.float64)
    mask = torch.rand(150) < 0.7 if masked else None
    incoming = torch.randn_like(z)
    expected = gradients(reference.vector_quantize, z, codebook, incoming, mask=mask)
    found = gradients(vq.vector_quantize, z, codebook, incoming, mask=mask, backend=backend)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(layout, masked, backend):
    z, channel_dim, codebook, mask = LAYOUTS[layout](masked, torch.device("cpu"))
    batched = codebook.dim() == 3
    incoming = torch.randn(z.shape)
    found = rotated(incoming, z, codebook, backend, mask=mask, channel_dim=channel_dim)
    kept = None if mask is None else flat_rows(mask, batched)
    rows = flat(z, channel_dim, batched).detach().double().requires_grad_()
    quantized = reference.vector_quantize(rows, codebook.double(), mask=kept, gradient="rotation")[0]
    (expected,) = torch.autograd.grad(quantized, rows, flat(incoming, channel_dim, batched).double())
    torch.testing.assert_close(flat(found, channel_dim, batched).double(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_is_float64_rounded_once(dtype, backend):
    z, codebook = torch.randn(100, 12).to(dtype), torch.randn(10, 12)
    incoming = torch.randn(100, 12).to(dtype)
    found = rotated(incoming, z, codebook, backend)
    exact = turned(incoming, z, codebook[reference.nearest(z, codebook)])
    torch.testing.assert_close(found.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_forward_value_is_exactly_the_code(dtype, backend):
    z, codebook = (1e3 * torch.randn(100, 12)).to(dtype).requires_grad_(), torch.randn(10, 12)
    results = [
        vq.vector_quantize(z, codebook, gradient=gradient, backend=backend)
        for gradient in ("straight_through", "rotation")
    ]
    assert all(a.equal(b) for a, b in zip(*results, strict=True))
    assert results[1][0].equal(codebook[results[1][1]].to(dtype))


def test_without_a_direction_the_gradient_goes_straight_through(backend):
    """Peers return 0 for a zero input and pass no gradient back from a zero code."""
    z, codebook = torch.randn(6, 4), torch.cat([torch.zeros(1, 4), 10 + torch.randn(3, 4)])
    z[0], z[1] = 0, 9.5  # z is zero; neither is; the others lie nearest to the zero code
    leaf = z.clone().requires_grad_()
    quantized, indices, *_ = vq.vector_quantize(leaf, codebook[1:], gradient="rotation", backend=backend)
    incoming = torch.randn_like(z)
    (found,) = torch.autograd.grad(quantized, leaf, incoming)
    assert quantized[0].equal(codebook[1:][indices[0]]) and found[0].equal(incoming[0])
    assert not found[1].equal(incoming[1])
    found = rotated(incoming, z, codebook, backend)
    assert found[2:].equal(incoming[2:]) and not found[1].equal(incoming[1])


@pytest.mark.parametrize("scale", [1.0, 0.3, 7.0])
def test_opposite_rows_are_reflected(scale, backend):
    """A single code makes the nearest one lie anywhere. Opposite to within rounding counts as opposite."""
    z = torch.randn(5, dtype=torch.float64)
    rows = torch.stack([z, z * 3, z * 2.0**40, z + 1e-16 * torch.randn(5)])
    incoming, codebook = torch.randn_like(rows), -scale * z[None]
    found = rotated(incoming, rows, codebook, backend)
    u = z / z.norm()
    expected = incoming - 2 * (incoming @ u)[:, None] * u
    expected = expected * (codebook.norm() / rows.norm(dim=1, keepdim=True))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("z_power", "code_power"), [(-900, 60), (900, 880), (-1000, -980), (0, -900), (-1070, -1000)])
def test_norms_at_the_ends_of_float64(z_power, code_power, backend):
    """Scaling z and the code by powers of two scales the gradient by their ratio, bit for bit where nothing rounds."""
    z, codes = torch.randn(40, 5, dtype=torch.float64), torch.randn(1, 5, dtype=torch.float64)
    z = (z * 4).round() / 4 + 0.25  # few bits, which survive as subnormal numbers
    incoming = torch.randn_like(z)
    expected = rotated(incoming, z, codes, backend)
    found = rotated(incoming, scaled(z, z_power), scaled(codes, code_power), backend)
    torch.testing.assert_close(found, scaled(expected, code_power - z_power), rtol=1e-12, atol=0)


def scaled(x, power):
    """x · 2^power in two exact steps."""
    return x * 2.0 ** (power // 2) * 2.0 ** (power - power // 2)


def test_float32_at_its_ends(backend):
    z, codes = torch.randn(40, 5) * 1e-37, torch.randn(1, 5) * 1e37
    incoming = torch.randn_like(z) * 1e-37
    found = rotated(incoming, z, codes, backend)
    torch.testing.assert_close(found.double(), turned(incoming, z, codes.expand(40, 5)), rtol=1e-6, atol=0)
    assert found.abs().max() > 1e35


def test_a_ratio_beyond_float64_leaves_zero_gradients_alone(backend):
    z, codes = torch.full((3, 4), 1e-300, dtype=torch.float64), torch.full((1, 4), 1e300, dtype=torch.float64)
    assert rotated(torch.zeros_like(z), z, codes, backend).eq(0).all()


def test_bad_and_masked_rows(backend):
    z, codebook = torch.randn(60, 6), torch.randn(8, 6)
    incoming = torch.randn_like(z)
    clean = rotated(incoming, z, codebook, backend)
    z[3, 1], z[9, 0], z[20:30] = torch.nan, torch.inf, torch.nan
    mask = torch.ones(60, dtype=torch.bool)
    mask[20:30] = False
    found = rotated(incoming, z, codebook, backend, mask=mask)
    assert found[[3, 9]].isnan().all() and found[~mask].eq(0).all()
    others = mask.clone()
    others[[3, 9]] = False
    assert found[others].equal(clean[others])


def test_bits_do_not_depend_on_threads_or_layout(threads, cpu_kernels):
    z, codebook, incoming = torch.randn(3, 20, 50, 40), torch.randn(60, 20), torch.randn(3, 20, 50, 40)
    runs = []
    for count in (1, 2, 7):
        threads(count)
        runs.append(rotated(incoming, z, codebook, "cpu", channel_dim=1))
        rows = (x.movedim(1, -1).contiguous() for x in (incoming, z))
        runs.append(rotated(*rows, codebook, "cpu").movedim(-1, 1))
    assert all(run.equal(runs[0]) for run in runs[1:])


def test_compiles_whole_with_dynamic_shapes(backend):
    torch._dynamo.reset()
    codebook = torch.randn(2, 30, 8)

    def step(z, codebook):
        result = quantize_with_statistics(z, codebook, channel_dim=1, gradient="rotation", backend=backend)
        return result.quantized.square().sum() + result.codebook_loss + result.commitment_loss

    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    for positions, batch in itertools.product((4, 6), (2, 3)):
        z = torch.randn(2, 8, batch, positions)
        found, expected = (
            torch.autograd.grad(function(*leaves), leaves)
            for function in (compiled, step)
            for leaves in [(z.clone().requires_grad_(), codebook.clone().requires_grad_())]
        )
        torch.testing.assert_close(found, expected)


def test_an_unknown_gradient_is_refused():
    with pytest.raises(ValueError, match=r"gradient must be one of 'straight_through', 'rotation', got 'ste'"):
        vq.vector_quantize(torch.randn(3, 2), torch.randn(4, 2), gradient="ste")
