"""The index maps of the tensor-core search against the PTX ISA's tables, swizzles, groups and the merge of bests."""

import pytest
from native.build import compiler, verdicts

CHECKS = (
    "fragments_are_those_of_the_isa",
    "addresses_bring_the_fragments",
    "swizzles_permute_and_avoid_bank_conflicts",
    "a_warp_multiplies_swizzled_operands",
    "groups_partition_the_codes",
    "merging_equals_a_sort_whatever_the_order",
    "padding_of_channels",
)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    if compiler() is None:
        pytest.skip("there is no C++ compiler")
    return verdicts("cuda_fragment", tmp_path_factory.mktemp("fragment"))


@pytest.mark.parametrize("name", CHECKS)
def test_fragment(found, name):
    assert found[name] == ""


def test_every_check_is_listed(found):
    assert set(found) == set(CHECKS)
