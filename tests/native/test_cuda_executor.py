"""The executor that runs CUDA block programs on the CPU: what it must let pass and what it must report."""

import pytest
from native.build import compiler, verdicts

CHECKS = (
    "a_barrier_orders_a_block",
    "a_missing_barrier_is_reported",
    "a_warp_barrier_orders_its_warp_alone",
    "a_write_after_another_thread_read_is_reported",
    "shuffles_and_ballots_move_the_values_of_lanes",
    "a_barrier_that_not_every_thread_reaches_is_reported",
    "unwritten_and_outside_memory_are_reported",
    "an_asynchronous_copy_lands_when_it_is_waited_for",
)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    if compiler() is None:
        pytest.skip("there is no C++ compiler")
    return verdicts("cuda_executor", tmp_path_factory.mktemp("executor"))


@pytest.mark.parametrize("name", CHECKS)
def test_executor(found, name):
    assert found[name] == ""


def test_every_check_is_listed(found):
    assert set(found) == set(CHECKS)
