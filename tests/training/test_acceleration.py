"""Speed flags: what is learned stays the same up to rounding, a run resumes, a checkpoint keeps its keys."""

import copy
import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch

from vqkernels.training import stages
from vqkernels.training.acceleration import Speed, SpeedConfig
from vqkernels.training.checkpoint import ImageFormat, read_export
from vqkernels.training.config import PriorConfig, RunConfig, VQVAEConfig
from vqkernels.training.data import load_images
from vqkernels.training.errors import UserError
from vqkernels.training.loop import train
from vqkernels.training.model_building import build_vqvae, load_models, load_vqvae
from vqkernels.training.stages import encode

CPU = torch.device("cpu")
PLAIN = SpeedConfig(channels_last="off", fused_optimizer=False)
CHOICES = {
    "channels last": SpeedConfig(channels_last="on", fused_optimizer=False),
    "fused": SpeedConfig(channels_last="off"),
    "bfloat16": SpeedConfig(amp="bfloat16"),
    "float16": SpeedConfig(amp="float16"),
    "compiled": SpeedConfig(compile=True),
}
# Relative difference of a loss from that of the plain run: order of summation, or a type of 8 or 11 bits (and a first
# step that float16 skips while it looks for its scale).
TOLERANCE = {"channels last": 1e-4, "fused": 1e-4, "compiled": 1e-4}
COMPILED = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
EVERY = [pytest.param(name, marks=[pytest.mark.slow, COMPILED]) if name == "compiled" else name for name in CHOICES]


def tiny(speed: SpeedConfig = PLAIN, **vqvae) -> RunConfig:
    return RunConfig(
        data="digits",
        log_every=1,
        checkpoint_every=100,
        picture_every=100,
        speed=speed,
        vqvae=VQVAEConfig(
            **{
                "hidden_channels": 16,
                "code_dim": 4,
                "codebook_size": 8,
                "downsamplings": 1,
                "residual_blocks": 1,
                "steps": 8,
                "batch_size": 128,
                "ema_decay": 0.9,
                "learning_rate": 1e-3,
                **vqvae,
            }
        ),
        prior=PriorConfig(hidden_channels=8, num_layers=2, head_channels=8, dropout=0.2, steps=8, batch_size=128),
    )


def stop_after(steps: int):
    done = []
    return lambda: done.append(None) or len(done) == steps


def losses(path: Path, stage: str) -> torch.Tensor:
    read = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return torch.tensor([line["loss"] for line in read if line["stage"] == stage and "loss" in line])


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("plain") / "run"
    assert train(tiny(), path).finished
    return path


@pytest.mark.parametrize("name", EVERY)
def test_the_losses_are_those_of_the_plain_step(plain, tmp_path, name):
    """And the checkpoint has the same names, shapes and types, so that any run reads it."""
    compiled = name == "compiled"  # the VQ-VAE alone, for compiling is slow
    assert train(tiny(CHOICES[name]), tmp_path, stage="vqvae" if compiled else "all").finished
    tolerance = TOLERANCE.get(name, 3e-2)
    torch.testing.assert_close(losses(tmp_path, "vqvae"), losses(plain, "vqvae"), rtol=tolerance, atol=0)
    if not compiled:
        tolerance = 1e-3 if name in ("channels last", "fused") else 0.1  # the codes may be others
        torch.testing.assert_close(losses(tmp_path, "prior"), losses(plain, "prior"), rtol=tolerance, atol=0)
    expected, found = read_export(plain).tensors, read_export(tmp_path).tensors
    if compiled:
        expected = {key: x for key, x in expected.items() if key.startswith("vqvae.")}
    assert {k: (x.shape, x.dtype) for k, x in expected.items()} == {k: (x.shape, x.dtype) for k, x in found.items()}
    assert load_vqvae(tmp_path, CPU)[0].encode(torch.zeros(1, 1, 8, 8)).shape == (1, 4, 4)


@pytest.mark.parametrize("name", [name for name in EVERY if name not in ("channels last", "fused")])
def test_an_interrupted_run_ends_in_the_same_bits(tmp_path, name):
    config, stage = tiny(CHOICES[name]), "all" if name == "bfloat16" else "vqvae"  # the others are slow
    assert train(config, tmp_path / "straight", stage=stage).finished
    assert not train(config, tmp_path / "halves", stage=stage, should_stop=stop_after(5)).finished
    if stage == "all":
        assert not train(config, tmp_path / "halves", resume=True, should_stop=stop_after(6)).finished
    assert train(config, tmp_path / "halves", stage=stage, resume=True).finished
    expected, found = (read_export(tmp_path / run).tensors for run in ("straight", "halves"))
    assert [key for key in expected if not torch.equal(expected[key], found[key])] == []


@pytest.mark.parametrize(("before", "after"), [("plain", "default"), ("default", "plain"), ("float16", "default")])
def test_a_run_goes_on_with_another_choice(plain, tmp_path, before, after):
    """Weights and averages of an optimizer come in the memory format that the checkpoint had."""
    speeds = {"plain": PLAIN, "default": SpeedConfig(), "float16": CHOICES["float16"]}
    assert not train(tiny(speeds[before]), tmp_path, stage="vqvae", should_stop=stop_after(4)).finished
    assert train(tiny(speeds[after]), tmp_path, stage="vqvae", resume=True).finished
    torch.testing.assert_close(losses(tmp_path, "vqvae"), losses(plain, "vqvae"), rtol=3e-2, atol=0)


def test_a_fused_step_reads_averages_in_the_order_of_its_weights(tmp_path):
    """The same averages in two memory formats give the same step."""
    model = torch.nn.Conv2d(4, 4, 3)
    start = {name: x.clone() for name, x in model.state_dict().items()}
    gradient = torch.randn(4, 4, 3, 3)
    stepped, state = [], {}
    for before, after in (("off", "on"), ("on", "on"), ("off", "off"), ("on", "off")):
        for number, choice in enumerate((before, after)):
            speed = Speed(SpeedConfig(channels_last=choice), CPU)
            layout = torch.channels_last if choice == "on" else torch.contiguous_format
            model = torch.nn.Conv2d(4, 4, 3).to(memory_format=layout)
            model.load_state_dict(start)
            optimizer = speed.optimizer(model.parameters(), 0.1)
            if number:
                speed.load(optimizer, {"optimizer": state})
            model.weight.grad = torch.empty_like(model.weight).copy_(gradient * (1 - 2 * number))
            model.bias.grad = torch.ones(4)
            optimizer.step()
            state = optimizer.state_dict()
        stepped.append(model.weight.detach())
    for other in stepped[1:]:
        torch.testing.assert_close(other, stepped[0])


def layout(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: x.stride() for name, x in model.state_dict().items()}


@pytest.mark.parametrize(("choice", "last"), [("auto", True), ("on", True), ("off", False)])
def test_whoever_reads_a_run_computes_in_the_layout_in_which_it_was_trained(tmp_path, choice, last):
    """A convolution rounds differently in another memory format, so that codes near a tie would be others."""
    config, seen = tiny(SpeedConfig(channels_last=choice)), []
    assert not train(config, tmp_path, should_stop=stop_after(9)).finished  # one step of the prior is done
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "encode", lambda vqvae, *rest: seen.append(layout(vqvae)) or encode(vqvae, *rest))
        trained = train(config, tmp_path, resume=True)
    expected = layout(trained.vqvae)
    kernels = [x for x in trained.vqvae.encoder.parameters() if x.dim() == 4 and min(x.shape[1:]) > 1]
    assert kernels and all(x.is_contiguous() != last for x in kernels)
    assert seen == [expected, expected]  # the codes of the prior, after an interruption as before it
    again = train(config, tmp_path, resume=True)
    for vqvae in (again.vqvae, load_vqvae(tmp_path, CPU)[0], load_models(tmp_path, CPU)[0]):
        assert layout(vqvae) == expected


@pytest.mark.parametrize("name", ["channels last", "fused", "bfloat16"])
def test_a_loaded_model_computes_what_the_trained_one_does(tmp_path, name):
    """In float32 whatever the precision of the steps: so do the evaluations, and the codes that the prior learns."""
    trained = train(tiny(CHOICES[name], likelihood="gaussian"), tmp_path, stage="vqvae")
    loaded, images = load_vqvae(tmp_path, CPU)[0], trained.data.held_out.batch(slice(64))
    with torch.no_grad():
        expected, found = trained.vqvae(images), loaded(images)
    assert found[0].dtype == torch.float32
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_mixed_precision_leaves_the_statistics_in_float32():
    """The sums of a step are those of its bfloat16 rows in float64, and so are their means, the codes."""
    config = tiny(SpeedConfig(amp="bfloat16"), ema_decay=0.0)
    torch.manual_seed(0)
    model = build_vqvae(config, ImageFormat(1, 8, 8, ()), CPU).train()
    seen = []
    model.quantizer.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].detach()))
    with Speed(config.speed, CPU).autocast():
        _, indices, losses = model(load_images("digits").train.batch(slice(128)))
    (z,) = seen
    assert z.dtype == torch.bfloat16 and losses.total.dtype == torch.float32
    rows = z.movedim(1, -1).flatten(0, -2).double()
    sums = torch.zeros(8, 4, dtype=torch.float64).index_add_(0, indices.flatten(), rows)
    counts = torch.bincount(indices.flatten(), minlength=8)
    quantizer = model.quantizer
    assert quantizer.codebook.dtype == quantizer.ema_counts.dtype == quantizer.ema_sums.dtype == torch.float32
    torch.testing.assert_close(quantizer.ema_counts, counts.float(), rtol=0, atol=0)
    torch.testing.assert_close(quantizer.ema_sums.double(), sums, rtol=1e-5, atol=1e-5)
    used = counts > 0
    torch.testing.assert_close(quantizer.codebook.double()[used], (sums / counts[:, None])[used], rtol=1e-5, atol=1e-6)


def test_mixed_precision_trains_weights_of_float32(tmp_path):
    trained = train(tiny(SpeedConfig(amp="bfloat16")), tmp_path, stage="vqvae")
    assert all(x.dtype == torch.float32 for x in trained.vqvae.parameters())
    assert any((x.bfloat16().float() != x).any() for x in trained.vqvae.parameters())


@pytest.mark.parametrize(
    ("stages", "mixed"), [("all", {"vqvae", "vae", "prior"}), ("autoencoder", {"vqvae", "vae"}), ("prior", {"prior"})]
)
def test_mixed_precision_is_that_of_the_chosen_stages(stages, mixed):
    config = SpeedConfig(amp="float16", amp_stages=stages)
    for stage in ("vqvae", "vae", "prior"):
        speed = Speed(config, CPU, stage)
        with speed.autocast():
            assert torch.is_autocast_enabled("cpu") == (stage in mixed)
        assert speed.scaler.is_enabled() == (stage in mixed)


def test_a_likelihood_is_computed_in_float32_under_mixed_precision():
    """What the decoder gives reaches the distribution in the type of the image."""
    config = tiny(SpeedConfig(amp="bfloat16"), likelihood="logistic_mixture")
    model = build_vqvae(config, ImageFormat(1, 8, 8, ()), CPU).train()
    images, seen = load_images("digits").train.batch(slice(128)), []
    model.decoder.register_forward_hook(lambda _, arguments, decoded: seen.append(decoded.detach()))
    with Speed(config.speed, CPU).autocast():
        reconstruction, _, losses = model(images)
    assert seen[0].dtype == torch.bfloat16 and reconstruction.dtype == torch.float32
    nats = -model.likelihood.log_prob(seen[0].float(), images).sum() / images.numel()
    torch.testing.assert_close(losses.reconstruction, nats, rtol=1e-6, atol=0)


@pytest.mark.slow
@COMPILED
def test_the_compiled_model_gives_the_same_indices():
    config = tiny(SpeedConfig(compile=True))
    torch.manual_seed(0)
    model = build_vqvae(config, ImageFormat(1, 8, 8, ()), CPU).train()
    speed = Speed(config.speed, CPU)
    images = load_images("digits").train.batch(slice(128))
    same = copy.deepcopy(model)
    _, expected, eager = same(images)
    _, found, compiled = speed.forward(model)(images)
    assert (found != expected).float().mean() < 1e-3  # but for ties within the rounding of a convolution
    torch.testing.assert_close(compiled.total, eager.total, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("speed", "sentence"),
    [
        (SpeedConfig(cuda_graphs=True), "speed.cuda_graphs needs speed.compile"),
        (SpeedConfig(compile=True, cuda_graphs=True), "--cuda-graphs needs a CUDA device, but the device is cpu"),
    ],
)
def test_what_cannot_be_done_is_said_before_a_directory_is_made(tmp_path, speed, sentence):
    config = dataclasses.replace(tiny(speed), device="cpu")
    with pytest.raises(UserError, match=sentence):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_compiling_without_a_compiler_is_one_sentence(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match=r"--compile needs a C\+\+ compiler"):
        Speed(SpeedConfig(compile=True), CPU)
