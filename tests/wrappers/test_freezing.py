"""Every way to freeze a layer, in every mode: the model trains, alone or under DDP, and the layer stays as it is."""

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from wrappers import cells, steps

OURS = [
    cell
    for cell, (name, _) in cells.CELLS.items()
    if cells.LAYERS[name].build.func.__module__.startswith("vqkernels.nn.")
]
FREEZES = {
    "freeze()": lambda layer: layer.freeze(),
    "requires_grad_(False)": lambda layer: layer.requires_grad_(False),
}


@pytest.fixture(params=["alone", "DDP"])
def wrap(request, tmp_path):
    if request.param == "alone":
        yield lambda model: model
        return
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    yield DistributedDataParallel
    dist.destroy_process_group()


def codes_and_statistics(model):
    """Without the projections, which `freeze()` leaves to the optimizer."""
    state = steps.without_metrics(steps.snapshot(model.quantizer))
    return {name: value for name, value in state.items() if "project_" not in name}


@pytest.mark.parametrize(("way", "cell"), cells.grid(FREEZES, among=OURS))
def test_a_frozen_layer_stays_while_the_model_around_it_trains(way, cell, wrap):
    model = steps.trained(cell)
    FREEZES[way](model.quantizer)
    before, encoder = codes_and_statistics(model), model.encoder.weight.detach().clone()
    steps.train(cell, model, wrap(model))
    steps.assert_equal_tensors(codes_and_statistics(model), before)
    assert not model.encoder.weight.equal(encoder)


@pytest.mark.parametrize(("way", "cell"), cells.grid(["no_grad"], among=OURS))
def test_a_training_forward_without_gradients_changes_nothing(way, cell):
    model = steps.trained(cell)
    before = steps.without_metrics(steps.snapshot(model))
    with torch.no_grad():
        model(steps.batch(steps.STEPS))
    steps.assert_equal_tensors(steps.without_metrics(steps.snapshot(model)), before)


# Quantizer dropout goes on in a frozen layer, and its counter with it.
@pytest.mark.parametrize(
    ("way", "cell"), cells.grid(["thawed"], among=[cell for cell in OURS if ", dropout" not in cell])
)
def test_a_layer_that_is_thawed_trains_as_one_that_never_was_frozen(way, cell):
    model = cells.build(cell)
    model.quantizer.freeze()
    model(steps.batch(0))
    model.quantizer.freeze(False)
    steps.assert_equal(steps.result(model, steps.train(cell, model)), steps.plain(cell))
