"""Export without the library: the same results from plain PyTorch operators, and from ONNX where it is installed."""

import io
import warnings

import pytest
import torch

import vqkernels
from vqkernels.nn import GroupedResidualVectorQuantizer, ResidualVectorQuantizer, SimVQ, VectorQuantizer
from vqkernels.nn.export import decompositions

CONFIGURATIONS = {
    "plain": dict(),
    "eager": dict(backend="eager"),
    "dot": dict(metric="dot"),
    "cosine": dict(metric="cosine", ema_decay=0.9),
    "shared heads": dict(heads=2),
    "heads": dict(heads=2, separate_codebooks=True, init="kmeans"),
    "projection": dict(codebook_dim=4, ema_decay=0.9, revive="rows", gradient="rotation"),
    "residual": dict(levels=3, shared_codebook=True),
    "grouped": dict(levels=2, groups=2, ema_decay=0.9),
}


def trained(name):
    options = CONFIGURATIONS[name]
    kind = ResidualVectorQuantizer if "levels" in options else VectorQuantizer
    kind = GroupedResidualVectorQuantizer if "groups" in options else kind
    layer = kind(6, 16, channel_dim=1, **options)
    with torch.no_grad():
        layer.codebook.normal_()
    layer(torch.randn(8, 6, 10))
    return layer.eval()


def exported(layer, arguments, keywords=None):
    batch, time = torch.export.Dim("batch"), torch.export.Dim("time")
    shapes = {"z": {0: batch, 2: time}}
    if keywords:
        shapes |= {"mask": {0: batch, 1: time}}
    program = torch.export.export(layer, arguments, keywords, dynamic_shapes=shapes)
    return program.run_decompositions(decompositions())


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_no_operator_of_ours_is_left_and_values_are_the_same(name, masked):
    layer = trained(name)
    keywords = {"mask": torch.rand(2, 7) < 0.7} if masked else None
    program = exported(layer, (torch.randn(2, 6, 7),), keywords)
    assert "vqkernels" not in str(program.graph)
    z = torch.randn(3, 6, 5)
    z[0, 2, 1] = torch.nan
    keywords = {"mask": torch.rand(3, 5) < 0.7} if masked else {}
    got, expected = program.module()(z, **keywords), layer(z, **keywords)
    assert got[1].equal(expected[1])
    torch.testing.assert_close(got[0], expected[0], equal_nan=True)
    torch.testing.assert_close(got[2], expected[2], equal_nan=True)


def test_a_code_that_is_not_finite_is_never_chosen():
    layer = trained("plain")
    with torch.no_grad():
        layer.codebook[3:9] = torch.inf
    program = exported(layer, (torch.randn(2, 6, 7),))
    z = torch.randn(4, 6, 9)
    assert program.module()(z)[1].equal(layer(z)[1])


def test_training_is_refused():
    with pytest.raises(Exception, match="export the model in eval mode"):
        torch.export.export(VectorQuantizer(6, 16), (torch.randn(4, 6),)).run_decompositions(decompositions())


class Model(torch.nn.Module):
    """A layer in a model, as `torch.onnx.export(dynamo=False)` wants it: that takes no keyword-only argument."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, z):
        return self.layer(z)


def by_table(model, z):
    return torch.onnx.export(exported(model.layer, (z,)), dynamo=True, verbose=False).model_proto.SerializeToString()


def by_dynamo(model, z):
    shapes = ({0: torch.export.Dim("batch"), 2: torch.export.Dim("time")},)
    program = torch.onnx.export(model, (z,), dynamo=True, verbose=False, dynamic_shapes=shapes)
    return program.model_proto.SerializeToString()


def by_trace(model, z):
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=torch.jit.TracerWarning)
        axes = {"z": {0: "batch", 2: "time"}}
        torch.onnx.export(model, (z,), file, dynamo=False, input_names=["z"], dynamic_axes=axes)
    return file.getvalue()


@pytest.mark.parametrize("exporter", [by_table, by_dynamo, by_trace])
@pytest.mark.parametrize("name", [*CONFIGURATIONS, "simvq"])
def test_onnx_runtime_gives_the_same_for_another_size(name, exporter):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    model = Model(SimVQ(6, 16, channel_dim=1) if name == "simvq" else trained(name)).eval()
    session = onnxruntime.InferenceSession(exporter(model, torch.randn(2, 6, 7)))
    z = torch.randn(3, 6, 5)
    quantized, indices, loss = session.run(None, {session.get_inputs()[0].name: z.numpy()})
    expected = model(z)
    assert torch.from_numpy(indices).equal(expected[1])
    torch.testing.assert_close(torch.from_numpy(quantized), expected[0].detach())
    torch.testing.assert_close(torch.tensor(loss), expected[2].detach())


def test_a_program_with_our_operators_names_the_decompositions():
    pytest.importorskip("onnxscript")
    program = torch.export.export(trained("plain"), (torch.randn(2, 6, 7),))
    with pytest.raises(Exception, match=r"run_decompositions\(vqkernels.nn.export.decompositions\(\)\)"):
        torch.onnx.export(program, dynamo=True, verbose=False)


@pytest.mark.parametrize("dynamo", [False, True])
def test_onnx_refuses_what_belongs_to_training(dynamo):
    pytest.importorskip("onnxscript")

    class Sampled(torch.nn.Module):
        def forward(self, z, codebook):
            return vqkernels.sample_code(z, codebook, temperature=1.0, seed=0)

    with pytest.raises(Exception, match="ONNX has nothing for vqkernels::sample: export the model in eval mode"):
        torch.onnx.export(Sampled(), (torch.randn(5, 3), torch.randn(4, 3)), io.BytesIO(), dynamo=dynamo, verbose=False)
