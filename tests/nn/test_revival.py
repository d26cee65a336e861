"""Revival: who is dead, what a revived code becomes, and what is never drawn."""

import pytest
import torch

from vqkernels.nn import VectorQuantizer
from vqkernels.nn.random import hashed
from vqkernels.nn.revival import Candidates, revive_


def candidates(rows, usable=None):
    usable = torch.ones(rows.shape[:2], dtype=torch.bool) if usable is None else usable
    return Candidates(rows, usable)


def draws(count, step=3):
    return hashed(torch.tensor(0), torch.tensor(step), 2 * count + 1)


def test_vectors_and_statistics_are_replaced_relative_to_uniform_usage():
    codebook, counts = torch.zeros(4, 2), torch.tensor([10.0, 0.9, 5.1, 0.0])
    sums = torch.ones(4, 2)
    rows = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]]])
    mean = counts.mean()  # 4.0: below 0.25 * 4 lies 0.9 and 0, not 5.1
    revive_(codebook, counts, sums, candidates(rows), 0.25, draws(4))
    assert counts[0] == 10 and counts[2] == torch.tensor(5.1)
    assert codebook[[0, 2]].eq(0).all() and sums[[0, 2]].eq(1).all()
    for k in (1, 3):
        assert counts[k] == mean and (codebook[k] == rows[0]).all(1).any() and sums[k].equal(mean * codebook[k])
    assert not codebook[1].equal(codebook[3])


def test_no_more_codes_than_usable_candidates_and_the_lowest_first():
    codebook, counts = torch.zeros(6, 1), torch.tensor([0.0, 9.0, 0.0, 0.0, 0.0, 9.0])
    rows = torch.arange(1.0, 5.0).view(1, 4, 1)
    usable = torch.tensor([[False, True, False, True]])
    revive_(codebook, counts, None, candidates(rows, usable), 0.5, draws(4))
    assert codebook[[0, 2]].flatten().sort().values.tolist() == [2.0, 4.0]
    assert codebook[[1, 3, 4, 5]].eq(0).all() and counts[[3, 4]].eq(0).all()


def test_heads_are_judged_apart():
    codebook, counts = torch.zeros(2, 3, 1), torch.tensor([[8.0, 0.0, 8.0], [5.0, 5.0, 5.0]])
    rows = torch.tensor([[[1.0], [2.0]], [[3.0], [4.0]]])
    revive_(codebook, counts, torch.zeros(2, 3, 1), candidates(rows), 0.5, draws(2))
    assert codebook[0, 1] in (1.0, 2.0) and codebook[1].eq(0).all() and codebook[0, [0, 2]].eq(0).all()


def test_nothing_is_revived_without_statistics_or_candidates():
    codebook, rows = torch.randn(4, 2), torch.randn(1, 4, 2)
    before = codebook.clone()
    revive_(codebook, torch.zeros(4), None, candidates(rows), 0.5, draws(4))
    nobody = torch.zeros(1, 4, dtype=torch.bool)
    revive_(codebook, torch.tensor([9.0, 0, 0, 0]), None, candidates(rows, nobody), 0.5, draws(4))
    assert codebook.equal(before)


def test_at_most_1024_codes_a_step_and_all_of_them_soon():
    layer = VectorQuantizer(2, 3000, ema_decay=0.99, revive="rows")
    layer.codebook.fill_(1e3)
    for left in (1976, 952, 0):
        layer(torch.randn(4000, 2))
        assert (layer.codebook == 1e3).all(1).sum() in (left, left - 1)  # one may have taken rows itself
    rows = layer.codebook[(layer.codebook != 1e3).all(1)]
    assert len(rows.unique(dim=0)) == len(rows)


@pytest.mark.parametrize("ema_decay", [None, 0.9])
@pytest.mark.parametrize("heads", [(1, False), (2, False), (2, True)])
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_a_collapsed_codebook_comes_back(metric, heads, ema_decay, backend):
    layer = VectorQuantizer(
        8, 32, metric=metric, heads=heads[0], separate_codebooks=heads[1], ema_decay=ema_decay, revive="rows",
        backend=backend,
    )  # fmt: skip
    with torch.no_grad():
        layer.codebook.fill_(50.0)
    for _ in range(60):
        layer(torch.randn(256, 8))
    counts = layer.counts.view(-1, 32)
    assert (counts > 0).float().mean() > 0.9 and layer.perplexity.min() > 20


@pytest.mark.parametrize("arguments", [dict(), dict(ema_decay=0.9), dict(ema_decay=0.9, ema_update="manual")])
def test_masked_and_non_finite_rows_are_never_drawn(arguments):
    layer = VectorQuantizer(4, 64, revive="rows", **arguments)
    with torch.no_grad():
        layer.codebook.fill_(100.0)
    for step in range(30):
        torch.manual_seed(step)
        z = torch.randn(100, 4)
        mask = torch.rand(100) < 0.5
        z[~mask] = 1e6
        z[::7] = torch.nan
        z[3::7, 1] = torch.inf
        layer(z, mask=mask)
        if layer.ema_update == "manual":
            layer.update_codebook()
    assert layer.codebook.isfinite().all() and layer.codebook.abs().max() <= 100.0
    assert (layer.codebook == 100.0).all(1).sum() < 5


@pytest.mark.parametrize("optimizer", [lambda p: torch.optim.SGD(p, lr=0.1), lambda p: torch.optim.Adam(p, lr=1e-2)])
def test_a_gradient_trained_codebook_is_revived_under_its_optimizer(optimizer, backend):
    """The step after a revival moves the code by no more than a usual step: its moments decayed while it was dead."""
    layer = VectorQuantizer(4, 32, revive="rows", backend=backend)
    chosen = optimizer(layer.parameters())
    seen = 0
    for _ in range(300):
        before = layer.codebook.detach().clone()
        z = torch.randn(128, 4) * 3
        _, indices, loss = layer(z)
        revived = (layer.codebook != before).any(1)
        seen += int(revived.sum())
        here = layer.codebook.detach().clone()
        chosen.zero_grad()
        loss.backward()
        expected = torch.zeros(32, 4).index_add_(0, indices, -2 * (z - before[indices]) / z.numel())
        torch.testing.assert_close(layer.codebook.grad, expected)
        chosen.step()
        if revived.any():
            assert (layer.codebook - here)[revived].abs().max() < 0.2
    assert seen > 20 and layer.perplexity > 20


def test_the_draws_depend_on_seed_and_step_alone():
    def run(seed, global_seed):
        torch.manual_seed(0)
        layer = VectorQuantizer(4, 32, ema_decay=0.9, revive="rows", seed=seed)
        batches = [torch.randn(100, 4) for _ in range(5)]
        torch.manual_seed(global_seed)
        state = torch.get_rng_state()
        for z in batches:
            layer(z)
        assert torch.get_rng_state().equal(state)
        return layer.codebook

    assert run(1, 5).equal(run(1, 6)) and not run(1, 5).equal(run(2, 5))
