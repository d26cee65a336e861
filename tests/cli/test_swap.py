"""`vqkernels swap`: what is swapped, whether results stay, what it gains, and when it is not worth it."""

import pytest
import torch
from torch import nn

from vqkernels.bench.subject import Subject
from vqkernels.cli import main
from vqkernels.cli.swap import Pair, _difference, run, verdict

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
def test_the_report(models, capsys, name, first, compared, kind):
    assert run([f"{models}:{name}", "--quick", "--threads", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == first
    assert [line.split()[0] for line in lines[1:]] == [*compared, kind, "verdict"]
    for line in lines[1 : 1 + len(compared)]:
        assert float(line.split()[1]) < 1e-5 and (" 0 of " in line or "integers" not in line)
    assert "ms before" in lines[-2] and "x as fast" in lines[-1]


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


def _never():
    raise AssertionError("a model that can be copied is not made twice")


def test_comparing_leaves_the_model_as_it_was(models):
    import importlib

    model, inputs = importlib.import_module(models).small()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    pair = Pair(Subject(model, (inputs,), lambda output: output[1]), _never)
    pair.compare()
    assert all(value.equal(before[key]) for key, value in model.state_dict().items())
    assert type(model.quantizer).__module__.startswith("diffusers") and pair.theirs[0] is model


def test_differences_are_seen():
    a = {"x": torch.tensor([1.0, 4.0]), "n": torch.tensor([1, 2, 3]), "empty": torch.zeros(0)}
    b = {"x": torch.tensor([1.0, 5.0]), "n": torch.tensor([1, 0, 0]), "empty": torch.zeros(0)}
    found = _difference(a, b)
    assert (found.floats, found.integers, found.of) == (0.25, 2, 3)
    assert str(found) == "2.5e-01 of the largest value, 2 of 3 integers differ"
    nan = torch.tensor([torch.nan, 1.0])
    assert _difference(nan, nan).floats == 0
    assert _difference(nan, torch.ones(2)).floats == float("inf")


def test_a_wrong_swap_is_seen():
    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            from diffusers.models.autoencoders.vae import VectorQuantizer

            self.quantizer = VectorQuantizer(8, 4, beta=0.25)

        def forward(self, z):
            return self.quantizer(z)[1]

    pair = Pair(Subject(Loss(), (torch.randn(1, 4, 8, 8),), lambda output: output), _never)
    pair.ours[0].quantizer.beta = 0.5
    assert all(difference.floats > 0.01 for difference in pair.compare().values())


def test_the_verdict():
    assert verdict(2.0) == "worth it: a step is 2.00x as fast after the swap"
    assert verdict(1.01).startswith("not worth it: a step is 1.01x as fast, and below 1.05x")
