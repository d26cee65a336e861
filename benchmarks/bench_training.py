"""Regression benchmarks of the layer's training step: forward, backward with an incoming gradient, codebook update."""

import pytest
import torch

from vqkernels import reference
from vqkernels.nn import VectorQuantizer

SHAPES = {"small": (1024, 512, 64), "paper": (8192, 512, 64), "large K": (2048, 8192, 64)}


@pytest.mark.parametrize("ema_decay", [None, 0.99], ids=["gradient", "moving averages"])
@pytest.mark.parametrize("regime", SHAPES)
def test_step(benchmark, regime, ema_decay):
    n, k, d = SHAPES[regime]
    layer = VectorQuantizer(d, k, ema_decay=ema_decay)
    with torch.no_grad():
        layer.codebook.normal_()
    z, incoming = torch.randn(n, d, requires_grad=True), torch.randn(n, d)
    assert torch.equal(layer.eval()(z)[1][:64], reference.nearest(z[:64], layer.codebook))
    layer.train()
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-4) if ema_decay is None else None

    def step():
        z.grad = None
        layer.zero_grad()
        quantized, _, loss = layer(z)
        torch.autograd.backward([quantized, loss], [incoming, None])
        if optimizer is not None:
            optimizer.step()

    benchmark(step)
    assert z.grad is not None and bool(z.grad.isfinite().all())


def test_images(benchmark):
    layer = VectorQuantizer(64, 512, channel_dim=1, ema_decay=0.99)
    z = torch.randn(8, 64, 32, 32, requires_grad=True)

    def step():
        z.grad = None
        quantized, _, loss = layer(z)
        (quantized.sum() + loss).backward()

    benchmark(step)
    assert z.grad is not None and z.grad.shape == z.shape
