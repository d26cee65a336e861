"""Freezing: one rule for `no_grad`, `requires_grad_(False)`, `freeze=True` and `freeze()`."""

import copy
import pickle

import pytest
import torch
from torch import nn

from vqkernels.nn import ResidualVectorQuantizer, VectorQuantizer

LAYERS = {
    "gradient": lambda **options: VectorQuantizer(4, 8, **options),
    "EMA": lambda **options: VectorQuantizer(4, 8, ema_decay=0.5, **options),
    "residual": lambda **options: ResidualVectorQuantizer(4, 8, 2, **options),
    "residual EMA": lambda **options: ResidualVectorQuantizer(4, 8, 2, ema_decay=0.5, **options),
}
WAYS = {
    "freeze()": lambda layer: layer.freeze(),
    "requires_grad_(False)": lambda layer: layer.requires_grad_(False),
    "freeze=True": None,
}


def step(layer, optimizer, **arguments):
    z = torch.randn(30, 4, requires_grad=True)
    quantized, _, loss = layer(z, **arguments)
    if optimizer is not None:
        optimizer.zero_grad()
    (quantized.square().sum() + loss.sum()).backward()
    if optimizer is not None:
        optimizer.step()
    return z.grad


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", LAYERS)
def test_a_frozen_codebook_stays_and_the_input_gets_its_gradient(name, way):
    layer = LAYERS[name](revive="rows")
    parameters = list(layer.parameters())
    optimizer = torch.optim.Adam(parameters, lr=0.1, weight_decay=0.1) if parameters else None
    step(layer, optimizer)
    before = layer.codebook.detach().clone()
    if WAYS[way] is not None:
        WAYS[way](layer)
    for _ in range(3):
        gradient = step(layer, optimizer, **({"freeze": True} if way == "freeze=True" else {}))
        assert gradient.abs().sum() > 0
    assert layer.codebook.equal(before)
    layer.freeze(False).requires_grad_(True)
    step(layer, optimizer)
    assert not layer.codebook.equal(before)


def test_frozen_stays_on_copies_and_does_not_sample():
    layer = VectorQuantizer(4, 8, temperature=100.0, ema_decay=0.5).freeze()
    z = torch.randn(50, 4)
    nearest = layer.eval()(z)[1]
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin.frozen and twin.train()(z)[1].equal(nearest)


def test_a_forward_without_gradients_learns_nothing():
    for build in LAYERS.values():
        layer = build(init="kmeans", revive="rows")
        before = copy.deepcopy(layer.state_dict())
        with torch.no_grad():
            layer(torch.randn(40, 4))
        assert all(x.equal(before[name]) for name, x in layer.state_dict().items())


@pytest.mark.parametrize(
    "options", [dict(), dict(ema_decay=0.5), dict(init="kmeans"), dict(ema_decay=0.5, init="kmeans")]
)
@pytest.mark.parametrize("use_buffers", [False, True])
def test_batch_norm_statistics_of_an_averaged_model_move_no_code(options, use_buffers):
    from torch.optim.swa_utils import AveragedModel, update_bn

    layer = VectorQuantizer(4, 8, **options)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), layer)
    averaged = AveragedModel(model, use_buffers=use_buffers)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        quantized, _, loss = model(torch.randn(40, 4))
        optimizer.zero_grad()
        (quantized.sum() + loss).backward()
        optimizer.step()
        averaged.update_parameters(model)
    before = averaged.module[2].codebook.detach().clone()
    update_bn([torch.randn(40, 4) for _ in range(3)], averaged)
    assert averaged.module[2].codebook.equal(before) and averaged.module[1].num_batches_tracked == 3


def test_results_of_a_frozen_forward_reach_the_parameter_without_a_gradient():
    """DistributedDataParallel waits for every Parameter that takes part; tests/nn/test_ranks.py trains with it."""
    layer, seen = VectorQuantizer(4, 8), []
    layer.codebook.register_post_accumulate_grad_hook(lambda parameter: seen.append(parameter.grad))
    for output in (0, 2):
        layer(torch.randn(10, 4), freeze=True)[output].sum().backward()
    assert layer.codebook.grad is None
