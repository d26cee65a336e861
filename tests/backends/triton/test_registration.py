"""The kernels behind torch's dispatcher, under a namespace of the test's own, with the package's schemas.

The package's own fallback, which takes the same arguments, says what must come out: shapes, strides and values.
"""

import pytest
import torch

pytest.importorskip("triton")

from backends.triton import hostile

from vqkernels.backends import table
from vqkernels.backends import triton as backend
from vqkernels.backends.eager import quantize as eager

NAMESPACE = "vqkernels_triton_test"
CODES, DIM, LEVELS = 9, 6, 3


@pytest.fixture(scope="module")
def operators():
    definitions = torch.library.Library(NAMESPACE, "DEF")
    for name, _ in table.functions("triton"):
        schema = str(getattr(torch.ops.vqkernels, name).default._schema)
        definitions.define(schema.removeprefix("vqkernels::"))
    implementations = table.register("triton", NAMESPACE, "CUDA" if torch.cuda.is_available() else "CPU")
    yield getattr(torch.ops, NAMESPACE)
    del implementations, definitions


# name -> (z, channel_dim, heads or None)
LAYOUTS = {
    "rows": lambda: (torch.randn(20, DIM), 1, None),
    "images, channels first": lambda: (torch.randn(2, DIM, 3, 4), 1, None),
    "images, channels last": lambda: (torch.randn(2, 3, 4, DIM), 3, None),
    "channels-last memory": lambda: (torch.randn(2, DIM, 3, 4).to(memory_format=torch.channels_last), 1, None),
    "heads": lambda: (torch.randn(2, 11, DIM), 2, 2),
    "heads, channels first": lambda: (torch.randn(2, 3, DIM, 5), 2, 2),
    "one row": lambda: (torch.randn(DIM), 0, None),
    "no rows": lambda: (torch.randn(0, DIM, 3), 1, None),
    "every second row": lambda: (torch.randn(20, DIM)[::2], 1, None),
    "every second channel": lambda: (torch.randn(3, 2 * DIM, 5)[:, ::2], 1, None),
    "one row expanded": lambda: (torch.randn(1, DIM).expand(7, DIM), 1, None),
    # z is viewed with two strides, but the dense tensor of the same order of axes cannot be
    "interleaved axes": lambda: (torch.randn(40).as_strided((2, 3, DIM), (6, 2, 3)), 2, None),
    "axes that cannot be merged": lambda: (torch.randn(4, 3, 2, DIM).permute(2, 1, 0, 3), 3, None),
}
QUICK = ["rows", "images, channels first", "interleaved axes"]


def same(found, expected):
    """Equal where the contract fixes every bit, close where a sum may be rounded differently; equal strides always."""
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    significant = [axis for axis in range(found.dim()) if found.shape[axis] > 1]
    assert [found.stride(a) for a in significant] == [expected.stride(a) for a in significant]
    if expected.is_floating_point():
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6, equal_nan=True)
    else:
        assert torch.equal(found, expected)


def inputs(layout, masked, device):
    """z, its channel axis, a codebook, and a mask under which some rows are poisoned."""
    z, channel_dim, heads = LAYOUTS[layout]()
    codebook = torch.randn(CODES, DIM) if heads is None else torch.randn(heads, CODES, DIM)
    rows = [size for axis, size in enumerate(z.shape) if axis != channel_dim]
    mask = torch.rand(rows) < 0.6 if masked else None
    if mask is not None and layout not in ("one row expanded", "interleaved axes"):  # their rows share memory
        z.masked_fill_(~mask.unsqueeze(channel_dim), torch.nan)
    return z.to(device), channel_dim, codebook.to(device), None if mask is None else mask.to(device)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("layout", [*QUICK, *hostile.slow([name for name in LAYOUTS if name not in QUICK])])
def test_forward_in_every_layout(layout, masked, operators, device):
    z, channel_dim, codebook, mask = inputs(layout, masked, device)
    expected, _ = eager.nearest(z, codebook, mask, channel_dim, "euclidean", "exact")
    same(operators.nearest(z, codebook, mask, channel_dim, "euclidean", "exact")[0], expected)
    arguments = (z, codebook, mask, channel_dim, "euclidean", "exact", True)
    found = operators.quantize(*arguments)
    for one, other in zip(found, eager.quantize(*arguments), strict=True):
        same(one, other)
    assert torch.equal(found[1], expected)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("layout", hostile.first(list(LAYOUTS)[1:]))
def test_backward_and_statistics_in_every_layout(layout, masked, operators, device):
    z, channel_dim, codebook, mask = inputs(layout, masked, device)
    indices, _ = eager.nearest(z, codebook, mask, channel_dim, "euclidean", "exact")
    batched = codebook.dim() == 3
    counted = (z, indices, CODES, mask, channel_dim, batched)
    for one, other in zip(operators.statistics(*counted), eager.statistics(*counted), strict=True):
        same(one, other)
    given = (z, codebook, indices.clamp_min(0), mask, channel_dim, True)
    for one, other in zip(operators.lookup(*given), eager.lookup(*given), strict=True):
        same(one, other)
    losses = torch.randn(2, device=device).unbind()
    for incoming in (torch.randn_like(z), torch.ones((), device=device).expand(z.shape)):
        for gradient in ("straight_through", "rotation"):
            arguments = (incoming, *losses, z, codebook, indices, channel_dim, gradient, True)
            found, expected = operators.quantize_backward(*arguments), eager.quantize_backward(*arguments)
            same(found[0], expected[0])
            same(found[1], expected[1])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "layout",
    hostile.first(["interleaved axes", "heads, channels first", "axes that cannot be merged", "no rows", "one row"]),
)
def test_residuals_in_every_layout(layout, masked, operators, device):
    """Against the operators of one level, chained: layouts are what differs here."""
    z, channel_dim, codebook, mask = inputs(layout, masked, device)
    heads = 1 if codebook.dim() == 2 else len(codebook)
    codebooks = torch.stack([codebook * 0.6**level for level in range(LEVELS)], codebook.dim() - 2)
    levels = None if mask is None else torch.where(mask, 2, 0)
    metric = (channel_dim, "euclidean", "exact")
    quantized, indices, errors, counts, _ = operators.residual_quantize(z, codebooks, levels, *metric, True)
    residual, total = z, 0
    for level in range(LEVELS):
        passed = None if levels is None else levels > level
        codes = codebooks.select(codebook.dim() - 2, level)
        e, found, error, n, _ = eager.quantize(residual, codes, passed, *metric, True)
        assert torch.equal(indices[..., level], found)
        if heads == 1:
            torch.testing.assert_close(errors[0, level], error, rtol=1e-6, atol=1e-6)
        assert torch.equal(counts[:, level].flatten(), n.flatten())
        residual, total = residual - e, total + e
    torch.testing.assert_close(quantized, total, rtol=0, atol=0)
    assert quantized.stride() == operators.quantize(z, codebook, mask, *metric, False)[0].stride()
    assert indices.is_contiguous() and indices.shape[-1] == LEVELS
    losses = torch.randn(2, heads, LEVELS, device=device).unbind()
    arguments = (torch.ones_like(z), *losses, z, codebooks, indices, channel_dim)
    grad_z, grad_codebooks = operators.residual_quantize_backward(*arguments, "straight_through", True)
    assert grad_z.shape == z.shape and grad_codebooks.shape == codebooks.shape
    kept = torch.ones_like(z) if mask is None else mask.unsqueeze(channel_dim).expand(z.shape)
    assert (grad_z == 0).equal(kept == 0)
    assert operators.residual_quantize_backward(*arguments, "rotation", False)[1].shape == (0,)


@pytest.mark.parametrize("layout", ["images, channels first", "heads, channels first", "every second channel"])
def test_what_the_kernels_write_is_what_is_returned(layout, operators, device, monkeypatch):
    """No copy of z's shape is made on the way out, where its strides allow a view."""
    z, channel_dim, codebook, _ = inputs(layout, False, device)
    monkeypatch.setattr(torch.Tensor, "copy_", lambda *_: pytest.fail("the result was copied"))
    quantized, indices, *_ = operators.quantize(z, codebook, None, channel_dim, "euclidean", "exact", False)
    one = torch.ones((), device=device)
    operators.quantize_backward(torch.ones_like(z), one, one, z, codebook, indices, channel_dim, "rotation", False)


def test_a_codebook_with_strides(operators, device):
    z, codebook = torch.randn(20, DIM, device=device), torch.randn(DIM, CODES, device=device).T
    indices, _ = operators.nearest(z, codebook, None, 1, "euclidean", "exact")
    one = torch.ones((), device=device)
    arguments = (torch.ones_like(z), one, one, z, codebook, indices, 1, "rotation", True)
    found, expected = operators.quantize_backward(*arguments), eager.quantize_backward(*arguments)
    same(found[0], expected[0])
    same(found[1], expected[1])


def test_the_package_says_what_it_is():
    assert backend.problem() is None
    assert backend.supports((8, 0))
    assert not backend.supports((7, 5))
    assert len(backend.source_hash()) == 16
