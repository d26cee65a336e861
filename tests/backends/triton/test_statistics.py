"""Counts and sums against the reference, bit for bit repeatable."""

import pytest
import torch
from backends.triton import hostile

from vqkernels import reference

triton_statistics = pytest.importorskip("vqkernels.backends.triton.statistics", reason="triton is not installed")


def both(z, indices, codebook_size, device, mask=None):
    """(counts, sums) of the kernel and of the reference, one head."""
    view = None if mask is None else mask.to(device)[None, None]
    got = triton_statistics.statistics(z.to(device)[None, None], indices.to(device)[None, None], codebook_size, view)
    return [x[0].cpu() for x in got], reference.statistics(z, indices, codebook_size, mask=mask)


@pytest.mark.parametrize("dtype", hostile.first([torch.float32, torch.float64, torch.bfloat16, torch.float16]))
@pytest.mark.parametrize(("rows", "codes", "dim"), [(100, 7, 5), (256, 1, 3), (33, 300, 16), (40, 9, 130), (1, 1, 1)])
def test_equal_to_the_reference(rows, codes, dim, dtype, device):
    z = torch.randn(rows, dim).to(dtype)
    indices = torch.randint(0, codes, (rows,))
    (counts, sums), (expected_counts, expected_sums) = both(z, indices, codes, device)
    assert torch.equal(counts, expected_counts)
    assert sums.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(sums.double(), expected_sums, rtol=1e-12 if dtype == torch.float64 else 1e-7, atol=1e-7)


def test_one_code_with_many_chunks(device, monkeypatch):
    monkeypatch.setattr(triton_statistics, "CHUNK", 32)
    z = torch.randn(250, 4)
    indices = torch.where(torch.arange(250) % 50 == 0, 2, 5)
    (counts, sums), (expected_counts, expected_sums) = both(z, indices, 8, device)
    assert torch.equal(counts, expected_counts)
    torch.testing.assert_close(sums.double(), expected_sums, rtol=1e-6, atol=1e-6)


def test_rows_that_count_nowhere(device):
    z = torch.randn(60, 4)
    z[3, 1], z[4, 0] = float("nan"), float("-inf")
    mask = torch.arange(60) % 3 != 0
    z[6] = float("nan")  # masked
    indices = torch.randint(0, 5, (60,))
    indices[10] = -1
    (counts, sums), (expected_counts, expected_sums) = both(z, indices, 5, device, mask)
    assert torch.equal(counts, expected_counts)
    torch.testing.assert_close(sums.double(), expected_sums, rtol=1e-6, atol=1e-6)
    assert sums.isfinite().all()


def test_an_index_out_of_range_counts_nowhere(device):
    """As the op documents it: the device is not waited for. The key must not run into the next head's either."""
    z = torch.randn(2, 40, 3)
    indices = torch.randint(0, 5, (2, 40))
    wrong = indices.clone()
    wrong[0, :6] = torch.tensor([5, 6, 2**15, 2**31, 2**32 + 1, 2**62])
    wrong[1, :3] = torch.tensor([-2, -(2**40), 5])
    counts, sums = triton_statistics.statistics(z[None].to(device), wrong[None].to(device), 5, None)
    indices[0, :6] = indices[1, :3] = -1
    for head in range(2):
        expected_counts, expected_sums = reference.statistics(z[head], indices[head], 5)
        assert torch.equal(counts[head].cpu(), expected_counts)
        torch.testing.assert_close(sums[head].cpu().double(), expected_sums, rtol=1e-6, atol=1e-6)


def test_no_rows(device):
    (counts, sums), _ = both(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64), 4, device)
    assert (counts == 0).all()
    assert (sums == 0).all()


def test_heads_strides_and_repeatability(device):
    z = torch.randn(3, 12, 11).view(3, 2, 6, 11).permute(0, 1, 3, 2).to(device)
    indices = torch.randint(0, 4, (3, 2, 11)).to(device)
    counts, sums = triton_statistics.statistics(z, indices, 4, None)
    again = triton_statistics.statistics(z, indices, 4, None)
    assert torch.equal(counts, again[0])
    assert torch.equal(sums, again[1])
    for head in range(2):
        expected = reference.statistics(z[:, head].reshape(33, 6).cpu(), indices[:, head].reshape(33).cpu(), 4)
        assert torch.equal(counts[head].cpu(), expected[0])
        torch.testing.assert_close(sums[head].cpu().double(), expected[1], rtol=1e-6, atol=1e-6)
