"""`vqkernels swap`: what is swapped, whether results stay, what it gains, and when it is not worth it."""

import os

import pytest
import torch
from torch import nn

from vqkernels.bench import model_memory
from vqkernels.bench.model_memory import Peaks
from vqkernels.bench.model_pair import ModelPair, difference
from vqkernels.bench.user_model import UserModel
from vqkernels.cli import main
from vqkernels.cli.swap import run, verdict

pytest.importorskip("diffusers")

MODELS = """
import torch
from torch import nn
from diffusers.models.autoencoders.vae import VectorQuantizer

class Autoencoder(nn.Module):
    def __init__(self, size, **options):
        super().__init__()
        self.encoder, self.drop = nn.Conv2d(3, 8, 1), nn.Dropout(0.5)
        self.quantizer = VectorQuantizer(size, 8, beta=0.25, **options)

    def forward(self, images):
        quantized, loss, (_, _, indices) = self.quantizer(self.drop(self.encoder(images)))
        return quantized, loss, indices

def small():
    return Autoencoder(8), torch.randn(1, 3, 8, 8)

def large():
    return Autoencoder(4096), torch.randn(1, 3, 64, 64)

def lossy():
    return Autoencoder(8), torch.randn(1, 3, 8, 8), lambda output: output[1]

def alone():
    return VectorQuantizer(8, 8, beta=0.25), torch.randn(1, 8, 8, 8)

class Normalised(Autoencoder):
    def __init__(self, size):
        super().__init__(size)
        self.encoder = nn.utils.weight_norm(self.encoder)

def normalised():
    return Normalised(8), torch.randn(1, 3, 8, 8)

class Growing(Normalised):
    made = 8
    def __init__(self):
        super().__init__(Growing.made)
        Growing.made += 1

def growing():
    return Growing(), torch.randn(1, 3, 8, 8)

class Frozen(Autoencoder):
    def forward(self, images):
        with torch.no_grad():
            return self.quantizer(self.encoder(images))[0]

def frozen():
    return Frozen(8), torch.randn(1, 3, 8, 8)

class Changed(VectorQuantizer):
    pass

def left():
    return nn.Sequential(Changed(8, 8, beta=0.25)), torch.randn(1, 8, 8, 8)

def none():
    return nn.Linear(3, 3), torch.randn(2, 3)

def fails():
    return Autoencoder(8), torch.randn(1, 5, 8, 8)

def wrong_loss():
    return Autoencoder(8), torch.randn(1, 3, 8, 8), lambda output: output["loss"]

def no_gradient():
    return Autoencoder(8), torch.randn(1, 3, 8, 8), lambda output: output[1].detach()
"""


@pytest.fixture
def models(tmp_path, monkeypatch):
    (tmp_path / "my_swapped.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "my_swapped"


PEER = "diffusers.models.autoencoders.vae.VectorQuantizer -> vqkernels.dropin.diffusers.VectorQuantizer"


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "name,first,compared,kind",
    [
        ("small", f"quantizer: {PEER}", ["outputs", "gradients"], "step"),
        ("lossy", f"quantizer: {PEER}", ["outputs", "gradients"], "step"),
        ("alone", f"the model: {PEER}", ["outputs", "gradients"], "step"),
        ("normalised", f"quantizer: {PEER}", ["outputs", "gradients"], "step"),
        ("frozen", f"quantizer: {PEER}", ["outputs"], "forward"),
    ],
)
def test_the_report(models, capsys, monkeypatch, name, first, compared, kind):
    monkeypatch.setattr(model_memory, "measure", lambda spec, threads: Peaks((30.4, 20.0), (12.0, 1.6)))
    assert run([f"{models}:{name}", "--quick", "--threads", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == first
    assert [line.split()[0] for line in lines[1:]] == [*compared, kind, "memory", "verdict"]
    for line in lines[1 : 1 + len(compared)]:
        assert float(line.split()[1]) < 1e-5 and (" 0 of " in line or "integers" not in line)
    assert "ms before" in lines[-3] and "x as fast" in lines[-1]
    whole, alone = "30 MB before, 20 MB after", "12 MB before, 2 MB after"
    assert lines[-2].endswith(f"{whole}: peak of a {kind} above the model; quantizers alone {alone}")


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "name,sentence",
    [
        ("left", "no quantizer was swapped"),
        ("none", "no known quantizer was found; known are "),
        ("fails", "the model failed: RuntimeError: "),
        ("wrong_loss", "the loss failed: TypeError: "),
        ("no_gradient", "the loss must be one number with a gradient"),
        ("growing", "the model can neither be copied nor made twice: RuntimeError: "),
        ("missing", "'my_swapped' has no function 'missing'"),
    ],
)
def test_what_cannot_be_measured_is_one_sentence(models, capsys, name, sentence):
    assert main.main(["swap", f"{models}:{name}", "--quick"]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith(f"vqkernels swap: {sentence}") and len(shown.err.splitlines()) == 1
    if name == "left":
        assert "0: my_swapped.Changed left: a subclass of" in shown.out


@pytest.mark.parametrize("arguments", [["my_swapped"], [":x"], ["a:b", "--threads", "0"], ["a:b", "--seconds", "0"]])
def test_wrong_arguments(capsys, arguments):
    with pytest.raises(SystemExit) as exit:
        run(arguments)
    assert exit.value.code == 2 and "must be" in capsys.readouterr().err


def test_memory_that_cannot_be_measured_is_said_to_be_so(models, capsys, monkeypatch):
    monkeypatch.setattr(model_memory, "measure", lambda spec, threads: None)
    assert run([f"{models}:small", "--quick", "--threads", "1"]) == 0
    assert "memory     not measured: it needs Linux" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="peaks are reset through /proc")
def test_memory_before_and_after(models):
    """The peer's distances of 4,096 rows to 4,096 codes are 67 MB; ours are never there."""
    peaks = model_memory.measure(f"{models}:large", 1)
    assert peaks.quantizers[0] > 60 and peaks.quantizers[1] < 20
    assert peaks.step[0] - peaks.step[1] > 40
    assert model_memory.measure(f"{models}:missing", 1) is None


def test_the_calls_of_the_quantizers_are_recorded(models):
    import importlib

    model, inputs = importlib.import_module(models).small()
    pair = ModelPair(UserModel(model, (inputs,), lambda output: output[1]), _never)
    before = {key: value.clone() for key, value in pair.original.state_dict().items()}
    (call,) = pair.calls()
    assert (call.path, call.method, call.indices) == ("0.quantizer", "forward", 64)
    assert call.arguments[0].shape == (1, 8, 8, 8) and call.arguments[0].requires_grad
    assert pair.differing([call]) == (0, 64)
    for holder in (pair.original, pair.swapped):
        pair.alone(holder, [call])()
        assert holder[0].quantizer.embedding.weight.grad.any()
        assert "forward" not in holder[0].quantizer.__dict__ and holder[0].quantizer.training
    assert all(value.equal(before[key]) for key, value in pair.original.state_dict().items())
    with torch.no_grad():
        pair.swapped[0].quantizer.embedding.weight.mul_(-1)
    assert pair.differing([call])[0] > 0


def test_recording_leaves_a_moving_codebook_where_it_was():
    lucidrains = pytest.importorskip("vector_quantize_pytorch")
    model = nn.Sequential(nn.Linear(4, 8), lucidrains.VectorQuantize(dim=8, codebook_size=16))
    pair = ModelPair(UserModel(model, (torch.randn(2, 30, 4),), lambda output: output[2]), _never)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    (call,) = pair.calls()
    assert all(value.equal(before[key]) for key, value in model.state_dict().items())
    pair.alone(pair.original, [call])()
    assert not model[1].codebook.equal(before["1._codebook.embed"][0])


def _never():
    raise AssertionError("a model that can be copied is not made twice")


def test_comparing_leaves_the_model_as_it_was(models):
    import importlib

    model, inputs = importlib.import_module(models).small()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    pair = ModelPair(UserModel(model, (inputs,), lambda output: output[1]), _never)
    pair.compare()
    assert all(value.equal(before[key]) for key, value in model.state_dict().items())
    assert type(model.quantizer).__module__.startswith("diffusers") and pair.original[0] is model


def test_differences_are_seen():
    a = {"x": torch.tensor([1.0, 4.0]), "n": torch.tensor([1, 2, 3]), "empty": torch.zeros(0)}
    b = {"x": torch.tensor([1.0, 5.0]), "n": torch.tensor([1, 0, 0]), "empty": torch.zeros(0)}
    found = difference(a, b)
    assert (found.floats, found.integers, found.of) == (0.25, 2, 3)
    assert str(found) == "2.5e-01 of the largest value, 2 of 3 integers differ"
    nan = torch.tensor([torch.nan, 1.0])
    assert difference(nan, nan).floats == 0
    assert difference(nan, torch.ones(2)).floats == float("inf")


def test_a_wrong_swap_is_seen():
    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            from diffusers.models.autoencoders.vae import VectorQuantizer

            self.quantizer = VectorQuantizer(8, 4, beta=0.25)

        def forward(self, z):
            return self.quantizer(z)[1]

    pair = ModelPair(UserModel(Loss(), (torch.randn(1, 4, 8, 8),), lambda output: output), _never)
    pair.swapped[0].quantizer.beta = 0.5
    assert all(difference.floats > 0.01 for difference in pair.compare().values())


def test_the_verdict():
    assert verdict(2.0) == "worth it: a step is 2.00x as fast after the swap"
    assert verdict(1.01).startswith(
        "not worth it: a step is 1.01x as fast after the swap; we recommend it from 1.05x on"
    )
