"""What the tests of wrappers and loaders run through: every layer in every mode of training that it has, by name.

A cell is a layer in one mode, as in "VectorQuantizer heads, EMA". `LAYERS` is the table; a new layer is one more line.
"""

import fnmatch
from collections.abc import Callable, Iterable
from functools import partial
from itertools import product
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from vqkernels.dropin import dac, diffusers, encodec, llamagen, lucidrains, mimi, pytorch_vqvae, rosinality, taming
from vqkernels.nn import GroupedResidualVectorQuantizer, ResidualVectorQuantizer, SimVQ, VectorQuantizer

DIM, CODES = 4, 12

Options = dict[str, Any]
Read = tuple[Tensor, Tensor, Tensor]  # quantized, indices, loss ()

EMA: Options = {"ema_decay": 0.8}
LEARNING: dict[str, Options] = {
    "gradient": {},
    "EMA": EMA,
    "manual EMA": EMA | {"ema_update": "manual"},
    "k-means": EMA | {"init": "kmeans"},
    "k-means, gradient": {"init": "kmeans"},
    "revival": EMA | {"revive": "rows", "revive_threshold": 0.4},
    "revival, gradient": {"revive": "rows", "revive_threshold": 0.4},
}
SAMPLED = {"temperature": EMA | {"temperature": 1.0}, "temperature, gradient": {"temperature": 1.0}}
DROPPED = {"dropout": EMA | {"dropout": 0.6}, "dropout, gradient": {"dropout": 0.6}}
ALWAYS: dict[str, Options] = {"gradient": {}}


def first_three(layer: nn.Module, z: Tensor) -> Read:
    """Of `(quantized, indices, losses)`."""
    quantized, indices, losses = layer(z)
    return quantized, indices, losses.sum()


def images(layer: nn.Module, z: Tensor) -> Read:
    """Of the VQGAN family: `(quantized, loss, (.., .., indices))`."""
    quantized, loss, (*_, indices) = layer(z)
    return quantized, indices, loss


def rosinality_order(layer: nn.Module, z: Tensor) -> Read:
    quantized, loss, indices = layer(z)
    return quantized, indices, loss


def llamagen_losses(layer: nn.Module, z: Tensor) -> Read:
    quantized, (codebook, commitment, *_), (*_, indices) = layer(z)
    loss = codebook + commitment if layer.training else quantized.new_zeros(())
    return quantized, indices, loss


def factorized(layer: nn.Module, z: Tensor) -> Read:
    """Of DAC: `(quantized, commitment, codebook, indices, latents)`."""
    quantized, commitment, codebook, indices, _ = layer(z)
    return quantized, indices, (0.25 * commitment + codebook).mean()


def factorized_stack(layer: nn.Module, z: Tensor) -> Read:
    quantized, indices, _, commitment, codebook = layer(z)
    return quantized, indices, 0.25 * commitment + codebook


def embedding(layer: nn.Module, z: Tensor) -> Read:
    quantized, codes = layer.straight_through(z)
    loss = (codes - z.detach()).square().mean() + 0.25 * (z - codes.detach()).square().mean()
    return quantized, layer(z), loss


def tokens(layer: nn.Module, z: Tensor) -> Read:
    """Of layers that encode and decode only; the gradient is straight through."""
    indices = layer.encode(z)
    return z + (layer.decode(indices) - z).detach(), indices, z.new_zeros(())


def token_layer(kind: Callable[[Any], nn.Module], buffer: str) -> nn.Module:
    layer = kind(SimpleNamespace(codebook_size=CODES, codebook_dim=DIM))
    layer.get_buffer(f"codebook.{buffer}").normal_()
    return layer


class Layer(NamedTuple):
    build: Callable[..., nn.Module]  # takes the options of a mode
    modes: dict[str, Options]
    call: Callable[[nn.Module, Tensor], Read] = first_three
    layout: str = "rows"  # what it takes: rows (B, T, D), audio (B, D, T) or images (B, D, T, 1)


_LUCIDRAINS = {
    "gradient": {"learnable_codebook": True, "ema_update": False},
    "EMA": {},
    "k-means": {"kmeans_init": True},
    "revival": {"threshold_ema_dead_code": 2},
}
_ENCODEC = {"EMA": {"kmeans_init": False}, "k-means": {"kmeans_init": True}}
_HF_DAC = SimpleNamespace(codebook_size=CODES, codebook_dim=3, hidden_size=DIM)

LAYERS = {
    "VectorQuantizer": Layer(partial(VectorQuantizer, DIM, CODES), LEARNING | SAMPLED),
    "VectorQuantizer heads": Layer(partial(VectorQuantizer, DIM, CODES, heads=2), LEARNING | SAMPLED),
    "VectorQuantizer separate codebooks": Layer(
        partial(VectorQuantizer, DIM, CODES, heads=2, separate_codebooks=True), LEARNING | SAMPLED
    ),
    "VectorQuantizer cosine": Layer(partial(VectorQuantizer, DIM, CODES, metric="cosine"), LEARNING | SAMPLED),
    "VectorQuantizer projection": Layer(partial(VectorQuantizer, DIM, CODES, codebook_dim=3), LEARNING | SAMPLED),
    "ResidualVectorQuantizer": Layer(partial(ResidualVectorQuantizer, DIM, CODES, 3), LEARNING | DROPPED),
    "ResidualVectorQuantizer shared": Layer(
        partial(ResidualVectorQuantizer, DIM, CODES, 3, shared_codebook=True), LEARNING | DROPPED
    ),
    "GroupedResidualVectorQuantizer": Layer(
        partial(GroupedResidualVectorQuantizer, DIM, CODES, 2, 2), LEARNING | DROPPED
    ),
    "SimVQ": Layer(partial(SimVQ, DIM, CODES), ALWAYS),
    "lucidrains VectorQuantize": Layer(
        partial(lucidrains.VectorQuantize, DIM, CODES),
        _LUCIDRAINS | {"manual EMA": {"manual_ema_update": True}, "temperature": {"stochastic_sample_codes": True}},
    ),
    "lucidrains ResidualVQ": Layer(
        partial(lucidrains.ResidualVQ, dim=DIM, codebook_size=CODES, num_quantizers=3),
        _LUCIDRAINS | {"dropout": {"quantize_dropout": True}},
    ),
    "lucidrains SimVQ": Layer(partial(lucidrains.SimVQ, DIM, CODES), ALWAYS),
    "EnCodec VectorQuantization": Layer(
        partial(encodec.VectorQuantization, DIM, CODES, decay=0.8), _ENCODEC, layout="audio"
    ),
    "EnCodec ResidualVectorQuantization": Layer(
        partial(encodec.ResidualVectorQuantization, num_quantizers=3, dim=DIM, codebook_size=CODES, decay=0.8),
        _ENCODEC,
        layout="audio",
    ),
    "rosinality Quantize": Layer(partial(rosinality.Quantize, DIM, CODES, decay=0.8), {"EMA": {}}, rosinality_order),
    "LlamaGen VectorQuantizer": Layer(
        partial(llamagen.VectorQuantizer, CODES, DIM, 0.25, 0.0, True, True), ALWAYS, llamagen_losses, "images"
    ),
    "taming VectorQuantizer": Layer(partial(taming.VectorQuantizer, CODES, DIM, 0.25), ALWAYS, images, "images"),
    "taming VectorQuantizer2": Layer(partial(taming.VectorQuantizer2, CODES, DIM, 0.25), ALWAYS, images, "images"),
    "diffusers VectorQuantizer": Layer(partial(diffusers.VectorQuantizer, CODES, DIM, 0.25), ALWAYS, images, "images"),
    "DAC VectorQuantize": Layer(partial(dac.VectorQuantize, DIM, CODES, 3), ALWAYS, factorized, "audio"),
    "DAC ResidualVectorQuantize": Layer(
        partial(dac.ResidualVectorQuantize, DIM, 3, CODES, 3),
        ALWAYS | {"dropout": {"quantizer_dropout": 0.5}},
        factorized_stack,
        "audio",
    ),
    "transformers DacVectorQuantize": Layer(partial(dac.DacVectorQuantize, _HF_DAC), ALWAYS, factorized, "audio"),
    "transformers MimiVectorQuantization": Layer(
        partial(token_layer, mimi.MimiVectorQuantization, "embed_sum"), {"fixed": {}}, tokens, "audio"
    ),
    "transformers EncodecVectorQuantization": Layer(
        partial(token_layer, encodec.EncodecVectorQuantization, "embed"), {"fixed": {}}, tokens, "audio"
    ),
    "pytorch-vqvae VQEmbedding": Layer(partial(pytorch_vqvae.VQEmbedding, CODES, DIM), ALWAYS, embedding, "images"),
}
# Variants of a layer wait for the long suite.
VARIANTS = ("VectorQuantizer heads*", "* separate*", "* cosine*", "* projection*", "* shared*", "Grouped*")
CELLS = {f"{name}, {mode}": (name, mode) for name, layer in LAYERS.items() for mode in layer.modes}


def grid(ways: Iterable[str], quick: tuple[str, ...] = ("*",), among: Iterable[str] = CELLS) -> list[Any]:
    """Parameters (way, cell) of a test; the short suite leaves out variants and what no pattern of `quick` names."""
    found = []
    for way, cell in product(ways, among):
        short = any(map(partial(fnmatch.fnmatch, cell), quick)) and not any(
            map(partial(fnmatch.fnmatch, cell), VARIANTS)
        )
        found.append(pytest.param(way, cell, id=f"{way}: {cell}", marks=[] if short else [pytest.mark.slow]))
    return found


def matching(patterns: Iterable[str]) -> list[str]:
    """The cells that one of the patterns names."""
    return [cell for cell in CELLS if any(map(partial(fnmatch.fnmatch, cell), patterns))]


def directly(call: Callable[[Tensor], Read], z: Tensor) -> Read:
    return call(z)


class Model(nn.Module):
    """A linear encoder, the layer of a cell, a linear decoder; x `(B, T, 6)` -> reconstruction, indices, loss ().

    Args:
        cell: its name.
        norm: a batch normalisation after the encoder, for what only models with one do.
    """

    def __init__(self, cell: str, norm: bool = False) -> None:
        super().__init__()
        name, mode = CELLS[cell]
        self.layer_name, self.mode = name, mode
        layer = LAYERS[name]
        self.encoder, self.decoder = nn.Linear(6, DIM), nn.Linear(DIM, 6)
        self.norm = nn.BatchNorm1d(DIM) if norm else nn.Identity()
        self.quantizer = layer.build(**layer.modes[mode])
        self.around = directly  # how the layer is called: checkpointed, for one

    def forward(self, x: Tensor) -> Read:
        z = self.encoder(x)
        z = self.norm(z.transpose(1, 2)).transpose(1, 2)
        quantized, indices, loss = self.around(self.quantize, z)
        return self.decoder(quantized.to(x.dtype)), indices, loss

    def quantize(self, z: Tensor) -> Read:
        layer = LAYERS[self.layer_name]
        if layer.layout == "rows":
            return layer.call(self.quantizer, z)
        z = z.transpose(1, 2)
        if layer.layout == "audio":
            quantized, indices, loss = layer.call(self.quantizer, z)
        else:
            quantized, indices, loss = layer.call(self.quantizer, z.unsqueeze(-1))
            quantized = quantized.squeeze(-1)
        return quantized.transpose(1, 2), indices, loss


def build(cell: str, seed: int = 11, norm: bool = False) -> Model:
    torch.manual_seed(seed)
    return Model(cell, norm)


@torch.no_grad()
def finish_step(model: nn.Module) -> None:
    """What layers with a manual update want after the optimizer's step."""
    for module in model.modules():
        if getattr(module, "ema_update", None) == "manual":
            module.update_codebook()
        elif getattr(module, "manual_ema_update", False):
            module.update_ema()
