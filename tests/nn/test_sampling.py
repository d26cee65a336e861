"""Stochastic quantization in the layer: when it draws, that draws differ, and that everything else is as usual."""

import copy

import pytest
import torch

import vqkernels
from vqkernels.nn import VectorQuantizer
from vqkernels.nn.random import step_key


@pytest.mark.parametrize("metric", ["euclidean", "dot", "cosine"])
@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_the_draws_are_those_of_sample_code_and_the_rest_follows_them(metric, ema_decay, backend):
    layer = VectorQuantizer(4, 16, metric=metric, temperature=0.5, ema_decay=ema_decay, seed=3, backend=backend)
    with torch.no_grad():
        layer.codebook.normal_()
    for step in range(3):
        codes = layer.codes.detach().clone()
        z = torch.randn(50, 4)
        rows = z / z.norm(dim=1, keepdim=True) if metric == "cosine" else z
        quantized, indices, loss = layer(z)
        key = step_key(torch.tensor(3), torch.tensor(step))
        search = "dot" if metric == "cosine" else metric
        expected = vqkernels.sample_code(rows, codes, temperature=0.5, seed=key, metric=search, backend=backend)
        assert (indices == expected).float().mean() > 0.95  # the last bit of a scaled row may decide a draw
        torch.testing.assert_close(quantized, codes[indices])
        error = (rows - codes[indices]).square().mean()
        torch.testing.assert_close(loss, (1.25 if ema_decay is None else 0.25) * error)
        assert layer.counts.equal(torch.bincount(indices, minlength=16))
    assert layer.sample_steps == 3


def test_draws_differ_between_steps_and_seeds_and_not_between_runs(backend):
    def run(seed):
        torch.manual_seed(0)
        layer = VectorQuantizer(4, 16, temperature=1.0, seed=seed, backend=backend)
        z = torch.randn(200, 4)
        return torch.stack([layer(z)[1] for _ in range(3)])

    once = run(0)
    assert once.equal(run(0)) and not run(1).equal(once) and not run(-1).equal(once)
    assert (once[0] != once[1]).float().mean() > 0.5 and (once[1] != once[2]).float().mean() > 0.5


def test_frequencies_follow_the_softmax(backend):
    layer = VectorQuantizer(1, 3, temperature=2.0, backend=backend)
    with torch.no_grad():
        layer.codebook.copy_(torch.tensor([[0.0], [1.0], [2.0]]))
    z = torch.full((60000, 1), 0.5)
    layer(z)
    expected = torch.softmax(-(0.5 - layer.codebook.detach().flatten()).square() / 2.0, 0)
    torch.testing.assert_close(layer.counts / 60000, expected, atol=0.01, rtol=0)


def test_the_nearest_code_in_eval_and_when_frozen(backend):
    layer = VectorQuantizer(4, 16, temperature=10.0, ema_decay=0.9, backend=backend)
    layer(torch.randn(100, 4))
    z = torch.randn(50, 4)
    nearest = vqkernels.nearest_code(z, layer.codebook, backend=backend)
    state = copy.deepcopy(layer.state_dict())
    assert layer(z, freeze=True)[1].equal(nearest) and layer.eval()(z)[1].equal(nearest)
    assert all(state[name].equal(value) for name, value in layer.state_dict().items())


@pytest.mark.parametrize("heads", [(1, False), (2, False), (2, True)])
def test_masks_heads_and_projections(heads, backend):
    layer = VectorQuantizer(
        6,
        16,
        temperature=1.0,
        heads=heads[0],
        separate_codebooks=heads[1],
        codebook_dim=4,
        channel_dim=1,
        backend=backend,
    )
    mask = torch.rand(2, 9) < 0.5
    z = torch.where(mask.unsqueeze(1), torch.randn(2, 6, 9), torch.nan).requires_grad_()
    quantized, indices, loss = layer(z, mask=mask)
    (quantized.sum() + loss).backward()
    assert indices[~mask].eq(-1).all() and indices[mask].ge(0).all() and z.grad.isfinite().all()
    assert quantized.equal(layer.decode(indices))


def test_a_checkpoint_goes_on_with_the_next_draws(backend):
    layer, other = (VectorQuantizer(4, 16, temperature=1.0, ema_decay=0.9, backend=backend) for _ in range(2))
    z = torch.randn(100, 4)
    layer(z)
    other.load_state_dict(layer.state_dict())
    assert layer(z)[1].equal(other(z)[1])


def test_compiles_once_for_all_steps():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    layer = VectorQuantizer(4, 16, temperature=1.0, ema_decay=0.9, seed=5)
    twin = copy.deepcopy(layer)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    for _ in range(4):
        z = torch.randn(100, 4)
        assert compiled(z)[1].equal(layer(z)[1])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_a_temperature_is_positive():
    for bad in (0, -1.0, float("nan"), "hot"):
        with pytest.raises(ValueError, match="temperature must be None or a positive number, got"):
            VectorQuantizer(4, 16, temperature=bad)
