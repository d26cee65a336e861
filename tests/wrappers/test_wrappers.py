"""Every layer in every mode, wrapped in every way that works in one process: after three steps all is as without.

`DIFFERENCES` of `wrappers.differences` names what is another way on purpose.
"""

import pytest
from wrappers import averaged, cells, steps
from wrappers.differences import reason
from wrappers.frameworks import FRAMEWORKS
from wrappers.single import COMPILED, EXACT

# How the tensors are called that hold the codes, or move them.
CODES = (".codebook", ".embed", ".embed_sum", "embedding.weight", "codebook.weight", "transform.weight")
# A compilation takes a second or two: in the short suite one layer of each kind.
COMPILED_ALWAYS = ("VectorQuantizer, ", "ResidualVectorQuantizer, ", "SimVQ, ", "EnCodec VectorQuantization, ")


def grid(wrappers, quick=None):
    return [
        pytest.param(wrapper, cell, id=f"{wrapper}: {cell}", marks=[] if quick is None or quick(cell) else slow)
        for wrapper in wrappers
        for cell in cells.CELLS
    ]


slow = [pytest.mark.slow]


@pytest.mark.parametrize(("wrapper", "cell"), grid(EXACT | FRAMEWORKS))
def test_a_wrapped_model_trains_to_the_same_bits(wrapper, cell):
    with reason(wrapper, cell):
        steps.assert_equal((EXACT | FRAMEWORKS)[wrapper](cell), steps.plain(cell))


@pytest.mark.parametrize(("wrapper", "cell"), grid(COMPILED, lambda cell: cell.startswith(COMPILED_ALWAYS)))
def test_a_compiled_model_trains_as_it_does_without(wrapper, cell):
    with reason(wrapper, cell):
        steps.assert_equal(COMPILED[wrapper](cell), steps.plain(cell), **steps.NEAR)


@pytest.mark.parametrize(("name", "cell"), grid(averaged.AVERAGES))
def test_an_averaged_model_holds_the_averages(name, cell):
    with reason(name, cell):
        steps.assert_equal(averaged.averaged(name, cell)[0], averaged.by_hand(name, cell), **steps.NEAR)


@pytest.mark.parametrize("cell", cells.CELLS)
def test_update_bn_moves_no_code(cell):
    _, wrapper = averaged.averaged("AveragedModel", cell)
    with reason("update_bn", cell):
        moved = averaged.moved_by_update_bn(wrapper, wrapper.module)
        assert set(moved.values()) <= {0.0}, moved


@pytest.mark.parametrize("name", averaged.AVERAGES)
@pytest.mark.parametrize("cell", [cell for cell in cells.CELLS if "k-means" in cell])
def test_training_on_from_an_averaged_model_keeps_its_codes(name, cell):
    """A flag of the first k-means that no average holds would start the codes anew."""
    _, wrapper = averaged.averaged(name, cell)
    before, after = averaged.codes_survive_training(cell, averaged.AVERAGES[name].module(wrapper))
    steps.assert_equal_tensors({"codes": after}, {"codes": before}, rtol=0, atol=1e-5)


@pytest.mark.parametrize("cell", cells.CELLS)
def test_the_three_steps_move_the_codes(cell):
    """Equality would say little of layers that stay as they are."""
    start, end = cells.build(cell), steps.plain(cell)
    name = next(n for n in end.state if n.startswith("quantizer.") and n.endswith(CODES))
    moved = (end.state[name] != start.state_dict()[name]).any(-1).float().mean()
    assert (moved > 0.2) if "fixed" not in cell else moved == 0
