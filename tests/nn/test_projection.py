"""Projections that a quantization tool has replaced: their weight is a method, or integers."""

import warnings

import pytest
import torch
from torch import nn

from vqkernels.nn import ResidualVectorQuantizer, SimVQ, VectorQuantizer

LAYERS = {
    "quantizer": lambda: VectorQuantizer(8, 16, codebook_dim=4),
    "heads": lambda: VectorQuantizer(8, 16, codebook_dim=3, heads=2, channel_dim=1),
    "residual": lambda: ResidualVectorQuantizer(8, 16, 2, codebook_dim=4),
    "groups": lambda: ResidualVectorQuantizer(8, 16, 2, codebook_dim=3, groups=2),
    "simvq": lambda: SimVQ(8, 16),
}


class IntegerLinear(nn.Module):
    """Weights of 8 bits and a scale, as weight-only quantization keeps them."""

    def __init__(self, linear):
        super().__init__()
        self.scale = linear.weight.detach().abs().amax() / 127
        self.weight = nn.Parameter((linear.weight.detach() / self.scale).round().to(torch.int8), requires_grad=False)
        self.bias = linear.bias

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


def quantized_dynamically(layer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.ao.quantization.quantize_dynamic(layer, {nn.Linear}, dtype=torch.qint8)


def quantized_by_weight(layer):
    for name, child in list(layer.named_children()):
        setattr(layer, name, IntegerLinear(child))
    return layer


@pytest.mark.parametrize("quantize", [quantized_dynamically, quantized_by_weight])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_with_quantized_projections_quantizes_and_decodes(name, quantize):
    layer = LAYERS[name]().eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    z = torch.randn(4, 8, 5) if layer.channel_dim == 1 else torch.randn(4, 5, 8)
    other = quantize(_copied(layer, name)).eval()
    quantized, indices, loss = other(z)
    close = dict(rtol=0, atol=0.05 * float(layer.decode(indices).detach().abs().max()))
    torch.testing.assert_close(quantized, layer.decode(indices), **close)
    torch.testing.assert_close(other.decode(indices), quantized, **close)
    assert loss.isfinite().all()


def _copied(layer, name):
    copy = LAYERS[name]()
    copy.load_state_dict(layer.state_dict())
    return copy
