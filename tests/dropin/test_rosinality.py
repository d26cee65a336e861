"""vq-vae-2-pytorch: parity with its documented formulas, which are stated here because it is on no package index."""

import pytest
import torch
from dropin.parity import assert_same_codes, assert_same_state, gradients, load_both_ways
from torch import nn
from torch.nn import functional as F

from vqkernels import restore_quantizers, swap_quantizers
from vqkernels.dropin.rosinality import Quantize

D, K = 6, 24


class Stated(nn.Module):
    """Channels last, codes in columns, moving averages with Laplace smoothing from one-hot matrices."""

    def __init__(self, dim=D, n_embed=K, decay=0.99, eps=1e-5):
        super().__init__()
        self.dim, self.n_embed, self.decay, self.eps = dim, n_embed, decay, eps
        self.register_buffer("embed", torch.randn(dim, n_embed))
        self.register_buffer("cluster_size", torch.zeros(n_embed))
        self.register_buffer("embed_avg", self.embed.clone())

    def forward(self, x):
        rows = x.detach().reshape(-1, self.dim)
        indices = torch.cdist(rows.double(), self.embed.T.double()).argmin(1)
        found = self.embed.T[indices].view(x.shape)
        if self.training:
            one_hot = F.one_hot(indices, self.n_embed).to(rows.dtype)
            self.cluster_size.lerp_(one_hot.sum(0), 1 - self.decay)
            self.embed_avg.lerp_(rows.T @ one_hot, 1 - self.decay)
            total = self.cluster_size.sum()
            smoothed = (self.cluster_size + self.eps) / (total + self.n_embed * self.eps) * total
            self.embed.copy_(self.embed_avg / smoothed)
        loss = (found - x).square().mean()
        return x + (found - x).detach(), loss, indices.view(x.shape[:-1])


Stated.__module__, Stated.__qualname__ = "vqvae", "Quantize"


@pytest.fixture
def pair():
    ours, theirs = Quantize(D, K), Stated()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@pytest.mark.parametrize("training", [True, False])
def test_outputs_and_gradients(pair, training):
    ours, theirs = (layer.double().train(training) for layer in pair)
    x = torch.randn(2, 5, 4, D, dtype=torch.float64)
    codes, state = theirs.embed.T.clone(), {k: v.clone() for k, v in theirs.state_dict().items()}
    mine, other = ours(x), theirs(x)
    assert assert_same_codes(mine[2], other[2], x.view(-1, D), codes).all() and mine[2].shape == (2, 5, 4)
    torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)
    for layer in (ours, theirs):
        layer.load_state_dict(state)
    mine, other = (gradients(layer, x, lambda out: list(out[:2])) for layer in (ours, theirs))
    torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


def test_twenty_steps_and_checkpoints(pair):
    ours, theirs = pair
    for _ in range(20):
        x = torch.randn(3, 10, D).transpose(0, 1)  # strided, as the permuted images are
        mine, other = ours(x), theirs(x)
        torch.testing.assert_close(mine[1], other[1])
        assert mine[2].equal(other[2])
    assert_same_state(ours, theirs, rtol=1e-4, atol=1e-5)
    assert ours.embed.shape == ours.embed_avg.shape == (D, K)
    load_both_ways(ours, theirs)
    indices = torch.randint(0, K, (3, 7))
    assert ours.embed_code(indices).equal(theirs.embed.T[indices])


def test_unused_codes_move_far_away_as_in_the_peer():
    ours, theirs = Quantize(D, K), Stated()
    ours.load_state_dict(theirs.state_dict())
    x = torch.zeros(1, D)
    ours(x), theirs(x)
    torch.testing.assert_close(ours.embed, theirs.embed)
    assert ours.embed.abs().max() > 100


@pytest.mark.parametrize("dim,size", [(1, 5), (5, 1), (D, K)])
def test_a_swapped_layer_shares_its_buffers_and_gives_them_back(dim, size):
    model, theirs = nn.Sequential(Stated(dim, size)), Stated(dim, size)
    theirs.load_state_dict(model[0].state_dict())
    peer, buffers = model[0], dict(model.named_buffers())
    swap_quantizers(model)
    assert type(model[0]) is Quantize and all(v is buffers[k] for k, v in model.named_buffers()) and len(buffers) == 3
    for change in (lambda m: None, lambda m: m.double(), restore_quantizers):
        change(model)
        for _ in range(10):
            x = torch.randn(20, dim)
            for layer in (model, theirs):
                layer(x.to(next(layer.buffers()).dtype).requires_grad_())[1].backward()
    assert model[0] is peer
    for key, value in theirs.state_dict().items():
        torch.testing.assert_close(model.state_dict()[f"0.{key}"].float(), value, rtol=1e-3, atol=1e-3)


def test_a_bad_row_and_no_rows_leave_the_codebook_finite():
    layer = Quantize(D, K)
    before = layer.embed.clone()
    layer(torch.randn(0, D))
    assert layer.embed.equal(before)
    x = torch.randn(30, D)
    x[3, 2] = torch.inf
    quantized, loss, indices = layer(x)
    assert layer.embed.isfinite().all() and indices[3] == 0 and loss.isnan()


def test_another_class_of_that_name_is_left():
    kind = type("Quantize", (nn.Module,), {"__module__": "vqvae", "forward": lambda self, x: x})
    kind.__module__ = "vqvae"
    other = kind()
    other.register_buffer("embed", torch.zeros(K, D))
    other.dim, other.n_embed = D, K
    assert str(swap_quantizers(nn.Sequential(other))) == (
        f"0: vqvae.Quantize left: it is another class of that name: 'embed' is ({K}, {D}) instead of ({D}, {K})"
    )
    layer = Stated()
    del layer.eps
    assert swap_quantizers(nn.Sequential(layer)).left[0].reason == "it is another class of that name: it has no 'eps'"
