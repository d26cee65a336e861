"""Every layer in every mode on two gloo processes: default DDP, FSDP1, FSDP2, distributed checkpoints.

One test is one program for all cells, as processes take their time to start; it names every cell that fails.
"""

from collections.abc import Callable

import pytest
import ranks
from wrappers import cells, rank_scenarios, steps
from wrappers.differences import reason


def on_two_ranks(scenario, folder):
    """By cell, what each rank got."""
    one, other = ranks.start(rank_scenarios.__file__, 2, folder, scenario)
    return {cell: (one[cell], other[cell]) for cell in cells.CELLS}


def check_all(outcomes, check: Callable[..., None]):
    failed = {}
    for cell, (one, other) in outcomes.items():
        try:
            check(cell, one, other)
        except (AssertionError, pytest.fail.Exception) as error:
            failed[cell] = str(error)
    assert not failed, f"{len(failed)} of {len(outcomes)}:\n" + "\n".join(f"{cell}: {e}" for cell, e in failed.items())


def check_ranks(scenario, cell, one, other, alone):
    """Ranks agree to the bit, and with one process on the joined batch."""
    with reason(scenario, cell):
        check_ran(one, other)
        steps.assert_equal_tensors(one, alone, **steps.NEAR)
    if not isinstance(one, str):
        with reason("one rank and another", cell):
            steps.assert_equal_tensors(one, other)


def check_ran(*outcomes):
    errors = [outcome for outcome in outcomes if isinstance(outcome, str)]
    assert not errors, errors[0]


@pytest.mark.parametrize(
    "scenario", ["DDP", *(pytest.param(name, marks=pytest.mark.slow) for name in ("FSDP1", "FSDP2"))]
)
def test_ranks_train_as_one_process_on_the_joined_batch(scenario, tmp_path):
    def check(cell, one, other):
        model = cells.build(cell)
        steps.train(cell, model)
        check_ranks(scenario, cell, one, other, rank_scenarios.outcome(model, model))

    check_all(on_two_ranks(scenario, tmp_path), check)


def test_a_checkpoint_that_rank_0_alone_loads_reaches_the_other(tmp_path):
    scenario = "DDP after rank 0 loads"

    def check(cell, one, other):
        model = cells.build(cell, seed=5)
        model.load_state_dict(steps.plain(cell).state)
        steps.train(cell, model, steps=[steps.STEPS])
        check_ranks(scenario, cell, one, other, rank_scenarios.outcome(model, model))

    check_all(on_two_ranks(scenario, tmp_path), check)


@pytest.mark.slow
def test_a_distributed_checkpoint_of_two_ranks_trains_on_as_without(tmp_path):
    def check(cell, one, other):
        check_ran(one, other)
        differ = [name for got in (one, other) for name, same in got.items() if not same]
        with reason("distributed checkpoint, two ranks", cell):
            assert not differ, differ

    check_all(on_two_ranks("distributed checkpoint", tmp_path), check)
