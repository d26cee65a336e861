"""SimVQ: the paper's losses through one linear map, the whole codebook moving, and a decoder that agrees."""

import pytest
import torch

from vqkernels import reference
from vqkernels.nn import SimVQ


@pytest.mark.parametrize("gradient", ["straight_through", "rotation"])
@pytest.mark.parametrize("basis_dim", [None, 3])
def test_values_and_gradients(basis_dim, gradient, backend):
    layer = SimVQ(6, 20, basis_dim=basis_dim, beta=0.3, gradient=gradient, backend=backend)
    z = torch.randn(40, 6, requires_grad=True)
    weight = layer.transform.weight.detach().double().requires_grad_()
    codes = layer.basis.double() @ weight.T
    quantized, indices, loss = layer(z)
    assert indices.equal(reference.nearest(z, layer.codes))
    error = (codes[indices] - z.detach().double()).square().mean()
    torch.testing.assert_close(loss.double(), 1.3 * error, rtol=1e-5, atol=1e-7)
    (expected,) = torch.autograd.grad(error, weight)
    (quantized.sum() + loss).backward()
    torch.testing.assert_close(layer.transform.weight.grad.double(), expected, rtol=1e-4, atol=1e-6)
    assert z.grad.isfinite().all() and not layer.basis.requires_grad


def test_one_step_moves_every_code_and_not_the_basis(backend):
    layer = SimVQ(4, 50, backend=backend)
    basis, before = layer.basis.clone(), layer.codes.detach().clone()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    layer(torch.randn(8, 4) + 3)[2].backward()
    optimizer.step()
    assert (layer.codes != before).any(1).all() and layer.basis.equal(basis)


def test_layouts_masks_lengths_and_decode(backend):
    layer = SimVQ(6, 12, channel_dim=1, backend=backend)
    z = torch.randn(2, 6, 5)
    quantized, indices, loss = layer(z, lengths=torch.tensor([5, 2]))
    assert indices[1, 2:].eq(-1).all() and quantized[1, :, 2:].eq(0).all() and layer.counts.sum() == 7
    assert layer.decode(indices).equal(quantized) and loss.isfinite()
    assert 1 <= layer.perplexity <= 12 and layer.dead_codes == (layer.counts == 0).sum() and layer.usage > 0
    with pytest.raises(IndexError, match="indices must be in .-1, 11., got 12"):
        layer.decode(torch.tensor([12]))
    with pytest.raises(ValueError, match="z must have 6 channels at channel_dim=1"):
        layer(torch.randn(2, 5, 6))


def test_state_keys_and_compile():
    layer = SimVQ(6, 12)
    assert set(layer.state_dict()) == {"basis", "counts", "transform.weight"}
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    z = torch.randn(9, 6)
    for one, other in zip(compiled(z), layer(z), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cast_module_searches_its_own_codes(dtype, backend):
    layer = SimVQ(6, 12, backend=backend).to(dtype)
    z = torch.randn(30, 6, dtype=dtype)
    quantized, indices, _ = layer(z)
    assert indices.equal(reference.nearest(z, layer.codes)) and quantized.dtype == dtype
