"""Batches: every epoch is another permutation, a function of (seed, step) alone."""

import pytest
import torch

from vqkernels.training.batches import Batches


def test_an_epoch_visits_every_image_once():
    batches = Batches(12, 4, seed=0)
    epochs = [torch.cat([batches.indices(3 * epoch + step) for step in range(3)]) for epoch in range(3)]
    assert all(torch.equal(epoch.sort().values, torch.arange(12)) for epoch in epochs)
    assert not torch.equal(epochs[0], epochs[1]) and not torch.equal(epochs[1], epochs[2])


def test_batches_depend_on_seed_and_step_alone():
    forward = [Batches(13, 4, seed=7).indices(step) for step in range(9)]
    once = Batches(13, 4, seed=7)
    assert all(torch.equal(once.indices(step), forward[step]) for step in reversed(range(9)))
    assert any(not torch.equal(Batches(13, 4, seed=8).indices(step), forward[step]) for step in range(9))


@pytest.mark.parametrize("count,batch_size,size,steps", [(13, 4, 4, 3), (3, 64, 3, 1), (1, 1, 1, 1)])
def test_sizes(count, batch_size, size, steps):
    batches = Batches(count, batch_size, seed=0)
    assert (batches.batch_size, batches.steps_per_epoch) == (size, steps)
    assert all(len(batches.indices(step)) == size for step in range(2 * steps))
