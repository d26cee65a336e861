"""The entropy kernels behind torch's dispatcher, under a namespace of the test's own: layouts, heads, shapes."""

import pytest
import torch

pytest.importorskip("triton")

from backends.triton import hostile
from backends.triton.test_entropy import off, oracle
from backends.triton.test_registration import CODES, DIM, LAYOUTS, inputs, operators

__all__ = ["operators"]  # the fixture


def flat(x, channel_dim, heads):
    """z, or anything of its shape, as (heads, rows, D)."""
    x = x.movedim(channel_dim, -1)
    return x.reshape(1 if heads is None else heads, -1, x.shape[-1]).cpu()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("layout", hostile.first(["heads, channels first", *(x for x in LAYOUTS if x[:6] != "heads,")]))
def test_every_layout(layout, masked, operators, device):
    z, channel_dim, codebook, mask = inputs(layout, masked, device)
    heads = None if codebook.dim() == 2 else len(codebook)
    given = (z, codebook, mask)
    sample, usage, own, partition, mean = operators.entropy(
        *given, channel_dim, "euclidean", torch.tensor(0.9).double()
    )
    grads = torch.full((heads or 1,), 0.5, device=device), torch.full((heads or 1,), -2.0, device=device)
    grad_z, grad_codebook = operators.entropy_backward(
        *grads, *given, own, partition, mean, channel_dim, "euclidean", torch.tensor(0.9).double(), True
    )
    rows = flat(z, channel_dim, heads)
    counted = None if mask is None else mask.reshape(len(rows), -1).cpu()
    assert sample.shape == usage.shape == (heads or 1,)
    assert own.shape == partition.shape == rows.shape[:2]
    assert mean.shape == (heads or 1, CODES)
    assert grad_z.shape == z.shape
    assert grad_codebook.shape == codebook.shape
    assert grad_codebook.is_contiguous()
    for head, x in enumerate(rows):
        codes = codebook.cpu() if heads is None else codebook[head].cpu()
        expected = oracle(x, codes, None if counted is None else counted[head], "euclidean", 0.9, (0.5, -2.0))
        assert abs(sample[head].cpu() - expected[0]) < 1e-5
        assert abs(usage[head].cpu() - expected[1]) < 1e-5
        assert off(mean[head].cpu(), expected[2]) < 1e-5
        assert off(flat(grad_z, channel_dim, heads)[head], expected[3]) < 1e-4
        found = grad_codebook.cpu() if heads is None else grad_codebook[head].cpu()
        assert off(found, expected[4]) < 1e-4


def test_the_gradient_of_the_codebook_only_on_demand(operators, device):
    z, codebook = torch.randn(7, DIM, device=device), torch.randn(CODES, DIM, device=device)
    kept = operators.entropy(z, codebook, None, 1, "dot", torch.tensor(1.0).double())[2:]
    one = torch.ones(1, device=device)
    grad_z, none = operators.entropy_backward(
        one, one, z, codebook, None, *kept, 1, "dot", torch.tensor(1.0).double(), False
    )
    assert grad_z.shape == z.shape
    assert none.shape == (0,)
