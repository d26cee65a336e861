"""Every layer in every mode, wrapped in every way that works in one process: after three steps all is as without.

`DIFFERENCES` of `wrappers.differences` names what is another way on purpose.
"""

import pytest
from wrappers import averaged, cells, single, steps
from wrappers.differences import reason
from wrappers.frameworks import FRAMEWORKS

# How the tensors are called that hold the codes, or move them.
CODES = (".codebook", ".embed", ".embed_sum", "embedding.weight", "codebook.weight", "transform.weight")
# A compilation takes seconds: a few cells are compiled.
COMPILED = tuple(f"VectorQuantizer, {mode}" for mode in ("EMA", "k-means", "temperature")) + (
    "ResidualVectorQuantizer, dropout",
)


@pytest.mark.parametrize(("wrapper", "cell"), cells.grid(single.EXACT | FRAMEWORKS))
def test_a_wrapped_model_trains_to_the_same_bits(wrapper, cell):
    with reason(wrapper, cell):
        steps.assert_equal((single.EXACT | FRAMEWORKS)[wrapper](cell), steps.plain(cell))


@pytest.mark.parametrize(("wrapper", "cell"), cells.grid(single.COMPILED, among=cells.matching(COMPILED)))
def test_a_compiled_model_trains_as_it_does_without(wrapper, cell):
    with reason(wrapper, cell):
        steps.assert_equal(single.COMPILED[wrapper](cell), steps.plain(cell), **steps.NEAR)


@pytest.mark.parametrize(("name", "cell"), cells.grid(averaged.AVERAGES))
def test_an_averaged_model_holds_the_averages(name, cell):
    with reason(name, cell):
        steps.assert_equal(averaged.averaged(name, cell)[0], averaged.by_hand(name, cell), **steps.NEAR)


@pytest.mark.parametrize(("name", "cell"), cells.grid(["update_bn"]))
def test_update_bn_moves_no_code(name, cell):
    with reason(name, cell):
        _, wrapper = averaged.averaged("AveragedModel", cell)
        moved = averaged.moved_by_update_bn(wrapper, wrapper.module)
        assert set(moved.values()) <= {0.0}, moved


@pytest.mark.parametrize(
    ("name", "cell"), cells.grid(averaged.AVERAGES, among=[cell for cell in cells.CELLS if "k-means" in cell])
)
def test_training_on_from_an_averaged_model_keeps_its_codes(name, cell):
    """A flag of the first k-means that no average holds would start the codes anew."""
    with reason(f"training on from {name}", cell):
        _, wrapper = averaged.averaged(name, cell)
        module = averaged.AVERAGES[name].module(wrapper)
        expected = averaged.after_one_more_step(cell, module, flagged=True)
        steps.assert_equal_tensors(averaged.after_one_more_step(cell, module, flagged=False), expected)


@pytest.mark.parametrize("cell", cells.CELLS)
def test_the_three_steps_move_the_codes(cell):
    """Equality would say little of layers that stay as they are."""
    start, end = cells.build(cell), steps.plain(cell)
    name = next(n for n in end.state if n.startswith("quantizer.") and n.endswith(CODES))
    moved = (end.state[name] != start.state_dict()[name]).any(-1).float().mean()
    assert (moved > 0.2) if "fixed" not in cell else moved == 0
