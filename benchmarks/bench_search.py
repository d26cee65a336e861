"""Regression benchmarks of the search: one shape per regime, then dtypes, layouts and data that cost extra passes."""

import pytest
import torch

from vqkernels import nearest_code, reference

SHAPES = {  # rows, codes, channels, and the regime
    "paper": (16384, 512, 64),
    "large K": (2048, 8192, 64),
    "large D": (2048, 2048, 256),
    "small D": (32768, 512, 8),
    "tiny D": (32768, 256, 4),
    "small call": (256, 512, 64),
}
DTYPES = (torch.float64, torch.bfloat16, torch.float16)


def check(z, codebook, indices):
    """The contract on the first rows: nothing wrong is timed."""
    assert torch.equal(indices.flatten()[:64], reference.nearest(z[:64], codebook))


@pytest.mark.parametrize("regime", SHAPES)
def test_gaussian(benchmark, regime):
    n, k, d = SHAPES[regime]
    z, codebook = torch.randn(n, d), torch.randn(k, d)
    check(z, codebook, benchmark(nearest_code, z, codebook))


def test_clustered(benchmark):
    codebook = torch.randn(1024, 64)
    z = codebook[torch.randint(1024, (8192,))] + 0.3 * torch.randn(8192, 64)
    check(z, codebook, benchmark(nearest_code, z, codebook))


def test_collapsed_codebook(benchmark):
    z, codebook = torch.randn(4096, 64), 1e-3 * torch.randn(512, 64)
    check(z, codebook, benchmark(nearest_code, z, codebook))


def test_outlier_code(benchmark):
    z, codebook = torch.randn(4096, 64), torch.randn(512, 64)
    codebook[7] *= 1000
    check(z, codebook, benchmark(nearest_code, z, codebook))


def test_ties_everywhere(benchmark):
    z, codebook = torch.randint(-1, 2, (2048, 16)).float(), torch.randint(-1, 2, (512, 16)).float()
    check(z, codebook, benchmark(nearest_code, z, codebook))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtype(benchmark, dtype):
    z, codebook = torch.randn(8192, 64).to(dtype), torch.randn(512, 64).to(dtype)
    check(z, codebook, benchmark(nearest_code, z, codebook))


def test_channels_first(benchmark):
    images, codebook = torch.randn(8, 64, 32, 32), torch.randn(512, 64)
    indices = benchmark(nearest_code, images, codebook, channel_dim=1)
    check(images.movedim(1, -1).reshape(-1, 64), codebook, indices)


def test_masked(benchmark):
    z, codebook, mask = torch.randn(8192, 64), torch.randn(512, 64), torch.rand(8192) < 0.5
    indices = benchmark(nearest_code, z, codebook, mask=mask)
    assert torch.equal(indices == -1, ~mask)


@pytest.mark.parametrize("metric", ["dot", "cosine"])
def test_metric(benchmark, metric):
    z, codebook = torch.randn(8192, 64), torch.randn(512, 64)
    indices = benchmark(nearest_code, z, codebook, metric=metric)
    assert torch.equal(indices[:64], reference.nearest(z[:64], codebook, metric=metric))


def test_batched_codebooks(benchmark):
    z, codebooks = torch.randn(4, 4096, 32), torch.randn(4, 512, 32)
    check(z[0], codebooks[0], benchmark(nearest_code, z, codebooks)[0])
