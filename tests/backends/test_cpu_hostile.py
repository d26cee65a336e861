"""Data that the filters do not like: how many rows they decide all the same. A count, so no machine's mood matters.

What such data cost in instructions stands in tests/native/test_instructions.py.
"""

import pytest
import torch

import vqkernels as vq
from vqkernels import reference

N, K, D = 2048, 256, 64


def outlier_code():
    codebook = torch.randn(K, D)
    codebook[7] *= 1000
    return torch.randn(N, D), codebook


def collapsed(scale, shift=0.0):
    return torch.randn(N, D), shift + scale * torch.randn(K, D)


def out_of_scale():
    z = torch.randn(N, D)
    z[::2] *= 1e4
    return z, torch.randn(K, D)


def large_coordinate():
    z = torch.randn(N, D) * torch.cat([torch.tensor([50.0]), torch.ones(D - 1)])
    codebook = z[:K].clone()
    for _ in range(3):
        counts, sums = vq.codebook_statistics(z, vq.nearest_code(z, codebook), K)
        codebook = torch.where(counts[:, None] > 0, sums / counts.clamp_min(1)[:, None], codebook).float()
    return z, codebook


def duplicates():
    return torch.randn(N, D), torch.randn(K // 4, D).repeat(4, 1)


DATA = {  # and the least part of the rows that the filters decide
    "gaussian": (lambda: (torch.randn(N, D), torch.randn(K, D)), 0.985),
    "outlier code": (outlier_code, 0.97),
    "collapsed codebook": (lambda: collapsed(1e-3), 0.97),
    "collapsed to a millionth": (lambda: collapsed(1e-6), 0.97),
    "collapsed far from the rows": (lambda: collapsed(1e-3, 3.0), 0.97),
    "rows far out of scale": (out_of_scale, 0.97),
    "k-means with a large coordinate": (large_coordinate, 0.97),
    "every code four times": (duplicates, 0.97),
}


@pytest.mark.parametrize("name", DATA)
def test_the_filters_decide_most_rows(name, cpu_kernels):
    make, least = DATA[name]
    z, codebook = make()
    indices, decided = vq.nearest_code(z, codebook, backend="cpu", return_certificate=True)
    assert float(decided) >= least
    assert torch.equal(indices[:256], reference.nearest(z[:256], codebook))
