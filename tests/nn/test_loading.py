"""Checkpoints: the documented keys, safetensors there and back, and errors that say what to do."""

import pytest
import torch

from vqkernels.nn import VectorQuantizer

KEYS = {
    "plain": (dict(), {"codebook", "counts"}),
    "ema": (dict(ema_decay=0.9), {"codebook", "counts", "ema_counts", "ema_sums", "ema_steps"}),
    "manual": (
        dict(ema_decay=0.9, ema_update="manual", revive="rows"),
        {"codebook", "counts", "ema_counts", "ema_sums", "ema_steps", "seed"},
    ),
    "revival": (dict(revive="rows"), {"codebook", "counts", "ema_counts", "ema_steps", "seed"}),
    "projection": (
        dict(codebook_dim=3),
        {"codebook", "counts", "project_in.weight", "project_in.bias", "project_out.weight", "project_out.bias"},
    ),
    "sampled": (dict(temperature=1.0), {"codebook", "counts", "sample_steps", "seed"}),
    "initialised": (dict(init="kmeans"), {"codebook", "counts", "initialised", "seed"}),
    "heads": (dict(heads=2, separate_codebooks=True), {"codebook", "counts"}),
}


@pytest.mark.parametrize("name", KEYS)
def test_the_keys_are_the_documented_ones(name):
    arguments, keys = KEYS[name]
    assert set(VectorQuantizer(4, 8, **arguments).state_dict()) == keys


@pytest.mark.parametrize("name", KEYS)
def test_safetensors_there_and_back(name, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    arguments, _ = KEYS[name]
    layer = VectorQuantizer(4, 8, **arguments)
    layer(torch.randn(50, 4))
    safetensors.save_model(layer, str(tmp_path / "layer.safetensors"))
    other = VectorQuantizer(4, 8, **arguments)
    other.load_state_dict(safetensors.load_file(str(tmp_path / "layer.safetensors")))
    z = torch.randn(20, 4)
    for a, b in zip(layer(z), other(z), strict=True):
        assert a.equal(b)
    for key, value in layer.state_dict().items():
        assert other.state_dict()[key].equal(value), key


def test_training_goes_on_to_the_same_bits_after_a_checkpoint(backend):
    arguments = dict(ema_decay=0.9, revive="rows", backend=backend)
    batches = [torch.randn(60, 4) * (1 + i) for i in range(6)]
    straight, resumed = VectorQuantizer(4, 16, **arguments), VectorQuantizer(4, 16, **arguments)
    for z in batches[:3]:
        straight(z)
    resumed.load_state_dict(straight.state_dict())
    for z in batches[3:]:
        assert all(a.equal(b) for a, b in zip(straight(z), resumed(z), strict=True))
    assert all(straight.state_dict()[key].equal(value) for key, value in resumed.state_dict().items())


@pytest.mark.parametrize(
    "saved,ours,message",
    [
        (dict(codebook_size=16), dict(), "a.codebook was saved with codebook_size=16 where this layer has 8: build"),
        (dict(dim=6), dict(), "a.codebook was saved with channels per code=6 where this layer has 4"),
        (dict(heads=2, separate_codebooks=True), dict(), "build it with separate_codebooks=True"),
        (dict(), dict(heads=2, separate_codebooks=True), "build it with separate_codebooks=False"),
        (dict(), dict(ema_decay=0.9), "a.ema_sums: this layer has ema_decay set, .* build it with ema_decay=None"),
        (
            dict(ema_decay=0.9),
            dict(),
            "a.ema_sums: the codebook was trained by moving averages, .* build it with ema_decay",
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit_says_what_to_do(saved, ours, message):
    base = dict(dim=4, codebook_size=8)
    state = torch.nn.ModuleDict({"a": VectorQuantizer(**(base | saved))}).state_dict()
    with pytest.raises(RuntimeError, match=message):
        torch.nn.ModuleDict({"a": VectorQuantizer(**(base | ours))}).load_state_dict(state)


def test_a_gradient_codebook_goes_on_by_moving_averages_with_strict_false():
    saved, layer = VectorQuantizer(4, 8), VectorQuantizer(4, 8, ema_decay=0.9)
    result = layer.load_state_dict(saved.state_dict(), strict=False)
    assert set(result.missing_keys) == {"ema_counts", "ema_sums", "ema_steps"} and result.unexpected_keys == []
    assert layer.codebook.equal(saved.codebook) and layer.ema_steps == 0


def test_loading_forgets_statistics_that_wait():
    layer = VectorQuantizer(4, 8, ema_decay=0.9, ema_update="manual")
    state = {key: value.clone() for key, value in layer.state_dict().items()}
    layer(torch.randn(10, 4))
    layer.load_state_dict(state)
    codes = layer.codebook.clone()
    layer.update_codebook()
    assert layer.codebook.equal(codes) and layer.counts.eq(0).all()


def test_a_layer_on_the_meta_device_can_be_filled():
    with torch.device("meta"):
        layer = VectorQuantizer(4, 8, ema_decay=0.9)
    source = VectorQuantizer(4, 8, ema_decay=0.9)
    layer.load_state_dict(source.state_dict(), assign=True)
    assert layer.codebook.equal(source.codebook)
