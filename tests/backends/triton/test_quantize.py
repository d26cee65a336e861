"""Lookup, squared error, statistics and gradients against the reference."""

import pytest
import torch
from backends.triton import hostile

from vqkernels import reference

triton_quantize = pytest.importorskip("vqkernels.backends.triton.quantize", reason="triton is not installed")

GRADIENTS = ["straight_through", "rotation"]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def forward(z, codebook, device, mask=None, statistics=True):
    view = None if mask is None else mask.to(device)[None, None]
    return triton_quantize.quantize(
        z.to(device)[None, None], codebook.to(device)[None], view, "euclidean", "exact", statistics
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "name", ["three dimensions", *hostile.slow(["gaussian", "257 dimensions", "one code", "scale 1e-42"])]
)
def test_forward_equals_the_reference(name, dtype, device):
    z, codebook = hostile.make(name, dtype)
    quantized, indices, error, counts, sums = forward(z, codebook, device)
    expected, expected_indices, loss, _ = reference.vector_quantize(z.double(), codebook.double())
    assert quantized.dtype == dtype
    assert torch.equal(quantized[0, 0].cpu(), expected.to(dtype))
    assert torch.equal(indices[0, 0].cpu(), expected_indices)
    assert error.dtype == torch.float64
    torch.testing.assert_close(float(error), float(loss) * z.numel(), rtol=1e-6, atol=1e-60)
    expected_counts, expected_sums = reference.statistics(z, expected_indices, len(codebook))
    assert torch.equal(counts[0].cpu(), expected_counts)
    torch.testing.assert_close(sums[0].cpu().double(), expected_sums, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("types", [(torch.bfloat16, torch.float32), (torch.float16, torch.float64)])
def test_output_is_rounded_once_to_the_type_of_z(types, device):
    z, codebook = (x.to(t) for x, t in zip(hostile.make("gaussian"), types, strict=True))
    quantized, indices, *_ = forward(z, codebook, device, statistics=False)
    assert torch.equal(quantized[0, 0].cpu(), codebook[indices[0, 0].cpu()].to(types[0]))


def test_statistics_are_empty_unless_wanted(device):
    *_, counts, sums = forward(*hostile.make("three dimensions"), device, statistics=False)
    assert counts.shape == (0,)
    assert sums.shape == (0,)


def test_poisoned_and_masked_rows(device):
    z, codebook = hostile.make("non-finite")
    mask = torch.ones(len(z), dtype=torch.bool)
    mask[20:] = False
    z[25] = float("nan")
    quantized, indices, error, counts, _ = forward(z, codebook, device, mask)
    assert error.isnan()
    assert (quantized[0, 0, 20:] == 0).all()
    assert (indices[0, 0, 20:] == -1).all()
    assert int(counts.sum()) == 17
    mask[[3, 7, 9]] = False
    quantized, _, error, _, _ = forward(z, codebook, device, mask)
    expected = reference.vector_quantize(z, codebook, mask=mask)
    assert torch.equal(quantized[0, 0].cpu(), expected[0])
    torch.testing.assert_close(float(error), float(expected[2]) * 17 * 12, rtol=1e-6, atol=0)


def test_a_given_index_beyond_the_codebook_makes_its_row_nan_and_nothing_else(device):
    z, codebook = (x.to(device) for x in hostile.make("three dimensions"))
    indices = torch.randint(len(codebook), (1, 1, len(z)), device=device)
    indices[0, 0, [4, 9]] = torch.tensor([len(codebook), 2**40], device=device)
    quantized, error, counts, sums = triton_quantize.lookup(z[None, None], codebook[None], indices, True)
    others = torch.ones(len(z), dtype=torch.bool, device=device)
    others[[4, 9]] = False
    assert quantized[0, 0, [4, 9]].isnan().all() and error.isnan()
    assert torch.equal(quantized[0, 0, others], codebook[indices[0, 0, others]])
    assert int(counts.sum()) == len(z) - 2 and sums.isfinite().all()
    one = torch.ones((), device=device)
    for gradient in GRADIENTS:
        grad_z, grad_codebook = triton_quantize.quantize_backward(
            z[None, None], one, one, z[None, None], codebook[None], indices, gradient, True
        )
        assert grad_z[0, 0, [4, 9]].isnan().all() and grad_z[0, 0, others].isfinite().all()
        assert grad_codebook.isfinite().all()


def test_no_rows(device):
    quantized, indices, error, counts, _ = forward(torch.zeros(0, 3), torch.zeros(4, 3), device)
    assert quantized.shape == (1, 1, 0, 3)
    assert indices.shape == (1, 1, 0)
    assert error == 0
    assert (counts == 0).all()


def test_layout_of_images_is_kept(device):
    images = torch.randn(2, 10, 9, device=device)
    z = images.view(2, 2, 5, 9).permute(0, 1, 3, 2)
    codebook = torch.randn(2, 20, 5, device=device)
    quantized, indices, *_ = triton_quantize.quantize(z, codebook, None, "euclidean", "exact", False)
    assert quantized.stride() == z.stride()
    for head in range(2):
        assert torch.equal(quantized[:, head], codebook[head][indices[:, head]])


def gradients(z, codebook, mask, incoming, device, dtype, gradient="straight_through"):
    """The kernel's (grad_z, grad_codebook) and those of autograd through the reference."""
    indices = reference.nearest(z, codebook, mask=mask)
    a, b = z.clone().requires_grad_(), codebook.clone().requires_grad_()
    quantized, _, codebook_loss, commitment_loss = reference.vector_quantize(a, b, mask=mask, gradient=gradient)
    total = (quantized * incoming[0]).sum() + codebook_loss * incoming[1] + commitment_loss * incoming[2]
    total.backward()
    got = triton_quantize.quantize_backward(
        incoming[0].to(device, dtype)[None, None], incoming[1].to(device), incoming[2].to(device),
        z.to(device, dtype)[None, None], codebook.to(device, dtype)[None], indices.to(device)[None, None],
        gradient, True,
    )  # fmt: skip
    return (got[0][0, 0].cpu(), got[1][0].cpu()), (a.grad, b.grad)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("alone", hostile.first([None, 0, 1, 2]))
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", hostile.first(["integer lattice", "gaussian", "257 dimensions"]))
def test_gradients_in_float64(name, masked, alone, gradient, device):
    z, codebook = hostile.make(name, torch.float64)
    mask = torch.rand(len(z)) < 0.6 if masked else None
    incoming = [torch.randn_like(z), torch.randn((), dtype=torch.float64), torch.randn((), dtype=torch.float64)]
    incoming = [x if alone in (None, i) else torch.zeros_like(x) for i, x in enumerate(incoming)]
    got, expected = gradients(z, codebook, mask, incoming, device, torch.float64, gradient)
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_in_narrow_types(dtype, gradient, device):
    z, codebook = (x.double() for x in hostile.make("three dimensions", dtype))
    incoming = [torch.randn_like(z).to(dtype).double(), torch.tensor(0.7), torch.tensor(-1.3)]
    got, expected = gradients(z, codebook, None, incoming, device, dtype, gradient)
    unit = torch.finfo(dtype).eps
    for x, y in zip(got, expected, strict=True):
        assert x.dtype == dtype
        torch.testing.assert_close(x.double(), y, rtol=2 * unit, atol=1e-7)


@pytest.mark.parametrize(("z_power", "code_power"), [(-900, 60), (900, 880), (-1000, -980), (0, -900)])
def test_the_rotation_scales_to_the_ends_of_float64(z_power, code_power, device):
    z, codebook = hostile.make("three dimensions", torch.float64)
    indices, incoming = reference.nearest(z, codebook), torch.randn_like(z)
    expected = gradient_by_rotation(incoming, z, codebook, indices, torch.device("cpu"), "reference")
    got = gradient_by_rotation(incoming, z * 2.0**z_power, codebook * 2.0**code_power, indices, device)
    torch.testing.assert_close(got, expected * 2.0 ** (code_power - z_power), rtol=1e-12, atol=0)


def gradient_by_rotation(incoming, z, codebook, indices, device, by="triton"):
    if by == "reference":
        step = torch.zeros_like(z, requires_grad=True)
        return torch.autograd.grad(reference.rotate(step, z, codebook[indices]), step, incoming)[0]
    zero = torch.zeros((), device=device, dtype=torch.float64)
    rows = [x.to(device)[None, None] for x in (incoming, z, indices)]
    return triton_quantize.quantize_backward(
        rows[0], zero, zero, rows[1], codebook.to(device)[None], rows[2], "rotation", False
    )[0][0, 0].cpu()


def test_rotation_of_zero_and_opposite_rows(device):
    z, codebook, incoming = torch.randn(4, 3).double(), torch.randn(4, 3).double(), torch.randn(4, 3).double()
    z[0], codebook[1] = 0, 0
    codebook[2] = -0.7 * z[2]
    indices = torch.arange(4)
    got = gradient_by_rotation(incoming, z, codebook, indices, device)
    assert got[:2].equal(incoming[:2])
    expected = gradient_by_rotation(incoming, z, codebook, indices, device, "reference")
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got[2].norm(), 0.7 * incoming[2].norm())


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_gradients_of_poisoned_and_masked_rows(gradient, device):
    z, codebook = hostile.make("non-finite")
    indices = reference.nearest(z, codebook)
    indices[20:] = -1
    grad_z, grad_codebook = triton_quantize.quantize_backward(
        torch.randn(1, 1, *z.shape, device=device), torch.tensor(1.0, device=device), torch.tensor(1.0, device=device),
        z.to(device)[None, None], codebook.to(device)[None], indices.to(device)[None, None], gradient, True,
    )  # fmt: skip
    poisoned = torch.tensor([3, 7, 9])
    assert grad_z[0, 0, poisoned].isnan().all()
    assert (grad_z[0, 0, 20:] == 0).all()
    others = [i for i in range(20) if i not in (3, 7, 9)]
    assert grad_z[0, 0, others].isfinite().all()
    used = indices[others].unique()
    assert grad_codebook[0, used].isfinite().all()
    unused = [k for k in range(len(codebook)) if k not in used.tolist()]
    assert (grad_codebook[0, unused] == 0).all()


def test_codebook_gradient_only_where_wanted(device):
    z, codebook = hostile.make("three dimensions")
    scalar = torch.tensor(1.0, device=device)
    indices = reference.nearest(z, codebook).to(device)
    z, codebook = z.to(device)[None, None], codebook.to(device)[None]
    expanded = torch.ones(1, 1, 1, 1, device=device).expand_as(z)
    grad_z, grad_codebook = triton_quantize.quantize_backward(
        expanded, scalar, scalar, z, codebook, indices[None, None], "straight_through", False
    )
    assert grad_codebook.shape == (0,)
    residual = z[0, 0].double() - codebook[0][indices].double()
    torch.testing.assert_close(grad_z[0, 0].double(), 1 + 2 * residual / z.numel(), rtol=1e-6, atol=1e-6)
