"""DAC: Descript's layers beside their documented formulas, `transformers` beside the installed package."""

import warnings

import pytest
import torch
from dropin.parity import assert_same_codes, assert_same_state, gradients, load_both_ways, train
from torch import nn
from torch.nn import functional as F

from vqkernels import restore_quantizers, swap_quantizers
from vqkernels.dropin.dac import DacVectorQuantize, ResidualVectorQuantize, VectorQuantize

D, K, C, Q, T = 12, 32, 4, 3, 50


@pytest.fixture(autouse=True)
def old_weight_norm():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


class Stated(nn.Module):
    """Directions compared as rows and codes of length one; codes looked up as they are."""

    def __init__(self, dim, size, inner):
        super().__init__()
        self.codebook_size, self.codebook_dim = size, inner
        self.in_proj = nn.utils.weight_norm(nn.Conv1d(dim, inner, 1))
        self.out_proj = nn.utils.weight_norm(nn.Conv1d(inner, dim, 1))
        self.codebook = nn.Embedding(size, inner)

    def forward(self, z):
        latents = self.in_proj(z)
        rows = latents.transpose(1, 2).flatten(0, 1).double()
        indices = torch.cdist(F.normalize(rows), F.normalize(self.codebook.weight.double())).argmin(1)
        codes = self.codebook(indices.view(len(z), -1)).transpose(1, 2)
        commitment = (latents - codes.detach()).square().mean((1, 2))
        codebook = (codes - latents.detach()).square().mean((1, 2))
        quantized = self.out_proj(latents + (codes - latents).detach())
        return quantized, commitment, codebook, indices.view(len(z), -1), latents


Stated.__module__, Stated.__qualname__ = "dac.nn.quantize", "VectorQuantize"


@pytest.fixture
def pair():
    ours, theirs = VectorQuantize(D, K, C), Stated(D, K, C)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def losses(out):
    return [out[0], out[1], out[2], out[4]]


def test_outputs_and_gradients(pair):
    ours, theirs = (layer.double() for layer in pair)
    z = torch.randn(2, D, T, dtype=torch.float64)
    mine, other = ours(z), theirs(z)
    rows = F.normalize(other[4].detach().transpose(1, 2).flatten(0, 1))
    assert assert_same_codes(mine[3], other[3], rows, F.normalize(theirs.codebook.weight.detach())).all()
    torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)
    mine, other = (gradients(layer, z, losses) for layer in (ours, theirs))
    torch.testing.assert_close(mine, other, rtol=1e-11, atol=1e-11)


def test_twenty_steps_and_checkpoints(pair):
    ours, theirs = pair
    assert {"in_proj.weight_g", "in_proj.weight_v", "codebook.weight"} <= set(ours.state_dict())
    batches = [torch.randn(2, D, T) for _ in range(20)]
    both = [train(x, lambda x, z: sum(part.sum() for part in x(z)[1:3]), batches) for x in (ours, theirs)]
    torch.testing.assert_close(*both, rtol=1e-4, atol=1e-5)
    assert_same_state(ours, theirs, rtol=1e-4, atol=1e-5)
    load_both_ways(ours, theirs)


def test_swapped_and_restored_with_its_weight_norm():
    model = nn.Sequential(Stated(D, K, C))
    peer, parameters = model[0], list(model.parameters())
    swap_quantizers(model)
    assert type(model[0]) is VectorQuantize and all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    train(model, lambda m, z: m(z)[2].sum(), [torch.randn(2, D, T) for _ in range(3)])
    learned = model.state_dict()
    restore_quantizers(model)
    assert model[0] is peer and all(value.equal(learned[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_residual_layers(dropout):
    ours = ResidualVectorQuantize(D, Q, K, [C, C + 1, C], dropout)
    theirs = nn.ModuleList(Stated(D, K, dim) for dim in (C, C + 1, C))
    ours.quantizers.load_state_dict(theirs.state_dict())
    z = torch.randn(6, D, T)
    for count in (None, 2):
        ours.train(count is None)
        torch.manual_seed(5)
        out = ours(z, count)
        torch.manual_seed(5)
        kept = torch.full((6,), Q + 1)
        drawn = torch.randint(1, Q + 1, (6,))
        if count is None:
            kept[: int(6 * dropout)] = drawn[: int(6 * dropout)]
        residual, total, commitment, codes, latents = z, 0.0, 0.0, [], []
        for number, layer in enumerate(theirs[: count or Q]):
            part, lost, _, indices, latent = layer(residual)
            mask = number < kept
            residual, total = residual - part, total + part * mask[:, None, None]
            commitment = commitment + (lost * mask).mean()
            codes.append(indices)
            latents.append(latent)
        assert out[1].equal(torch.stack(codes, 1))
        expected = (total, torch.cat(latents, 1), commitment, commitment)
        torch.testing.assert_close((out[0], *out[2:]), expected)
    ours.eval()
    decoded, latents, codes = ours.from_codes(ours(z)[1])
    torch.testing.assert_close(decoded, ours(z)[0])
    again, found, codes_ = ours.from_latents(latents)
    torch.testing.assert_close((again, found), (decoded, latents))
    assert codes_.equal(codes) and ours.from_latents(latents[:, : 2 * C + 1])[2].equal(codes[:, :2])
    with pytest.raises(ValueError, match="latents must have the channels of one quantizer at least"):
        ours.from_latents(latents[:, :2])


transformers = pytest.importorskip("transformers")


def model(**options):
    config = transformers.DacConfig(
        encoder_hidden_size=4,
        downsampling_ratios=[2, 4],
        decoder_hidden_size=16,
        n_codebooks=Q,
        codebook_size=64,
        codebook_dim=8,
        **options,
    )
    torch.manual_seed(0)
    return transformers.DacModel(config)


@pytest.mark.parametrize("training", [True, False])
def test_a_transformers_layer(training):
    theirs = model().quantizer.quantizers[0].train(training)
    config = transformers.DacConfig(hidden_size=16, codebook_size=64, codebook_dim=8)
    ours = DacVectorQuantize(config).train(training)
    ours.load_state_dict(theirs.state_dict())
    z = torch.randn(3, 16, 700)
    mine, other = ours(z), theirs(z)
    rows = F.normalize(other[4].detach().transpose(1, 2).flatten(0, 1).double())
    codes = F.normalize(theirs.codebook.weight.detach().double())
    same = assert_same_codes(mine[3], other[3], rows, codes).view(3, 1, 700).expand_as(z)
    torch.testing.assert_close(mine[0][same], other[0][same])
    torch.testing.assert_close((*mine[1:3], mine[4]), (*other[1:3], other[4]))
    z = z[:, :, :40].double()
    mine, other = (gradients(layer.double(), z, losses) for layer in (ours, theirs))
    torch.testing.assert_close(mine, other, rtol=1e-11, atol=1e-11)
    load_both_ways(ours, theirs)


def test_a_whole_transformers_model_gives_the_same_and_is_restored():
    theirs, ours = model(quantizer_dropout=0.5), model(quantizer_dropout=0.5)
    optimizers = [torch.optim.SGD(m.parameters(), lr=1e-3) for m in (ours, theirs)]
    peers = list(ours.quantizer.quantizers)
    report = swap_quantizers(ours, strict=True)
    assert [e.name for e in report] == [f"quantizer.quantizers.{i}" for i in range(Q)]
    for step in range(4):
        audio = 0.1 * torch.randn(2, 1, 256)
        both = []
        for m, optimizer in zip((ours, theirs), optimizers, strict=True):
            torch.manual_seed(step)
            out = m.train()(audio)
            optimizer.zero_grad()
            ((out.audio_values - audio[..., : out.audio_values.shape[-1]]).square().mean() + out.loss.mean()).backward()
            optimizer.step()
            both.append((out.audio_values, out.loss, out.quantized_representation, out.projected_latents))
        torch.testing.assert_close(*both, rtol=1e-4, atol=1e-5)
    assert_same_state(ours, theirs, rtol=1e-4, atol=1e-5)
    audio, both = 0.1 * torch.randn(2, 1, 512), []
    with torch.no_grad():
        for m in (ours.eval(), theirs.eval()):
            encoded = m.encode(audio)
            values = m.decode(audio_codes=encoded.audio_codes).audio_values
            latents = m.quantizer.from_latents(encoded.projected_latents)
            both.append((encoded.audio_codes.float(), values, *latents, m.encode(audio, n_quantizers=2).loss))
    torch.testing.assert_close(*both, rtol=1e-3, atol=1e-4)
    learned = ours.state_dict()
    restore_quantizers(ours)
    assert list(ours.quantizer.quantizers) == peers
    assert all(value.equal(learned[key]) for key, value in ours.state_dict().items())


def test_weight_norm_can_be_applied_after_the_swap():
    ours, theirs = model(), model()
    swap_quantizers(ours)
    for m in (ours, theirs):
        m.apply_weight_norm()
    audio = 0.1 * torch.randn(1, 1, 256)
    torch.testing.assert_close(ours(audio).audio_values, theirs(audio).audio_values)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    restore_quantizers(ours)
    assert list(ours.state_dict()) == list(theirs.state_dict())
