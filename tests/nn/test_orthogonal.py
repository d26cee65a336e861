"""Orthogonal regularisation against its K x K definition."""

import pytest
import torch

from vqkernels.nn import OrthogonalRegularization, orthogonal_loss


def by_definition(codebook):
    codes = codebook / codebook.norm(dim=1, keepdim=True)
    return (codes @ codes.T - torch.eye(len(codes), dtype=codes.dtype)).square().sum() / len(codes) ** 2


@pytest.mark.parametrize("size,dim", [(1, 4), (3, 8), (40, 5)])
def test_loss_and_gradient_are_the_definition(size, dim):
    codebook = torch.randn(size, dim, dtype=torch.float64, requires_grad=True)
    expected, got = by_definition(codebook), orthogonal_loss(codebook)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)
    wanted, had = torch.autograd.grad(expected, codebook)[0], torch.autograd.grad(got, codebook)[0]
    torch.testing.assert_close(had, wanted, rtol=1e-10, atol=1e-12)


def test_only_the_used_codes_and_each_codebook_on_its_own():
    codebook = torch.randn(2, 9, 4, dtype=torch.float64)
    used = torch.rand(2, 9) < 0.5
    used[:, :2] = True
    expected = torch.stack([by_definition(codebook[h][used[h]]) for h in range(2)]).mean()
    torch.testing.assert_close(orthogonal_loss(codebook, used), expected)
    torch.testing.assert_close(
        orthogonal_loss(codebook), torch.stack([by_definition(codebook[h]) for h in range(2)]).mean()
    )
    assert orthogonal_loss(codebook, torch.zeros_like(used)) == 0


def test_orthonormal_codes_cost_nothing_and_autocast_changes_nothing():
    assert orthogonal_loss(torch.eye(6) * torch.arange(1.0, 7)[:, None]).abs() < 1e-7
    codebook = torch.randn(20, 6)
    with torch.autocast("cpu", torch.bfloat16):
        cast = orthogonal_loss(codebook)
    assert cast.equal(orthogonal_loss(codebook))


def test_nothing_of_size_k_by_k_is_built():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                self.elements = max(self.elements, out.numel())
            return out

    codebook = torch.randn(500, 4, requires_grad=True)
    with Largest() as largest:
        OrthogonalRegularization(2.0)(codebook).backward()
    assert 0 < largest.elements <= 500 * 4


def test_a_step_pushes_codes_apart():
    codebook = torch.nn.Parameter(torch.randn(8, 8) * 0.1 + 1)
    regularization, optimizer = OrthogonalRegularization(1.0), torch.optim.SGD([codebook], lr=5.0)
    first = regularization(codebook)
    for _ in range(100):
        optimizer.zero_grad()
        regularization(codebook).backward()
        optimizer.step()
    assert regularization(codebook) < 0.1 * first


def test_mistakes_are_one_sentence():
    with pytest.raises(ValueError, match="weight must be a finite number, at least 0, got -1"):
        OrthogonalRegularization(-1)
    with pytest.raises(ValueError, match="codebook must be .K, D. or .H, K, D., got .5."):
        orthogonal_loss(torch.randn(5))
    with pytest.raises(ValueError, match="used must be bool .5., got torch.float32 .5."):
        orthogonal_loss(torch.randn(5, 2), torch.ones(5))
