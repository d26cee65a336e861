"""Several gloo processes against one process on the joined batch; every layer is built before the group exists."""

import pytest
import torch
from nn import rank_scenarios
from ranks import start


@pytest.fixture(scope="module")
def alone():
    return rank_scenarios.run(0, 1)


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request, tmp_path_factory):
    """What each rank computed."""
    return start(rank_scenarios.__file__, request.param, tmp_path_factory.mktemp("ranks"))


# Without a common batch the ranks draw other rows than one process does; what they share is asserted below.
NOT_JOINED = {"manual revived", "dropped"}


@pytest.mark.parametrize("scenario", rank_scenarios.NAMES)
def test_ranks_agree_to_the_bit(ranks, scenario):
    local = rank_scenarios.LOCAL.get(scenario, set())
    for other in ranks[1:]:
        assert set(other[scenario]) == set(ranks[0][scenario])
        for name, value in ranks[0][scenario].items():
            assert name in local or value.equal(other[scenario][name]), name


@pytest.mark.parametrize("scenario", [name for name in rank_scenarios.NAMES if name not in NOT_JOINED])
def test_ranks_compute_what_one_process_does_on_the_joined_batch(ranks, alone, scenario):
    local = rank_scenarios.LOCAL.get(scenario, set())
    for name, value in alone[scenario].items():
        if name not in local:
            torch.testing.assert_close(ranks[0][scenario][name], value, rtol=1e-4, atol=1e-5, msg=f"{name} differs")


def test_the_scenarios_revive_and_move(alone):
    """Equality would say little of layers that stand still."""
    for name in rank_scenarios.LAYERS:
        start, end = rank_scenarios.build(name), alone[name]
        assert (end["codebook"] != start.codebook).any(-1).float().mean() > 0.7
    revived, plain = alone["revived"]["codebook"], alone["ema"]["codebook"]
    assert not revived.equal(plain)
