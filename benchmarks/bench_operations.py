"""Regression benchmarks of what surrounds the search: the fused forward and backward passes, look-up, overhead."""

import pytest
import torch

from vqkernels import nearest_code, reference, vector_quantize
from vqkernels.nn import VectorQuantizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_quantize(benchmark, dtype):
    z, codebook = torch.randn(16384, 64).to(dtype), torch.randn(64, 64).to(dtype)
    quantized, indices, *_ = benchmark(vector_quantize, z, codebook)
    assert torch.equal(quantized, codebook[indices])


@pytest.mark.parametrize("channel_dim", [-1, 1], ids=["channels last", "channels first"])
def test_backward(benchmark, channel_dim):
    z = torch.randn(16, 64, 32, 32) if channel_dim == 1 else torch.randn(16, 32, 32, 64)
    z, codebook = z.requires_grad_(), torch.randn(64, 64, requires_grad=True)
    outputs = vector_quantize(z, codebook, channel_dim=channel_dim)
    taken = [outputs[0], outputs[2], outputs[3]]
    incoming = [torch.randn_like(x) for x in taken]

    def backward():
        return torch.autograd.grad(taken, [z, codebook], incoming, retain_graph=True)

    assert all(bool(x.isfinite().all()) for x in benchmark(backward))


def test_layer_in_eval(benchmark):
    layer, z = VectorQuantizer(64, 512).eval(), torch.randn(8192, 64)
    with torch.no_grad():
        indices = benchmark(layer, z)[1]
    assert torch.equal(indices[:64], reference.nearest(z[:64], layer.codebook.detach()))


def test_decode(benchmark):
    layer, indices = VectorQuantizer(64, 8192), torch.randint(8192, (16, 32, 32))
    assert benchmark(layer.decode, indices).shape == (16, 32, 32, 64)


def test_overhead_of_a_call(benchmark):
    z, codebook = torch.randn(1, 4), torch.randn(1, 4)
    assert benchmark(nearest_code, z, codebook).tolist() == [0]


def test_overhead_of_a_layer_with_gradient(benchmark):
    layer, z = VectorQuantizer(4, 4), torch.randn(1, 4, requires_grad=True)

    def step():
        quantized, _, loss = layer(z)
        (quantized.sum() + loss).backward()

    benchmark(step)
    assert z.grad is not None
