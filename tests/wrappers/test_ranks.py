"""Every layer in every mode on two gloo processes: DDP with default arguments, FSDP2, distributed checkpoints."""

from functools import cache

import pytest
from ranks import start
from wrappers import cells, rank_scenarios, steps
from wrappers.differences import reason


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What each rank got, by "scenario: cell"."""
    return start(rank_scenarios.__file__, 2, tmp_path_factory.mktemp("ranks"), seconds=400)


@cache
def alone(scenario, cell):
    """One process on the joined batch."""
    if scenario == "DDP after rank 0 loads":
        model = cells.build(cell, seed=5)
        model.load_state_dict(steps.plain(cell).state)
        steps.train(cell, model, steps=[steps.STEPS])
    else:
        model = cells.build(cell)
        steps.train(cell, model)
    return rank_scenarios.outcome(model, model)


@pytest.mark.parametrize("cell", cells.CELLS)
@pytest.mark.parametrize("scenario", [name for name in rank_scenarios.SCENARIOS if "checkpoint" not in name])
def test_ranks_agree_to_the_bit(outcomes, scenario, cell):
    one, other = (outcome[f"{scenario}: {cell}"] for outcome in outcomes)
    assert not isinstance(one, str), one
    steps.assert_equal_tensors(one, other)


@pytest.mark.parametrize("cell", cells.CELLS)
@pytest.mark.parametrize("scenario", [name for name in rank_scenarios.SCENARIOS if "checkpoint" not in name])
def test_ranks_train_as_one_process_on_the_joined_batch(outcomes, scenario, cell):
    got = outcomes[0][f"{scenario}: {cell}"]
    assert not isinstance(got, str), got
    with reason(scenario, cell):
        steps.assert_equal_tensors(got, alone(scenario, cell), **steps.NEAR)


@pytest.mark.parametrize("cell", cells.CELLS)
def test_a_distributed_checkpoint_of_two_ranks_trains_on_as_without(outcomes, cell):
    for outcome in outcomes:
        got = outcome[f"distributed checkpoint, 2 ranks: {cell}"]
        assert not isinstance(got, str), got
        assert all(got.values()), [name for name, same in got.items() if not same]
