"""TorchScript: a traced layer saves, loads without its class, and is right for other sizes than it was traced with."""

import io
import subprocess
import sys
import warnings

import pytest
import torch
from nn.test_export import CONFIGURATIONS, trained

from vqkernels.nn import SimVQ

LAYERS = [*CONFIGURATIONS, "simvq"]


def layer_of(name):
    return SimVQ(6, 16, channel_dim=1).eval() if name == "simvq" else trained(name)


def traced(function, *arguments):
    """Saved and loaded again; a warning of the tracer is an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=torch.jit.TracerWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        file = io.BytesIO()
        torch.jit.save(torch.jit.trace(function, arguments), file)
        file.seek(0)
        return torch.jit.load(file)


class Masked(torch.nn.Module):
    """A layer's call with its keyword arguments by position, as tracing wants them."""

    def __init__(self, layer, name):
        super().__init__()
        self.layer, self.name = layer, name

    def forward(self, z, given):
        return self.layer(z, **{self.name: given})


class Decoded(torch.nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, indices):
        return self.layer.decode(indices)


def equal(found, expected):
    return all(a.equal(b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_a_traced_layer_gives_the_same_for_other_batches_and_lengths(name, gradients):
    layer = layer_of(name)
    with torch.set_grad_enabled(gradients):
        loaded = traced(layer, torch.randn(2, 6, 7))
        for shape in ((2, 6, 7), (5, 6, 3), (1, 6, 1), (0, 6, 7)):
            z = torch.randn(shape)
            assert equal(loaded(z), layer(z)), shape


@pytest.mark.parametrize("name", LAYERS)
def test_masks_and_lengths_are_traced_as_inputs(name):
    layer = layer_of(name)
    by_mask = traced(Masked(layer, "mask"), torch.randn(2, 6, 7), torch.rand(2, 7) < 0.7)
    by_length = traced(Masked(layer, "lengths"), torch.randn(2, 6, 7), torch.tensor([7, 3]))
    z, lengths = torch.randn(3, 6, 5), torch.tensor([2, 5, 0])
    mask = torch.arange(5) < lengths[:, None]
    expected = layer(z, mask=mask)
    assert equal(by_mask(z, mask), expected) and equal(by_length(z, lengths), expected)


@pytest.mark.parametrize("name", LAYERS)
def test_decode_is_traced(name):
    layer = layer_of(name)
    decoded = traced(Decoded(layer), layer(torch.randn(2, 6, 7))[1])
    quantized, indices, _ = layer(torch.randn(3, 6, 5))
    assert decoded(indices).equal(layer.decode(indices))
    torch.testing.assert_close(decoded(indices), quantized)


def test_the_graph_names_the_backend_that_was_chosen():
    z = torch.randn(2, 6, 7)
    assert "vqkernels::quantize_eager(" in str(traced(trained("eager"), z).inlined_graph)
    layer = trained("residual")
    layer.backend = "eager"
    assert "vqkernels::residual_quantize_eager(" in str(traced(layer, z).inlined_graph)


def test_a_file_loads_in_a_process_that_knows_the_operators_alone(tmp_path):
    layer, z = trained("heads"), torch.randn(3, 6, 5)
    torch.jit.save(torch.jit.trace(layer, torch.randn(2, 6, 7)), tmp_path / "layer.pt")
    torch.save((z, layer(z)), tmp_path / "expected.pt")
    code = (
        "import sys, torch, vqkernels\n"
        "z, expected = torch.load(sys.argv[2])\n"
        "found = torch.jit.load(sys.argv[1])(z)\n"
        "assert all(a.equal(b) for a, b in zip(found, expected))\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "layer.pt"), str(tmp_path / "expected.pt")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
