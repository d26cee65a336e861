"""Models whose quantizers were swapped are traced by TorchScript, saved, loaded, and right for other sizes."""

import io
import warnings

import pytest
import torch
from torch import nn

from vqkernels import swap_quantizers
from vqkernels.dropin import dac, encodec, llamagen, lucidrains, pytorch_vqvae, rosinality, taming

D, K = 8, 16


def tensors(results) -> list[torch.Tensor]:
    return [x for x in torch.utils._pytree.tree_leaves(results) if torch.is_tensor(x)]


class Tensors(nn.Module):
    """The tensors among a model's results: TorchScript takes no None and no float."""

    def __init__(self, model: nn.Module, call=lambda model, x: model(x)) -> None:
        super().__init__()
        self.model, self.call = model, call

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(tensors(self.call(self.model, x)))


LAYERS = {
    "lucidrains": (lambda: lucidrains.VectorQuantize(D, K), (2, 20, D), 1),
    "projected heads": (lambda: lucidrains.VectorQuantize(D, K, codebook_dim=3, heads=2), (2, 20, D), 1),
    "cosine images": (
        lambda: lucidrains.VectorQuantize(D, K, use_cosine_sim=True, accept_image_fmap=True),
        (2, D, 4, 6),
        -1,
    ),
    "residual": (lambda: lucidrains.ResidualVQ(dim=D, num_quantizers=3, codebook_size=K), (2, 20, D), 1),
    "grouped": (
        lambda: lucidrains.GroupedResidualVQ(dim=D, groups=2, num_quantizers=2, codebook_size=K),
        (2, 20, D),
        1,
    ),
    "simvq": (lambda: lucidrains.SimVQ(D, K), (2, 20, D), 1),
    "rosinality": (lambda: rosinality.Quantize(D, K), (2, 20, D), 1),
    "encodec": (lambda: encodec.VectorQuantization(D, K, 4, kmeans_init=False), (2, D, 20), -1),
    "dac": (lambda: dac.VectorQuantize(D, K, 3), (2, D, 20), -1),
    "taming": (lambda: taming.VectorQuantizer2(K, D, 0.25), (2, D, 4, 6), -1),
    "llamagen": (lambda: llamagen.VectorQuantizer(K, D, 0.25, 0.0, True, True), (2, D, 4, 6), -1),
    "codes straight through": (
        lambda: Tensors(nn.Embedding(K, D), lambda codes, x: pytorch_vqvae.vq_st(x, codes.weight)),
        (2, 20, D),
        1,
    ),
    "pytorch_vqvae": (lambda: pytorch_vqvae.VQEmbedding(K, D), (2, D, 4, 6), -1),
}


def saved_and_loaded(module: nn.Module, x: torch.Tensor) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(module, (x,), check_trace=False)
        file = io.BytesIO()
        torch.jit.save(traced, file)
        file.seek(0)
        return torch.jit.load(file)


def assert_right_for_other_sizes(module: nn.Module, shape: tuple[int, ...], axis: int, step: int = 1) -> None:
    loaded = saved_and_loaded(module, torch.randn(shape))
    for batch, more in ((1, 0), (3, 5 * step)):
        longer = list(shape)
        longer[0], longer[axis] = batch, longer[axis] + more
        x = torch.randn(longer)
        with torch.no_grad():
            torch.testing.assert_close(list(loaded(x)), list(module(x)))


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_traced_and_saved(name):
    build, shape, axis = LAYERS[name]
    assert_right_for_other_sizes(Tensors(build().eval()), shape, axis)


def test_the_dac_of_transformers_is_traced_and_saved_after_a_swap():
    transformers = pytest.importorskip("transformers")
    config = transformers.DacConfig(
        encoder_hidden_size=8, downsampling_ratios=[2, 2], decoder_hidden_size=16, n_codebooks=2, codebook_size=16
    )
    model = transformers.DacModel(config).eval()
    assert swap_quantizers(model).swapped
    module = Tensors(model, lambda model, x: model(x, return_dict=False))
    assert_right_for_other_sizes(module, (1, 1, 64), -1, step=4)


def test_the_vqmodel_of_diffusers_is_traced_and_saved_after_a_swap():
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.VQModel(
        block_out_channels=(8,), layers_per_block=1, latent_channels=4, num_vq_embeddings=16, norm_num_groups=4
    ).eval()
    assert swap_quantizers(model).swapped
    assert_right_for_other_sizes(Tensors(model, lambda model, x: model(x, return_dict=False)), (1, 3, 8, 8), -1)


@pytest.mark.parametrize("name", ["VectorQuantize", "ResidualVQ"])
def test_a_model_of_lucidrains_is_traced_and_saved_after_a_swap(name):
    peer = pytest.importorskip("vector_quantize_pytorch")
    options = {"dim": D, "codebook_size": K} | ({"num_quantizers": 2} if name == "ResidualVQ" else {})
    model = nn.Sequential(nn.Linear(4, D), getattr(peer, name)(**options)).eval()
    assert swap_quantizers(model).swapped
    assert_right_for_other_sizes(Tensors(model), (2, 20, 4), 1)
