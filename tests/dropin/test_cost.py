"""No drop-in makes a tensor of rows times codes, forward or backward, in training or in eval."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vqkernels.dropin import dac, diffusers, encodec, llamagen, mimi, pytorch_vqvae, rosinality, taming

K, C, SIDE = 600, 4, 16
ROWS = SIDE * SIDE
CONFIG = SimpleNamespace(codebook_size=K, codebook_dim=C, hidden_size=C)
IMAGES, SOUNDS = (1, C, SIDE, SIDE), (1, C, ROWS)
LAYERS = {
    "taming": (lambda: taming.VectorQuantizer(K, C, 0.25), "forward", IMAGES),
    "taming 2": (lambda: taming.VectorQuantizer2(K, C, 0.25), "forward", IMAGES),
    "diffusers": (lambda: diffusers.VectorQuantizer(K, C, 0.25), "forward", IMAGES),
    "llamagen": (lambda: llamagen.VectorQuantizer(K, C, 0.25, 0.0, True, True), "forward", IMAGES),
    "rosinality": (lambda: rosinality.Quantize(C, K), "forward", (ROWS, C)),
    "encodec": (lambda: encodec.VectorQuantization(C, K, kmeans_init=False), "forward", SOUNDS),
    "encodec tokens": (lambda: encodec.EncodecVectorQuantization(CONFIG), "encode", SOUNDS),
    "mimi tokens": (lambda: mimi.MimiVectorQuantization(CONFIG), "encode", SOUNDS),
    "dac": (lambda: dac.VectorQuantize(C, K, C), "forward", SOUNDS),
    "dac of transformers": (lambda: dac.DacVectorQuantize(CONFIG), "forward", SOUNDS),
    "pytorch_vqvae": (lambda: pytorch_vqvae.VQEmbedding(K, C), "straight_through", IMAGES),
}


class Largest(TorchDispatchMode):
    """The most elements of any dense tensor that an operator returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x._nnz() if x.is_sparse else x.numel())
        return out


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_nothing_of_rows_times_codes_is_made(name, training, cpu_kernels):
    build, method, shape = LAYERS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        layer = build().train(training)
    z = torch.randn(shape, requires_grad=True)
    with Largest() as seen:
        results = [x for x in tree_leaves(getattr(layer, method)(z)) if isinstance(x, torch.Tensor)]
        wanted = [x.sum() for x in results if x.requires_grad]
        if wanted:
            torch.stack(wanted).sum().backward()
    assert ROWS <= seen.elements <= max(65536 + ROWS if name == "llamagen" else 0, 2 * K * C, 2 * ROWS * C) < ROWS * K
