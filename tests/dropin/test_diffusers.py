"""diffusers: parity with the installed package, the layer alone and inside `VQModel`."""

import copy

import pytest
import torch
from dropin.parity import assert_same_codes, assert_same_state, gradients, load_both_ways, train
from torch import nn

from vqkernels import restore_quantizers, swap_quantizers
from vqkernels.dropin.diffusers import VectorQuantizer

pytest.importorskip("diffusers")
from diffusers import VQModel
from diffusers.models.autoencoders.vae import VectorQuantizer as Theirs

K, C = 64, 4
OPTIONS = [dict(), dict(legacy=False), dict(sane_index_shape=True)]


@pytest.fixture(params=OPTIONS, ids=str)
def pair(request):
    ours, theirs = (layer(K, C, beta=0.25, **request.param) for layer in (VectorQuantizer, Theirs))
    nn.init.normal_(theirs.embedding.weight)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("training", [True, False])
def test_outputs(pair, training, dtype):
    ours, theirs = (layer.to(dtype).train(training) for layer in pair)
    z = torch.randn(3, C, 16, 24, dtype=dtype)
    (q, loss, extra), (q_, loss_, extra_) = ours(z), theirs(z)
    assert extra[:2] == extra_[:2] == (None, None) and extra[2].shape == extra_[2].shape
    rows, codes = z.permute(0, 2, 3, 1).reshape(-1, C), theirs.embedding.weight.detach()
    same = assert_same_codes(extra[2], extra_[2], rows, codes).view(3, 1, 16, 24).expand_as(q)
    torch.testing.assert_close(q[same], q_[same])
    torch.testing.assert_close(loss, loss_)
    assert q.dtype == q_.dtype and loss.dtype == loss_.dtype and q.stride() == q_.stride()


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


@pytest.mark.parametrize("unknown_index", ["random", "extra", 1])
def test_remapped_indices(tmp_path, unknown_index):
    numpy = pytest.importorskip("numpy")
    numpy.save(tmp_path / "used.npy", numpy.arange(0, K, 3))
    options = dict(beta=0.25, remap=str(tmp_path / "used.npy"), unknown_index=unknown_index)
    ours, theirs = (layer(K, C, **options) for layer in (VectorQuantizer, Theirs))
    load_both_ways(ours, theirs)
    nn.init.normal_(theirs.embedding.weight)
    ours.load_state_dict(theirs.state_dict())
    z, results = torch.randn(2, C, 4, 4), []
    for layer in (ours, theirs):
        torch.manual_seed(3)
        numbers = layer(z)[2][2]
        results.append((numbers, layer.get_codebook_entry(numbers.flatten().clone(), (2, 4, 4, C))))
    assert all(a.equal(b) for a, b in zip(*results, strict=True))
    model = nn.Sequential(theirs)
    keys = list(model.state_dict())
    swap_quantizers(model)
    assert type(model[0]) is VectorQuantizer and list(model.state_dict()) == keys and model[0].used is theirs.used


def test_channels_last_and_half_precision():
    ours, theirs = VectorQuantizer(K, C, beta=0.25), Theirs(K, C, beta=0.25)
    nn.init.normal_(theirs.embedding.weight)
    ours.load_state_dict(theirs.state_dict())
    z = torch.randn(2, C, 8, 8).to(memory_format=torch.channels_last)
    assert ours(z)[0].is_contiguous() and ours(z)[2][2].equal(theirs(z)[2][2])
    ours.to(torch.bfloat16)
    quantized, loss, _ = ours(z.to(torch.bfloat16))
    assert quantized.dtype == loss.dtype == torch.bfloat16
    assert ours(z)[0].dtype == torch.float32  # the common dtype, as the peer's arithmetic gives


def model(**options) -> VQModel:
    torch.manual_seed(0)
    built = VQModel(
        block_out_channels=(32,), latent_channels=C, num_vq_embeddings=K, norm_num_groups=8, sample_size=16, **options
    )
    nn.init.normal_(built.quantize.embedding.weight)
    return built


def test_a_whole_model_gives_the_same_before_and_after():
    theirs, ours = model(), model()
    report = swap_quantizers(ours)
    assert [entry.name for entry in report.swapped] == ["quantize"] and type(ours.quantize) is VectorQuantizer
    assert list(ours.state_dict()) == list(theirs.state_dict())
    x = torch.randn(2, 3, 16, 16)
    outputs = []
    for vqmodel in (ours, theirs):
        out = vqmodel(x)
        (out.sample.square().mean() + out.commit_loss).backward()
        latents = vqmodel.encode(x).latents
        decoded = vqmodel.decode(latents).sample
        entries = vqmodel.quantize.get_codebook_entry(vqmodel.quantize(latents)[2][2], (2, 16, 16, C))
        gradient = [p.grad for p in vqmodel.parameters() if p.grad is not None]
        outputs.append((out.sample, out.commit_loss, latents, decoded, entries, gradient))
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)


def test_a_whole_model_trains_the_same_and_keeps_what_it_learned_when_restored():
    theirs, ours = model(), model()
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.01) for m in (theirs, ours)]  # made before the swap
    quantizer = ours.quantize
    swap_quantizers(ours)
    before = ours.quantize.embedding.weight.detach().clone()
    for _ in range(20):
        x = torch.randn(1, 3, 8, 8)
        for vqmodel, optimizer in zip((theirs, ours), optimizers, strict=True):
            out = vqmodel(x)
            optimizer.zero_grad()
            ((out.sample - x).square().mean() + out.commit_loss).backward()
            optimizer.step()
    assert_same_state(ours, theirs, rtol=1e-3, atol=1e-4)
    learned = ours.quantize.embedding.weight.detach().clone()
    restore_quantizers(ours)
    assert ours.quantize is quantizer and type(quantizer) is Theirs
    assert not learned.equal(before) and quantizer.embedding.weight.equal(learned)
    assert_same_state(ours, theirs, rtol=1e-3, atol=1e-4)
    again = copy.deepcopy(ours)
    assert len(swap_quantizers(again).swapped) == 1
