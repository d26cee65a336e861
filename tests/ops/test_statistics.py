"""codebook_statistics: deterministic counts and sums, against a plain loop."""

import pytest
import torch

import vqkernels as vq
from vqkernels import reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(("n", "k", "d"), [(0, 4, 3), (1, 1, 1), (1000, 37, 5), (517, 600, 64)])
def test_counts_and_sums(n, k, d, dtype, backend):
    z, indices = torch.randn(n, d).to(dtype), torch.randint(-1, k, (n,))
    counts, sums = vq.codebook_statistics(z, indices, k, backend=backend)
    expected_counts, expected_sums = reference.statistics(z, indices, k)
    assert counts.equal(expected_counts)
    assert sums.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert sums.equal(expected_sums.to(sums.dtype))  # float64 in row order, rounded once: equal, not close


def test_masked_and_bad_rows_count_nowhere(backend):
    z, indices, mask = torch.randn(100, 4), torch.randint(9, (100,)), torch.rand(100) < 0.5
    z[7, 2], z[~mask] = torch.inf, torch.nan
    mask[7] = True
    counts, sums = vq.codebook_statistics(z, indices, 9, mask=mask, backend=backend)
    expected = reference.statistics(z, indices, 9, mask=mask)
    assert counts.equal(expected[0]) and counts.sum() == mask.sum() - 1
    assert sums.equal(expected[1].float())


def test_heads_and_layout(backend):
    z, indices = torch.randn(2, 5, 30), torch.randint(-1, 8, (2, 30))
    counts, sums = vq.codebook_statistics(z, indices, 8, channel_dim=1, batched=True, backend=backend)
    for head in range(2):
        expected = reference.statistics(z[head].T, indices[head], 8)
        assert counts[head].equal(expected[0]) and sums[head].equal(expected[1].float())


def test_all_rows_in_one_code_on_many_threads(threads, cpu_kernels):
    z = torch.randn(10_000, 16)
    indices = torch.full((10_000,), 3)
    runs = []
    for count in (1, 2, 7):
        threads(count)
        runs.append(vq.codebook_statistics(z, indices, 500, backend="cpu"))
    assert runs[0][0][3] == 10_000 and all(r[1].equal(runs[0][1]) for r in runs)


def test_an_index_out_of_range_is_refused(backend):
    with pytest.raises(RuntimeError, match="not below codebook_size = 4"):
        vq.codebook_statistics(torch.randn(3, 2), torch.tensor([0, 4, 1]), 4, backend=backend)


def test_bad_arguments_are_one_clear_sentence():
    with pytest.raises(ValueError, match="codebook_size must be a positive int, got 0"):
        vq.codebook_statistics(torch.randn(3, 2), torch.zeros(3, dtype=torch.int64), 0)
    with pytest.raises(ValueError, match="indices must be int64 of z's shape without channels, .3."):
        vq.codebook_statistics(torch.randn(3, 2), torch.zeros(4, dtype=torch.int64), 5)
    with pytest.raises(ValueError, match="channel_dim must be in .-2, 1. for z of 2 axes, got 7"):
        vq.codebook_statistics(torch.randn(3, 2), torch.zeros(3, dtype=torch.int64), 5, channel_dim=7)
