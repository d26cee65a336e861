"""Which images make up the batch of a step: a function of (seed, step) alone, so that a resumed run goes on exactly."""

import numpy as np
import torch
from torch import Tensor


class Batches:
    """Batches of a shuffled epoch, then of the next one; what does not fill a last batch waits for another epoch.

    Args:
        count: number of images.
        batch_size: images per batch, at most `count` of them.
        seed: with the number of the epoch, the key of its permutation.
    """

    def __init__(self, count: int, batch_size: int, seed: int) -> None:
        self.count = count
        self.batch_size = min(batch_size, count)
        self.steps_per_epoch = count // self.batch_size
        self.seed = seed
        self._epoch = -1
        self._order = torch.empty(0, dtype=torch.int64)

    def indices(self, step: int) -> Tensor:
        """Indices (batch_size,) int64 of the batch of a step, counted from 0."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = torch.from_numpy(np.random.default_rng([self.seed, 1, epoch]).permutation(self.count))
        return self._order[position * self.batch_size : (position + 1) * self.batch_size]
