"""Initialisation by k-means: from which rows, when, once, and what a checkpoint remembers."""

import copy
import warnings
from functools import partial

import pytest
import torch

from vqkernels.nn import ResidualVectorQuantizer, VectorQuantizer, initialisation
from vqkernels.nn.normalisation import unit
from vqkernels.nn.rows import RowLayout, Rows
from vqkernels.ops.kmeans import kmeans


@pytest.mark.parametrize("ema_decay", [None, 0.9])
@pytest.mark.parametrize("metric", ["euclidean", "dot", "cosine"])
def test_the_first_training_forward_quantizes_with_the_codes_of_k_means(metric, ema_decay, backend):
    layer = VectorQuantizer(6, 16, init="kmeans", metric=metric, ema_decay=ema_decay, seed=3, backend=backend)
    z = torch.randn(300, 6)
    rows = unit(z) if metric == "cosine" else z
    expected, _ = kmeans(rows, 16, seed=3, metric=metric, backend=backend)
    looked_up = unit(expected) if metric == "cosine" else expected
    quantized, indices, _ = layer(z)
    assert quantized.equal(looked_up[indices]) and layer.initialised
    if ema_decay is None:
        assert layer.codebook.equal(expected)
    before = layer.codebook.detach().clone()
    layer(z + 100)
    assert ema_decay is not None or layer.codebook.equal(before)


@pytest.mark.parametrize("shape,channel_dim", [((4, 50, 6), -1), ((4, 6, 50), 1), ((2, 6, 10, 9), 1)])
@pytest.mark.parametrize("number,separate", [(1, False), (2, False), (2, True)])
def test_layouts_heads_and_masks(shape, channel_dim, number, separate, backend):
    layer = VectorQuantizer(
        6, 8, init="kmeans", heads=number, separate_codebooks=separate, channel_dim=channel_dim, backend=backend
    )
    z = torch.randn(shape)
    mask = torch.rand(z.select(channel_dim, 0).shape) < 0.5
    z = torch.where(mask.unsqueeze(channel_dim), z, torch.nan)
    z.movedim(channel_dim, -1)[tuple(mask.nonzero()[3])].fill_(torch.inf)
    layer(z, mask=mask)
    rows = RowLayout.of(z, 6, channel_dim, mask=mask, heads=number, separate=separate).split(z)
    values = rows.values.movedim(rows.channel_dim, -1)
    if separate:
        expected, _ = kmeans(
            torch.stack([values[head][mask] for head in range(2)]), 8, batched=True, seed=layer.seed, backend=backend
        )
    else:
        expected, _ = kmeans(values[rows.mask], 8, seed=layer.seed, backend=backend)
    assert layer.codebook.equal(expected) and layer.codebook.isfinite().all()


def test_eval_and_frozen_forwards_do_not_initialise():
    layer = VectorQuantizer(4, 8, init="kmeans", ema_decay=0.9)
    before = copy.deepcopy(layer.state_dict())
    layer(torch.randn(50, 4), freeze=True)
    layer.eval()(torch.randn(50, 4))
    gradient = VectorQuantizer(4, 8, init="kmeans").requires_grad_(False)
    gradient(torch.randn(50, 4))
    assert not layer.initialised and not gradient.initialised
    assert all(before[name].equal(value) for name, value in layer.state_dict().items())


@pytest.mark.parametrize("build", [VectorQuantizer, partial(ResidualVectorQuantizer, levels=2)])
def test_batches_without_a_usable_row_do_not_spend_the_initialisation(build):
    layer = build(4, 8, init="kmeans", ema_decay=0.9)
    before = layer.codebook.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(torch.randn(0, 4))
        layer(torch.randn(20, 4), mask=torch.zeros(20, dtype=torch.bool))
        layer(torch.full((20, 4), torch.nan))
        assert not layer.initialised and layer.codebook.equal(before)
        layer(10 + torch.randn(20, 4))
    assert layer.initialised and (layer.codebook.sum(0) if build is VectorQuantizer else layer.codebook[0]).min() > 1


def test_masked_and_bad_rows_are_no_rows_for_the_warning():
    z = torch.randn(64, 4)
    z[:40], mask = torch.nan, torch.arange(64) < 43
    with pytest.warns(RuntimeWarning, match="k-means initialisation of 16 codes found 3 different usable rows"):
        VectorQuantizer(4, 16, init="kmeans", ema_decay=0.9)(z, mask=mask)


def test_fewer_rows_than_codes_are_said_and_give_different_codes():
    layer = VectorQuantizer(4, 32, init="kmeans", ema_decay=0.9)
    z = torch.randn(10, 4)
    with pytest.warns(RuntimeWarning, match="k-means initialisation of 32 codes found 10 different usable rows"):
        quantized, _, _ = layer(z)
    assert quantized.equal(z) and len(layer.codebook.unique(dim=0)) == 32


def test_the_sample_is_bounded_and_drawn_from_the_rows_that_count(monkeypatch):
    monkeypatch.setattr(initialisation, "ROWS_PER_CODE", 4)
    z = torch.arange(1000.0).view(1000, 1)
    mask = torch.arange(1000) % 3 == 0
    sample = initialisation.sample_rows(Rows(z, mask, 1, False), 8, torch.tensor(0))
    drawn = sample.values[sample.mask]
    assert sample.values.shape == (1, 32, 1) and len(drawn.unique()) == 32 and (drawn % 3 == 0).all()
    assert drawn.min() < 100 and drawn.max() > 900  # from all over the batch
    rows = RowLayout.of(z.expand(1000, 2), 2, 1, mask=mask, heads=2, separate=True).split(z.expand(1000, 2))
    assert initialisation.sample_rows(rows, 8, torch.tensor(0)).values.shape == (2, 32, 1)
    layer = VectorQuantizer(1, 8, init="kmeans", ema_decay=0.9)
    layer(z, mask=mask)
    assert layer.usage == 1
    assert initialisation.sample_size(10**6, 64) == 10**6  # never fewer rows than codes


def test_a_checkpoint_remembers_and_loaded_codes_are_never_overwritten(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    layer = VectorQuantizer(4, 8, init="kmeans", ema_decay=0.9)
    fresh = copy.deepcopy(layer.state_dict())
    layer(torch.randn(60, 4))
    safetensors.save_model(layer, str(tmp_path / "layer.safetensors"))
    other = VectorQuantizer(4, 8, init="kmeans", ema_decay=0.9)
    other.load_state_dict(safetensors.load_file(str(tmp_path / "layer.safetensors")))
    z = torch.randn(60, 4)
    assert all(a.equal(b) for a, b in zip(layer(z), other(z), strict=True)) and other.codebook.equal(layer.codebook)
    other.load_state_dict(fresh)  # and one that had not begun begins
    other(z)
    assert other.initialised and other.codebook.abs().max() > 1 / 8

    plain = VectorQuantizer(4, 8, ema_decay=0.9)
    plain.load_state_dict(layer.state_dict())  # how the codes began does not matter to it
    with pytest.raises(
        RuntimeError, match='a.initialised: this layer has init="kmeans", but the checkpoint is of a layer'
    ):
        torch.nn.ModuleDict({"a": other}).load_state_dict(torch.nn.ModuleDict({"a": plain}).state_dict())
    other.reset_parameters()
    assert not other.initialised
    other.load_state_dict(plain.state_dict(), strict=False)
    codes = other.codebook.clone()
    other(z, freeze=True)
    other.ema_decay = 0.0
    assert other.initialised and other.codebook.equal(codes)


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_one_recompilation_after_the_initialisation(ema_decay, compiler):
    torch._dynamo.reset()
    plain = VectorQuantizer(6, 16, init="kmeans", ema_decay=ema_decay, revive="rows", channel_dim=1)
    twin = copy.deepcopy(plain)
    compiled = torch.compile(twin, fullgraph=True, backend=compiler)
    torch._dynamo.utils.counters.clear()
    for _ in range(4):
        z = torch.randn(4, 6, 20)
        a, b = z.clone().requires_grad_(), z.clone().requires_grad_()
        for layer, leaf in ((plain, a), (compiled, b)):
            quantized, _, loss = layer(leaf)
            (quantized.square().sum() + loss).backward()
        torch.testing.assert_close(a.grad, b.grad)
        for name, value in plain.state_dict().items():
            torch.testing.assert_close(twin.state_dict()[name], value, msg=f"{name} differs")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
