"""Two gloo processes whose layers were built before the process group, where the peer no longer shares statistics."""

import pytest
import torch
from dropin import lucidrains_ranks
from ranks import start


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return start(lucidrains_ranks.__file__, 2, tmp_path_factory.mktemp("ranks"))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in lucidrains_ranks.LAYERS if name != "not synced"])
def test_ranks_hold_the_same_bits(name, ranks):
    one, other = (states[name] for states in ranks)
    assert all(value.equal(other[key]) and value.isfinite().all() for key, value in one.items())


@pytest.mark.slow
def test_ranks_together_are_one_process_with_the_joined_batch(ranks):
    alone = lucidrains_ranks.run(0, 1)
    for name in ("ema", "heads"):
        for key, value in alone[name].items():
            torch.testing.assert_close(ranks[0][name][key], value, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_layer_told_not_to_share_does_not(ranks):
    one, other = (states["not synced"]["_codebook.embed"] for states in ranks)
    assert not one.equal(other)
