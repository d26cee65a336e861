"""Regression benchmarks of the counts and sums of the rows of each code: spread out, collapsed, and channels first."""

import pytest
import torch

from vqkernels import codebook_statistics, reference


@pytest.mark.parametrize("used", [512, 1], ids=["all codes", "one code"])
@pytest.mark.parametrize("channel_dim", [-1, 1], ids=["channels last", "channels first"])
def test_statistics(benchmark, used, channel_dim):
    rows = torch.randn(16, 32, 32, 64)
    z = rows if channel_dim == -1 else rows.movedim(-1, 1).contiguous()
    indices = torch.randint(used, rows.shape[:-1])
    counts, sums = benchmark(codebook_statistics, z, indices, 512, channel_dim=channel_dim)
    expected = reference.statistics(rows.flatten(0, 2), indices.flatten(), 512)
    assert torch.equal(counts, expected[0])
    torch.testing.assert_close(sums.double(), expected[1].double(), rtol=1e-4, atol=1e-3)


def test_many_codes(benchmark):
    z, indices = torch.randn(16384, 64), torch.randint(65536, (16384,))
    counts, _ = benchmark(codebook_statistics, z, indices, 65536)
    assert int(counts.sum()) == 16384
