"""The CUDA segment sums without a GPU: their block programs, thread by thread, against sums written out plainly."""

import pytest
from native.build import compiler, verdicts

CHECKS = (
    "whole_segments",
    "segments_over_chunk_ends",
    "a_segment_that_ends_with_its_chunk",
    "partials_are_added_in_chunk_order",
    "one_huge_segment",
    "codes_without_rows_get_zeros",
    "masked_poisoned_and_outside_rows_give_nothing",
    "no_rows",
    "one_row_one_code_one_channel",
    "heads_and_batches_in_both_layouts",
    "every_type_alone_and_in_packets",
    "more_channels_than_a_block_has_lanes",
    "the_codebook_gradient",
    "integers_sum_exactly_whatever_the_order",
    "the_order_of_threads_changes_nothing",
    "the_workspace_holds_every_part_apart",
    "keys_have_as_many_bits_as_they_need",
    "offsets_pass_two_to_the_31",
)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    if compiler() is None:
        pytest.skip("there is no C++ compiler")
    return verdicts("cuda_statistics", tmp_path_factory.mktemp("statistics"))


@pytest.mark.parametrize("name", CHECKS)
def test_segment_sums(found, name):
    assert found[name] == ""


def test_every_check_is_listed(found):
    assert set(found) == set(CHECKS)
