"""Every layer in every mode, saved after three steps and loaded in every way: the next step is that without."""

from functools import cache

import pytest
import torch
from wrappers import cells, loaders, steps
from wrappers.differences import reason


def grid(ways):
    return [pytest.param(way, cell, id=f"{way}: {cell}") for way in ways for cell in cells.CELLS]


@cache
def saved_state(cell):
    return steps.snapshot(steps.trained(cell))


@cache
def went_on(cell):
    """The step without saving and loading."""
    return one_more_step(cell, steps.trained(cell))


def one_more_step(cell, model):
    return steps.result(model, steps.train(cell, model, steps=[steps.STEPS]))


@pytest.mark.parametrize(("way", "cell"), grid(loaders.FLOAT32))
def test_a_loaded_model_trains_on_to_the_same_bits(way, cell, tmp_path):
    model, saved, expected = steps.trained(cell), saved_state(cell), went_on(cell)
    with reason(way, cell):
        loaded = loaders.FLOAT32[way](model, tmp_path)
        steps.assert_equal_tensors(steps.snapshot(loaded), saved)
        steps.assert_equal(one_more_step(cell, loaded), expected)


@pytest.mark.parametrize(("way", "cell"), grid(loaders.BFLOAT16))
def test_a_model_loaded_in_bfloat16_trains_on_as_one_that_was_cast(way, cell, tmp_path):
    """Its numbers are those that were saved, rounded at most; its dtypes and its next step those of a cast model."""
    model, saved = steps.trained(cell), saved_state(cell)
    with reason(way, cell):
        loaded = loaders.BFLOAT16[way](model, tmp_path)
        state = steps.snapshot(loaded)
        rounded = {name: value.to(saved[name].dtype) for name, value in state.items()}
        steps.assert_equal_tensors(rounded, saved, rtol=2**-8, atol=1e-6)
        cast = loaders.fresh(cell).to(torch.bfloat16)
        cast.load_state_dict(state)
        steps.assert_equal(one_more_step(cell, loaded), one_more_step(cell, cast))
