"""LlamaGen: parity with its documented formulas, which are stated here because it is on no package index."""

import pytest
import torch
from dropin.parity import assert_same_codes, assert_same_state, gradients, load_both_ways, train
from torch import nn
from torch.nn import functional as F

from vqkernels import restore_quantizers, swap_quantizers
from vqkernels.dropin.llamagen import WINDOW, VectorQuantizer

K, C = 32, 8


class Stated(nn.Module):
    """Rows and codes scaled to length one; beta on the commitment; no losses in eval."""

    def __init__(self, n_e=K, e_dim=C, beta=0.25, entropy_loss_ratio=0.0, l2_norm=True, show_usage=True):
        super().__init__()
        self.n_e, self.e_dim, self.beta, self.entropy_loss_ratio = n_e, e_dim, beta, entropy_loss_ratio
        self.l2_norm, self.show_usage = l2_norm, show_usage
        self.embedding = nn.Embedding(n_e, e_dim)
        if show_usage:
            self.register_buffer("codebook_used", torch.zeros(WINDOW))

    def forward(self, z):
        scale = (lambda x: F.normalize(x, dim=-1)) if self.l2_norm else (lambda x: x)
        rows, codes = scale(z.permute(0, 2, 3, 1)), scale(self.embedding.weight)
        indices = torch.cdist(rows.reshape(-1, self.e_dim).double(), codes.double()).argmin(1)
        found = codes[indices].view(rows.shape)
        losses = (None, None, None, 0)
        if self.training:
            usage = 0
            if self.show_usage:
                self.codebook_used = torch.cat([self.codebook_used, indices.float()])[-WINDOW:]
                usage = len(self.codebook_used.unique()) / self.n_e
            codebook = (found - rows.detach()).square().mean()
            commitment = self.beta * (found.detach() - rows).square().mean()
            losses = (codebook, commitment, torch.zeros_like(codebook), usage)
        quantized = (rows + (found - rows).detach()).permute(0, 3, 1, 2)
        return quantized, losses, (None, None, indices)


Stated.__module__, Stated.__qualname__ = "tokenizer.tokenizer_image.vq_model", "VectorQuantizer"


@pytest.fixture(params=[True, False], ids=["l2", "plain"])
def pair(request):
    options = dict(entropy_loss_ratio=0.0, l2_norm=request.param, show_usage=request.param)
    ours, theirs = VectorQuantizer(K, C, 0.25, **options), Stated(**options)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def floats(out):
    return [out[0], *(x for x in out[1][:2] if x is not None)]


@pytest.mark.parametrize("training", [True, False])
def test_outputs_and_gradients(pair, training):
    ours, theirs = (layer.double().train(training) for layer in pair)
    z = torch.randn(2, C, 5, 4, dtype=torch.float64)
    mine, other = ours(z), theirs(z)
    scale = (lambda x: F.normalize(x, dim=-1)) if ours.l2_norm else (lambda x: x)
    rows, codes = scale(z.permute(0, 2, 3, 1).reshape(-1, C)), scale(theirs.embedding.weight.detach())
    assert assert_same_codes(mine[2][2], other[2][2], rows, codes).all() and mine[2][:2] == (None, None)
    torch.testing.assert_close(floats(mine), floats(other), rtol=1e-12, atol=1e-12)
    assert mine[1][3] == other[1][3] and type(mine[1][3]) is type(other[1][3])
    assert (mine[1][2] is None) == (not training) and (not training or float(mine[1][2].detach()) == 0)
    mine, other = (gradients(layer, z, floats) for layer in (ours, theirs))
    torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


def test_twenty_steps_and_checkpoints(pair):
    ours, theirs = pair
    batches = [torch.randn(2, C, 4, 4) for _ in range(20)]
    losses = [train(layer, lambda layer, z: sum(layer(z)[1][:2]), batches) for layer in (ours, theirs)]
    torch.testing.assert_close(*losses)
    assert_same_state(ours, theirs)
    load_both_ways(ours, theirs)


def test_usage_of_more_rows_than_the_window():
    ours, theirs = (kind(K, 2, 0.25, 0.0, False, True) for kind in (VectorQuantizer, Stated))
    nn.init.normal_(theirs.embedding.weight)
    ours.load_state_dict(theirs.state_dict())
    z = torch.randn(1, 2, 1, WINDOW + 3)
    ours(z[..., :0])
    assert ours(z)[1][3] == theirs(z)[1][3] and ours.codebook_used.equal(theirs.codebook_used)


def test_codebook_entries(pair):
    ours, theirs = pair
    nn.init.normal_(ours.embedding.weight)
    weight = F.normalize(ours.embedding.weight, dim=-1) if ours.l2_norm else ours.embedding.weight
    indices = torch.randint(0, K, (2 * 3 * 4,))
    codes = weight[indices]
    assert ours.get_codebook_entry(indices).equal(codes)
    assert ours.get_codebook_entry(indices, (2, C, 3, 4)).equal(codes.view(2, 3, 4, C).permute(0, 3, 1, 2))
    assert ours.get_codebook_entry(indices, (2, 3, 4, C), channel_first=False).equal(codes.view(2, 3, 4, C))


def test_swapped_and_restored(pair):
    _, theirs = pair
    model = nn.Sequential(theirs)
    if theirs.show_usage:  # as the peer registers it
        theirs.codebook_used = nn.Parameter(theirs.codebook_used)
        del theirs._parameters["codebook_used"]
        theirs._buffers["codebook_used"] = nn.Parameter(torch.zeros(WINDOW))
    keys = list(model.state_dict())
    swap_quantizers(model)
    assert type(model[0]) is VectorQuantizer and list(model.state_dict()) == keys
    train(model, lambda m, z: sum(m(z)[1][:2]), [torch.randn(1, C, 4, 4) for _ in range(3)])
    learned = {key: value.clone() for key, value in model.state_dict().items()}
    restore_quantizers(model)
    assert model[0] is theirs and all(value.equal(learned[key]) for key, value in model.state_dict().items())


def test_an_entropy_loss_is_refused_and_left():
    with pytest.raises(ValueError, match="entropy_loss_ratio must be 0: .*, got 0.1"):
        VectorQuantizer(K, C, 0.25, 0.1, True, True)
    model = nn.Sequential(Stated(entropy_loss_ratio=0.1))
    report = swap_quantizers(model)
    assert "entropy_loss_ratio" in report.left[0].reason and type(model[0]) is Stated
