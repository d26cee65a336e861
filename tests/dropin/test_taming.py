"""taming-transformers: parity with its documented formulas, which are stated here because it is on no package index."""

import pytest
import torch
from dropin.parity import assert_same_codes, assert_same_state, gradients, load_both_ways, train
from torch import nn

from vqkernels.dropin.taming import VectorQuantizer, VectorQuantizer2

K, C = 48, 8


class Stated(nn.Module):
    """All distances, then the two losses with beta on the codebook's (legacy) or on the commitment's."""

    def __init__(self, beta: float, legacy: bool, first: bool) -> None:
        super().__init__()
        self.beta, self.legacy, self.first = beta, legacy, first
        self.embedding = nn.Embedding(K, C)

    def forward(self, z):
        rows = z.permute(0, 2, 3, 1)
        codes = self.embedding.weight
        indices = torch.cdist(rows.reshape(-1, C).double(), codes.double()).argmin(1)
        found = codes[indices].view(rows.shape)
        commitment, codebook = (rows - found.detach()).square().mean(), (found - rows.detach()).square().mean()
        loss = commitment + self.beta * codebook if self.legacy else self.beta * commitment + codebook
        quantized = rows + (found - rows).detach()
        extra = (None, None, indices)
        if self.first:
            one_hot = nn.functional.one_hot(indices, K).to(z.dtype)
            share = one_hot.mean(0)
            extra = (torch.exp(-(share * (share + 1e-10).log()).sum()), one_hot, indices.unsqueeze(1))
        return quantized.permute(0, 3, 1, 2).contiguous(), loss, extra


CASES = {
    "first": (lambda: VectorQuantizer(K, C, 0.25), dict(legacy=True, first=True)),
    "legacy": (lambda: VectorQuantizer2(K, C, 0.25), dict(legacy=True, first=False)),
    "repaired": (lambda: VectorQuantizer2(K, C, 0.25, legacy=False), dict(legacy=False, first=False)),
}


@pytest.fixture(params=CASES)
def pair(request):
    build, options = CASES[request.param]
    ours, theirs = build(), Stated(0.25, **options)
    nn.init.normal_(theirs.embedding.weight)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_outputs(pair, training, dtype):
    ours, theirs = (layer.to(dtype).train(training) for layer in pair)
    z = torch.randn(3, C, 5, 7, dtype=dtype)
    (q, loss, extra), (q_, loss_, extra_) = ours(z), theirs(z)
    same = assert_same_codes(
        extra[2], extra_[2], z.permute(0, 2, 3, 1).reshape(-1, C), theirs.embedding.weight.detach()
    )
    assert same.all() and q.is_contiguous() and extra[2].shape == extra_[2].shape
    torch.testing.assert_close((q, loss), (q_, loss_))
    assert q.detach().equal(theirs.embedding.weight[extra_[2].flatten()].view(3, 5, 7, C).permute(0, 3, 1, 2).detach())
    if extra_[1] is not None:
        torch.testing.assert_close(extra[0], extra_[0])
        assert extra[1].to_dense().equal(extra_[1]) and extra[1].is_sparse


def test_gradients(pair):
    ours, theirs = (layer.double() for layer in pair)
    z = torch.randn(2, C, 4, 4, dtype=torch.float64)
    mine, other = (gradients(layer, z, lambda out: list(out[:2])) for layer in (ours, theirs))
    torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


def test_twenty_steps_and_checkpoints(pair):
    ours, theirs = pair
    batches = [torch.randn(2, C, 4, 4) for _ in range(20)]
    losses = [train(layer, lambda layer, z: layer(z)[1], batches) for layer in (ours, theirs)]
    torch.testing.assert_close(*losses)
    assert_same_state(ours, theirs)
    load_both_ways(ours, theirs)


def test_codebook_entries(pair):
    ours, theirs = pair
    indices = torch.randint(0, K, (2 * 3 * 4,))
    codes = theirs.embedding.weight[indices]
    assert ours.get_codebook_entry(indices, None).equal(codes)
    assert ours.get_codebook_entry(indices, (2, 3, 4, C)).equal(codes.view(2, 3, 4, C).permute(0, 3, 1, 2))


def test_legacy_is_the_default_and_beta_stands_at_the_codebook_loss():
    z = torch.randn(1, C, 4, 4)
    layer = VectorQuantizer2(K, C, 0.0)
    layer.embedding.weight.grad = None
    layer(z)[1].backward()
    assert layer.embedding.weight.grad.count_nonzero() == 0
    layer = VectorQuantizer2(K, C, 0.0, legacy=False)
    layer(z)[1].backward()
    assert layer.embedding.weight.grad.count_nonzero() > 0


@pytest.mark.parametrize("unknown_index", ["random", "extra", 3])
def test_remapped_indices(tmp_path, unknown_index):
    numpy = pytest.importorskip("numpy")
    used = torch.tensor([5, 9, 5, 40, 0])  # the first of equals counts
    numpy.save(tmp_path / "used.npy", used.numpy())
    layer = VectorQuantizer2(K, C, 0.25, remap=str(tmp_path / "used.npy"), unknown_index=unknown_index)
    plain = VectorQuantizer2(K, C, 0.25)
    nn.init.normal_(plain.embedding.weight)
    assert layer.load_state_dict(plain.state_dict(), strict=False).missing_keys == ["used"]
    z = torch.randn(2, C, 4, 4)
    found, numbers = plain(z)[2][2], layer(z)[2][2]
    assert numbers.shape == (32, 1) and layer.re_embed == (6 if unknown_index == "extra" else 5)
    place = {5: 0, 9: 1, 40: 3, 0: 4}
    for code, number in zip(found.tolist(), numbers.flatten().tolist(), strict=True):
        if code in place:
            assert number == place[code]
        else:
            assert number in (range(5) if unknown_index == "random" else [{"extra": 5, 3: 3}[unknown_index]])
    back = layer.get_codebook_entry(numbers.flatten(), (2, 4, 4, C))
    codes = [used[n].item() if n < 5 else 5 for n in numbers.flatten().tolist()]
    assert back.equal(layer.embedding.weight[codes].view(2, 4, 4, C).permute(0, 3, 1, 2))


def test_sane_indices_are_images():
    z = torch.randn(2, C, 3, 5)
    layer = VectorQuantizer2(K, C, 0.25, sane_index_shape=True)
    indices = layer(z)[2][2]
    layer.sane_index_shape = False
    assert indices.shape == (2, 3, 5) and indices.flatten().equal(layer(z)[2][2])


def test_no_rows_and_refusals():
    layer = VectorQuantizer2(K, C, 0.25)
    quantized, loss, (_, _, indices) = layer(torch.randn(0, C, 4, 4))
    assert quantized.shape == (0, C, 4, 4) and float(loss.detach()) == 0 and indices.shape == (0,)
    assert float(VectorQuantizer(K, C, 0.25)(torch.randn(0, C, 4, 4))[2][0]) == 1
    z = torch.randn(1, C, 2, 2)
    for name, value in (("temp", 0.5), ("rescale_logits", True), ("return_logits", True)):
        with pytest.raises(ValueError, match=f"^{name} must be"):
            layer(z, **{name: value})
    with pytest.raises(ValueError, match="unknown_index must be 'random', 'extra' or an int, got 'other'"):
        VectorQuantizer2(K, C, 0.25, unknown_index="other")
    with pytest.raises(ValueError, match=r"z must be \(B, C, H, W\), got \[4, 8\]"):
        layer(torch.randn(4, C))
