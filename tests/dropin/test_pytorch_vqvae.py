"""pytorch-vqvae: parity with its documented formulas, which are stated here because it is on no package index."""

import pytest
import torch
from dropin.parity import assert_same_codes, assert_same_state, load_both_ways, train
from torch import nn
from torch.nn import functional as F

from vqkernels import restore_quantizers, swap_quantizers
from vqkernels.dropin.pytorch_vqvae import VQEmbedding, vq, vq_st

K, D = 32, 6


class Stated(nn.Module):
    """Nearest codes; straight through, and once more with the gradient to the codebook."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(K, D)

    def forward(self, z):
        rows = z.permute(0, 2, 3, 1)
        return torch.cdist(rows.flatten(0, 2).double(), self.embedding.weight.double()).argmin(1).view(rows.shape[:-1])

    def straight_through(self, z):
        codes = self.embedding(self.forward(z)).permute(0, 3, 1, 2).contiguous()
        return z + (codes - z).detach(), codes


Stated.__module__, Stated.__qualname__ = "modules", "VQEmbedding"


def loss(layer, z):
    straight, codes = layer.straight_through(z)
    return F.mse_loss(codes, z.detach()) + 0.25 * F.mse_loss(z, codes.detach()) + straight.square().mean()


def test_numbers_of_codes():
    rows, codes = torch.randn(3, 40, D), torch.randn(K, D)
    found = vq(rows, codes.requires_grad_())
    assert found.shape == (3, 40) and not found.requires_grad
    distances = torch.cdist(rows.view(-1, D).double(), codes.detach().double())
    assert assert_same_codes(found, distances.argmin(1), rows.view(-1, D), codes.detach()).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_straight_through_reaches_rows_and_codebook(dtype):
    rows = torch.randn(3, 40, D, dtype=dtype, requires_grad=True)
    codes = torch.randn(K, D, dtype=dtype, requires_grad=True)
    found, indices = vq_st(rows, codes)
    assert indices.shape == (120,) and found.equal(codes[indices].view(rows.shape))
    incoming = torch.randn(3, 40, D, dtype=dtype)
    to_rows, to_codes = torch.autograd.grad(found, (rows, codes), incoming)
    assert to_rows.equal(incoming)
    expected = torch.zeros_like(codes).index_add(0, indices, incoming.view(-1, D))
    torch.testing.assert_close(to_codes, expected)
    found, _ = vq_st(rows, codes.detach())
    assert torch.autograd.grad(found, rows, incoming)[0].equal(incoming)
    (first,) = torch.autograd.grad(vq_st(rows, codes)[0], rows, incoming.requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()
    assert vq_st(rows[:0], codes)[0].shape == (0, 40, D)


def test_twenty_steps_and_checkpoints():
    ours, theirs = VQEmbedding(K, D), Stated()
    ours.load_state_dict(theirs.state_dict())
    z = torch.randn(2, D, 5, 4)
    assert ours(z).equal(theirs(z))
    mine, other = ours.straight_through(z), theirs.straight_through(z)
    torch.testing.assert_close(mine, other)
    assert all(x.is_contiguous() for x in mine)
    both = [[z.clone().requires_grad_(), layer] for layer in (ours, theirs)]
    both = [torch.autograd.grad(loss(layer, x), (x, layer.embedding.weight)) for x, layer in both]
    torch.testing.assert_close(*both)
    batches = [torch.randn(2, D, 4, 4, requires_grad=True) for _ in range(20)]
    torch.testing.assert_close(*(train(layer, loss, batches) for layer in (ours, theirs)))
    assert_same_state(ours, theirs)
    load_both_ways(ours, theirs)


def test_swapped_and_restored():
    model = nn.Sequential(Stated())
    peer = model[0]
    swap_quantizers(model)
    assert type(model[0]) is VQEmbedding and model[0].embedding is peer.embedding
    train(model[0], loss, [torch.randn(1, D, 4, 4)])
    learned = model[0].embedding.weight.detach().clone()
    restore_quantizers(model)
    assert model[0] is peer and peer.embedding.weight.equal(learned)
    other = nn.Module()
    other.__class__ = type("VQEmbedding", (nn.Module,), {})
    type(other).__module__ = "modules"
    assert "it is another class of that name" in swap_quantizers(nn.Sequential(other)).left[0].reason
