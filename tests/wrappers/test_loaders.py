"""Every layer in every mode, saved after three steps and loaded in every way: the next step is that without."""

from functools import cache

import pytest
import torch
from wrappers import cells, loaders, steps
from wrappers.differences import reason


@cache
def saved_state(cell):
    return steps.snapshot(steps.trained(cell))


@cache
def went_on(cell):
    """The step without saving and loading."""
    return one_more_step(cell, steps.trained(cell))


def one_more_step(cell, model):
    return steps.result(model, steps.train(cell, model, steps=[steps.STEPS]))


@pytest.mark.parametrize(("way", "cell"), cells.grid(loaders.FLOAT32))
def test_a_loaded_model_has_the_same_bits_and_trains_on_as_without(way, cell, tmp_path):
    model, saved, expected = steps.trained(cell), saved_state(cell), went_on(cell)
    with reason(way, cell):
        loaded = loaders.FLOAT32[way](model, tmp_path)
        steps.assert_equal_tensors(steps.snapshot(loaded), saved)
        # A file that is mapped into memory is aligned otherwise, and some products are then summed in another order.
        steps.assert_equal(one_more_step(cell, loaded), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("way", "cell"), cells.grid(loaders.BFLOAT16))
def test_a_model_loaded_in_bfloat16_trains_on_as_one_that_was_cast(way, cell, tmp_path):
    """Its numbers are those that were saved, rounded at most; after the step its buffers are as wide as cast ones."""
    model, saved = steps.trained(cell), saved_state(cell)
    with reason(way, cell):
        loaded = loaders.BFLOAT16[way](model, tmp_path)
        state = steps.snapshot(loaded)
        rounded = {name: value.to(saved[name].dtype) for name, value in state.items()}
        steps.assert_equal_tensors(rounded, saved, rtol=2**-8, atol=1e-6)
        cast = loaders.fresh(cell).to(torch.bfloat16)
        widths = {name: buffer.dtype for name, buffer in cast.named_buffers(remove_duplicate=False)}
        cast.load_state_dict({n: v.to(widths.get(n, v.dtype)) for n, v in state.items()}, assign=True)
        steps.assert_equal(one_more_step(cell, loaded), one_more_step(cell, cast), rtol=2**-7, atol=1e-3)
