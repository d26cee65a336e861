"""Perplexity and usage over many batches, in training and in eval mode."""

import pytest
import torch

from vqkernels.nn import CodebookUsage, ResidualVectorQuantizer, VectorQuantizer


def test_an_epoch_is_the_joined_batch():
    layer = VectorQuantizer(4, 16, ema_decay=0.9)
    z = torch.randn(300, 4)
    layer(z)
    layer.eval()
    used = CodebookUsage(16)
    for part in z.split(70):
        used.update(layer(part, mask=torch.ones(len(part), dtype=torch.bool))[1])
    used.update(torch.full((5,), -1))
    counts = torch.bincount(layer(z)[1], minlength=16)
    found = used.compute()
    frequency = counts / counts.sum()
    torch.testing.assert_close(found.perplexity, torch.special.entr(frequency).sum().exp())
    assert found.usage == (counts > 0).float().mean() and found.dead_codes == (counts == 0).sum()
    used.reset()
    assert used.compute().dead_codes == 16 and used.compute().perplexity == 1


def test_levels_have_measures_of_their_own():
    layer = ResidualVectorQuantizer(4, 8, 3).eval()
    z = torch.randn(2, 50, 4)
    used = CodebookUsage(8, codebooks=(3,))
    used.update(layer(z)[1].to(torch.int32))
    indices = layer(z)[1].flatten(0, 1)
    assert used.counts.equal(torch.stack([torch.bincount(indices[:, q], minlength=8) for q in range(3)]))
    assert used.compute().perplexity.shape == (3,)


@pytest.mark.parametrize(
    "indices",
    [
        torch.zeros(4, 2, dtype=torch.int64),
        *(torch.zeros(4, 3).to(t) for t in (torch.float32, torch.bool, torch.cfloat)),
        [1],
    ],
)
def test_other_indices_are_refused(indices):
    with pytest.raises((ValueError, TypeError), match=r"indices must be (a tensor of )?integers \(..., 3\), got"):
        CodebookUsage(8, codebooks=(3,)).update(indices)
