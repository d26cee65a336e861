"""Swapped models leave Python as they could before the swap: by TorchScript, and by both exporters for ONNX."""

import io
import warnings

import pytest
import torch
from torch import nn

from vqkernels.dropin.swap import swap_quantizers


class Output(nn.Module):
    """The tensors that a model yields, or those of its quantizer."""

    def __init__(self, model, choose):
        super().__init__()
        self.model, self.choose = model, choose

    def forward(self, x):
        return self.choose(self.model, x)


def dac():
    from transformers import DacConfig, DacModel

    config = DacConfig(
        encoder_hidden_size=8, decoder_hidden_size=32, downsampling_ratios=[2, 2], upsampling_ratios=[2, 2],
        n_codebooks=3, codebook_size=32, codebook_dim=4,
    )  # fmt: skip
    model = DacModel(config)
    return model, lambda m, x: tuple(m.quantizer(x))[:3], (2, config.hidden_size, 9), (3, config.hidden_size, 5)


def diffusers():
    from diffusers import VQModel

    model = VQModel(
        block_out_channels=(32,), latent_channels=4, num_vq_embeddings=32, vq_embed_dim=4,
        down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",),
    )  # fmt: skip

    def choose(m, x):
        quantized, loss, (_, _, indices) = m.quantize(x)
        return quantized, loss, indices

    return model, choose, (2, 4, 6, 6), (3, 4, 5, 7)


def lucidrains(kind, **options):
    peer = pytest.importorskip("vector_quantize_pytorch")
    model = nn.ModuleDict({"quantizer": getattr(peer, kind)(dim=8, codebook_size=16, **options)})
    return model, lambda m, x: tuple(m["quantizer"](x))[:2], (2, 9, 8), (3, 5, 8)


MODELS = {
    "dac": dac,
    "diffusers": diffusers,
    "lucidrains": lambda: lucidrains("VectorQuantize"),
    "lucidrains cosine": lambda: lucidrains("VectorQuantize", use_cosine_sim=True),
    "lucidrains heads": lambda: lucidrains("VectorQuantize", heads=2, separate_codebook_per_head=True, codebook_dim=4),
    "lucidrains projections": lambda: lucidrains("VectorQuantize", codebook_dim=4),
    "lucidrains residual": lambda: lucidrains("ResidualVQ", num_quantizers=3, codebook_dim=4),
    "lucidrains groups": lambda: lucidrains("GroupedResidualVQ", num_quantizers=3, groups=2),
    "lucidrains simvq": lambda: lucidrains("SimVQ"),
}


def swapped(name):
    model, choose, *shapes = MODELS[name]()
    assert swap_quantizers(model).swapped
    return Output(model.eval(), choose).eval(), *(torch.randn(shape) for shape in shapes)


def close(found, expected):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(torch.as_tensor(one), other)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_swapped_model_is_traced_saved_and_loaded(name):
    model, x, other = swapped(name)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=torch.jit.TracerWarning)
        file = io.BytesIO()
        torch.jit.save(torch.jit.trace(model, x), file)
    file.seek(0)
    close(torch.jit.load(file)(other), model(other))


@pytest.mark.parametrize("dynamo", [False, True])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_swapped_model_runs_in_onnx_runtime(name, dynamo):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    model, x, _ = swapped(name)
    file = io.BytesIO()
    torch.onnx.export(model, (x,), file, dynamo=dynamo, verbose=False)
    session = onnxruntime.InferenceSession(file.getvalue())
    close(session.run(None, {session.get_inputs()[0].name: x.numpy()}), model(x))
