"""`vqkernels bench --model`: finds and swaps quantizers, predicts, measures, and says when it is not worth it."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from vqkernels import reference
from vqkernels.bench.layers import OneHotQuantizer
from vqkernels.bench.prediction import Comparison, Measurement, Prediction
from vqkernels.bench.timing import Timing
from vqkernels.bench.user_model import ModelError, UserModel, load, mean_squares
from vqkernels.cli.bench import run
from vqkernels.nn import VectorQuantizer

MODELS = """
import torch
from torch import nn
from vqkernels.bench.layers import OneHotQuantizer

class Autoencoder(nn.Module):
    def __init__(self, size, work):
        super().__init__()
        self.encoder = nn.Conv2d(3, 16, 3, padding=1)
        self.work = nn.ModuleList(nn.Conv2d(16, 16, 3, padding=1) for _ in range(work))
        self.quantizer = OneHotQuantizer(torch.randn(size, 16))

    def forward(self, images):
        x = self.encoder(images)
        for layer in self.work:
            x = layer(x)
        quantized, indices, loss = self.quantizer(x)
        return quantized, loss

def heavy():  # the quantizer is nearly everything
    return Autoencoder(4096, 0), torch.randn(2, 3, 32, 32)

def light():  # the quantizer is nearly nothing
    return Autoencoder(4, 60), torch.randn(2, 3, 32, 32), lambda output: output[0].square().mean() + output[1]

class Methods(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = Autoencoder(8, 0)

    def forward(self, images):
        return {"deep": [self.model(images)]}

    def example_inputs(self):
        return torch.randn(1, 3, 8, 8)

def none():
    return nn.Linear(3, 3), torch.randn(2, 3)

def broken():
    raise OSError("no weights")

def bare():
    return nn.Linear(3, 3)

def wrong():
    return 7

def frozen():
    return Autoencoder(8, 0).requires_grad_(False), torch.randn(1, 3, 8, 8)

def fails():
    return Autoencoder(8, 0), torch.randn(1, 5, 8, 8)

unset = None
"""


@pytest.fixture
def models(tmp_path, monkeypatch):
    (tmp_path / "my_models.py").write_text(MODELS)
    (tmp_path / "my_broken.py").write_text("import no_such_package")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for name in ("my_models", "my_broken"):
        sys.modules.pop(name, None)


def verdict(told: str) -> str:
    return next(line for line in told.splitlines() if line.startswith("verdict"))


def number(told: str, name: str) -> float:
    return float(next(line for line in told.splitlines() if line.startswith(name)).split()[1].rstrip("x"))


def test_a_model_that_is_mostly_its_quantizer_is_worth_it(models, capsys):
    assert run(["--model", "my_models:heavy", "--threads", "1", "--minutes", "0.1"]) == 0
    told = capsys.readouterr().out
    assert "OneHotQuantizer (codebook, channel_dim) at model.quantizer: N=2048 K=4096 D=16, 1 call a step" in told
    assert "0 of 2048 differ before training" in told
    assert verdict(told).startswith("verdict    worth it: a step is ")
    predicted, measured = (
        float(line.split()[1][:-1]) for line in told.splitlines() if line[:8] in ("predicte", "measured")
    )
    assert min(predicted, measured) > 1.5  # far from the threshold, whatever else the machine does


def test_a_model_that_is_hardly_its_quantizer_is_not(models, capsys):
    assert run(["--model", "my_models:light", "--threads", "1", "--minutes", "0.1"]) == 0
    told = capsys.readouterr().out
    # The prediction is the quantizer's share of a step, which noise hardly moves; whole steps differ by more than that.
    assert number(told, "predicted") < 1.05
    # The figure is printed with two digits: at 1.05 itself either verdict may be right.
    measured = number(told, "measured")
    assert measured == 1.05 or verdict(told).startswith("verdict    not worth it: ") == (measured < 1.05)


@pytest.mark.parametrize(
    "spec,sentence",
    [
        ("my_models", "--model must be PACKAGE.MODULE:FACTORY, got 'my_models'"),
        ("my_models:", "--model must be PACKAGE.MODULE:FACTORY, got 'my_models:'"),
        (
            "no_such_module:f",
            "importing 'no_such_module' failed: ModuleNotFoundError: No module named 'no_such_module'",
        ),
        ("my_broken:f", "importing 'my_broken' failed: ModuleNotFoundError: No module named 'no_such_package'"),
        ("my_models:absent", "'my_models' has no function 'absent'"),
        ("my_models:unset", "'my_models' has no function 'unset'"),
        ("my_models:broken", "broken() failed: OSError: no weights"),
        ("my_models:wrong", "wrong() must return a torch.nn.Module, (model, inputs) or (model, inputs, loss)"),
        ("my_models:bare", "bare() returned a model without example_inputs(): return (model, inputs) instead"),
        ("my_models:none", "no quantizer was found in the model: --help says which are known"),
        ("my_models:frozen", "the model returns no floating tensor with a gradient: return (model, inputs, loss)"),
    ],
)
def test_a_mistake_is_one_sentence(models, capsys, spec, sentence):
    assert run(["--model", spec, "--threads", "1"]) == 2
    captured = capsys.readouterr()
    assert captured.err == f"vqkernels bench: {sentence}\n" and captured.out == ""


def test_a_model_that_fails_is_one_sentence(models, capsys):
    assert run(["--model", "my_models:fails", "--threads", "1"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("vqkernels bench: the model failed: RuntimeError: ") and error.count("\n") == 1


def test_inputs_may_come_from_the_model_and_the_loss_from_what_it_returns(models):
    comparison = Comparison(load("my_models:Methods"), lambda: load("my_models:Methods"))
    assert comparison.quantizers()[0].endswith("at model.model.quantizer: N=64 K=8 D=16, 1 call a step")
    assert comparison.differing == 0


def test_help_says_what_a_factory_returns():
    done = subprocess.run(
        [sys.executable, "-m", "vqkernels", "bench", "--help"], capture_output=True, text=True, timeout=100, check=True
    )
    assert "(model, inputs, loss)" in done.stdout and "example_inputs()" in done.stdout and "--model" in done.stdout


class Wrapped(nn.Module):
    """A linear encoder and one quantizer; z is (B, 6, 8)."""

    def __init__(self, quantizer: nn.Module, channels_first: bool = False, image: bool = False) -> None:
        super().__init__()
        self.encoder, self.quantizer = nn.Linear(8, 8), quantizer
        self.channels_first, self.image = channels_first, image

    def forward(self, x):
        z = self.encoder(x)
        z = z.movedim(-1, 1) if self.channels_first else z
        return self.quantizer(z.unsqueeze(-1) if self.image else z)[:2]


def compared(quantizer: nn.Module, **layout: bool) -> Comparison:
    model = UserModel(Wrapped(quantizer, **layout), (torch.randn(3, 6, 8),), mean_squares)
    return Comparison(model, lambda: model)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"learnable_codebook": True, "ema_update": False},
        {"codebook_dim": 4},
        {"use_cosine_sim": True},
        {"heads": 2},
    ],
    ids=str,
)
def test_lucidrains_is_compared_with_its_drop_in(options):
    peer = pytest.importorskip("vector_quantize_pytorch").VectorQuantize
    comparison = compared(peer(8, 16, rotation_trick=False, **options))
    rows, dim = (36, 8) if "heads" in options else (18, options.get("codebook_dim", 8))
    line = f"lucidrains VectorQuantize at model.quantizer: N={rows} K=16 D={dim}, 1 call a step"
    assert comparison.quantizers() == [line] and comparison.differing == 0 and not comparison.ours


def test_lucidrains_channels_first_and_images():
    peer = pytest.importorskip("vector_quantize_pytorch").VectorQuantize
    assert compared(peer(8, 16, channel_last=False), channels_first=True).differing == 0
    assert compared(peer(8, 16, accept_image_fmap=True), channels_first=True, image=True).differing == 0


def test_diffusers_is_compared_with_its_drop_in():
    peer = pytest.importorskip("diffusers.models.autoencoders.vae").VectorQuantizer
    comparison = compared(peer(16, 8, beta=0.3, legacy=True), channels_first=True, image=True)
    assert comparison.quantizers() == ["diffusers VectorQuantizer at model.quantizer: N=18 K=16 D=8, 1 call a step"]
    assert comparison.differing == 0


def test_what_has_no_counterpart_is_refused():
    peer = pytest.importorskip("diffusers.models.autoencoders.vae").VectorQuantizer
    with pytest.raises(ModelError, match="the quantizer at '0.quantizer' has no counterpart here: a subclass of "):
        compared(type("Changed", (peer,), {})(16, 8, beta=0.3), channels_first=True, image=True)
    with pytest.raises(ModelError, match="mixes layers of vqkernels with others"):
        compared(nn.Sequential(VectorQuantizer(8, 16), Protocol()))


class Protocol(nn.Module):
    """Takes what a layer of ours gives, by the protocol."""

    def __init__(self):
        super().__init__()
        self.inner, self.channel_dim = OneHotQuantizer(torch.randn(16, 8), channel_dim=-1), -1
        self.codebook = self.inner.codebook

    def forward(self, result):
        return self.inner(result[0])


@pytest.mark.parametrize("options,named", [({"heads": 2}, "heads=2"), ({"metric": "dot"}, "metric='dot'")])
def test_a_layer_of_ours_without_a_one_hot_counterpart_is_refused(options, named):
    with pytest.raises(ModelError, match=f"'0.quantizer' has {named}, which the usual one-hot layer has not"):
        compared(VectorQuantizer(8, 16, **options))


@pytest.mark.parametrize("decay", [None, 0.9])
def test_our_own_layer_is_compared_with_the_one_hot_layer(decay):
    comparison = compared(VectorQuantizer(8, 16, ema_decay=decay))
    assert comparison.ours and comparison.differing == 0
    assert isinstance(comparison.slow[0].quantizer, OneHotQuantizer)
    assert isinstance(comparison.fast[0].quantizer, VectorQuantizer)


def test_the_one_hot_layer_follows_the_moving_averages():
    codebook, z = torch.randn(10, 4), torch.randn(2, 7, 4)
    usual = OneHotQuantizer(codebook.clone(), channel_dim=-1, ema_decay=0.5)
    usual(z)
    indices = reference.nearest(z.view(-1, 4), codebook)
    expected = codebook.clone()
    for k in indices.unique():
        rows = z.view(-1, 4)[indices == k]
        expected[k] = (0.5 * codebook[k] + 0.5 * rows.sum(0)) / (0.5 + 0.5 * len(rows))
    torch.testing.assert_close(usual.codebook, expected)


def test_amdahl_and_the_threshold():
    def timing(seconds):
        return Timing(seconds, seconds, seconds, 5)

    prediction = Prediction(timing(1.0), timing(0.5), timing(0.1))
    assert prediction.share == 0.5 and prediction.gain == pytest.approx(1 / 0.6)
    comparison = compared(VectorQuantizer(8, 16))
    told = [comparison.report(prediction, Measurement(timing(x), timing(1.0))) for x in (1.049, 1.051)]
    assert "verdict    not worth it" in told[0] and "below 1.05x" in told[0] and "verdict    worth it" in told[1]
