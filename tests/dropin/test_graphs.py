"""Every drop-in in one compiled graph, without a break: the same results as without the compiler."""

import warnings
from types import SimpleNamespace

import pytest
import torch

from vqkernels.dropin import dac, diffusers, encodec, llamagen, mimi, pytorch_vqvae, rosinality, taming

K, C = 16, 8
CONFIG = SimpleNamespace(codebook_size=K, codebook_dim=C, hidden_size=C)
IMAGES, SOUNDS, ROWS = (2, C, 3, 5), (2, C, 9), (4, C)
LAYERS = {
    "taming": (lambda: taming.VectorQuantizer2(K, C, 0.25), "forward", IMAGES),
    "diffusers": (lambda: diffusers.VectorQuantizer(K, C, 0.25, legacy=False), "forward", IMAGES),
    "llamagen": (lambda: llamagen.VectorQuantizer(K, C, 0.25, 0.0, True, False), "forward", IMAGES),
    "rosinality": (lambda: rosinality.Quantize(C, K), "forward", ROWS),
    "encodec": (lambda: encodec.VectorQuantization(C, K, 4, kmeans_init=False), "forward", SOUNDS),
    "encodec tokens": (lambda: encodec.EncodecVectorQuantization(CONFIG), "encode", SOUNDS),
    "mimi tokens": (lambda: mimi.MimiVectorQuantization(CONFIG), "encode", SOUNDS),
    "dac": (lambda: dac.VectorQuantize(C, K, 4), "forward", SOUNDS),
    "dac of transformers": (lambda: dac.DacVectorQuantize(CONFIG), "forward", SOUNDS),
    "pytorch_vqvae": (lambda: pytorch_vqvae.VQEmbedding(K, C), "straight_through", IMAGES),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("training", [True, False])
def test_no_break_and_the_same_results(name, training):
    build, method, shape = LAYERS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        plain, compiled = (build().train(training) for _ in range(2))
    compiled.load_state_dict(plain.state_dict())
    z = torch.randn(shape)
    torch._dynamo.reset()
    function = torch.compile(getattr(compiled, method), fullgraph=True, backend="aot_eager")
    for _ in range(2):
        expected, found = getattr(plain, method)(z), function(z)
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(compiled.state_dict(), plain.state_dict())


@pytest.mark.slow
def test_codes_straight_through_in_a_graph():
    rows, codes = torch.randn(ROWS, requires_grad=True), torch.randn(K, C, requires_grad=True)
    torch._dynamo.reset()
    function = torch.compile(pytorch_vqvae.vq_st, fullgraph=True, backend="aot_eager")
    gradients = [
        torch.autograd.grad(f(rows, codes)[0].square().sum(), (rows, codes)) for f in (function, pytorch_vqvae.vq_st)
    ]
    torch.testing.assert_close(*gradients)
