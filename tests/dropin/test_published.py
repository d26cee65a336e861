"""The codecs and VQGAN as their authors published them, where they are installed: whole stacks before and after."""

import warnings

import pytest
import torch
from torch import nn

from vqkernels import restore_quantizers, swap_quantizers
from vqkernels.dropin import dac as our_dac
from vqkernels.dropin import encodec as our_encodec
from vqkernels.dropin import taming as our_taming

CLOSE = dict(rtol=1e-3, atol=1e-4)


@pytest.fixture(autouse=True)
def old_weight_norm():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def assert_both_train_the_same(ours, theirs, call, shape, rate=1e-2):
    """Twenty steps of SGD on all floating results, whose gradients at the input are compared too."""
    optimizers = [torch.optim.SGD(x.parameters(), lr=rate) if list(x.parameters()) else None for x in (ours, theirs)]
    for step in range(20):
        z, both = torch.randn(shape), []
        for layer, optimizer in zip((ours, theirs), optimizers, strict=True):
            torch.manual_seed(step)
            x = z.clone().requires_grad_()
            results = call(layer, x)
            if optimizer is not None:
                optimizer.zero_grad()
            sum(r.square().mean() for r in results if r.requires_grad).backward()
            if optimizer is not None:
                optimizer.step()
            both.append((*results, x.grad))
        torch.testing.assert_close(*both, **CLOSE)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), **CLOSE)


@pytest.mark.parametrize("inner", [8, 4])
@pytest.mark.parametrize("swapped", [True, False])
def test_encodec(inner, swapped):
    core_vq = pytest.importorskip("encodec.quantization.core_vq")
    options = dict(num_quantizers=3, dim=8, codebook_size=32, codebook_dim=inner, kmeans_init=False, decay=0.9)
    theirs = core_vq.ResidualVectorQuantization(**options)
    ours = (core_vq if swapped else our_encodec).ResidualVectorQuantization(**options)
    ours.load_state_dict(theirs.state_dict())
    if swapped:
        assert len(swap_quantizers(ours, strict=True)) == 3
    assert_both_train_the_same(ours, theirs, lambda layer, x: layer(x), (3, 8, 50))
    x = torch.randn(2, 8, 30)
    for layer in (ours.eval(), theirs.eval()):
        assert not layer(x)[2].any()
    codes = theirs.encode(x, 2)
    assert ours.encode(x, 2).equal(codes)
    torch.testing.assert_close(ours.decode(codes), theirs.decode(codes), **CLOSE)
    if swapped:
        restore_quantizers(ours)
        torch.testing.assert_close(ours(x), theirs(x), **CLOSE)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("swapped", [True, False])
def test_dac(dropout, swapped):
    quantize = pytest.importorskip("dac.nn.quantize")
    options = (16, 3, 64, [8, 4, 8], dropout)
    theirs = quantize.ResidualVectorQuantize(*options)
    ours = (quantize if swapped else our_dac).ResidualVectorQuantize(*options)
    ours.load_state_dict(theirs.state_dict())
    if swapped:
        assert len(swap_quantizers(ours, strict=True)) == 3
    assert_both_train_the_same(ours, theirs, lambda layer, x: layer(x), (4, 16, 30))
    x = torch.randn(2, 16, 20)
    both = []
    for layer in (ours.eval(), theirs.eval()):
        out = layer(x, 2)
        both.append((*out, *layer.from_codes(out[1]), *layer.from_latents(out[2])))
    torch.testing.assert_close(*both, **CLOSE)
    if swapped:
        restore_quantizers(ours)
        torch.testing.assert_close(ours(x), theirs(x), **CLOSE)


@pytest.mark.parametrize("name,options", [("", {}), ("2", {}), ("2", dict(legacy=False, sane_index_shape=True))])
def test_taming(name, options):
    quantize = pytest.importorskip("taming.modules.vqvae.quantize")
    if not hasattr(quantize, f"VectorQuantizer{name}"):
        pytest.skip(f"this version of taming-transformers has no VectorQuantizer{name}")
    theirs, built = (
        getattr(module, f"VectorQuantizer{name}")(32, 8, 0.25, **options) for module in (quantize, our_taming)
    )
    nn.init.normal_(theirs.embedding.weight)
    model = nn.Sequential(getattr(quantize, f"VectorQuantizer{name}")(32, 8, 0.25, **options))
    model[0].load_state_dict(theirs.state_dict())
    built.load_state_dict(theirs.state_dict())
    swap_quantizers(model, strict=True)
    for ours in (model[0], built):
        z = torch.randn(2, 8, 5, 7)
        (perplexity, one_hot, indices), (perplexity_, one_hot_, indices_) = ours(z)[2], theirs(z)[2]
        assert indices.equal(indices_)
        if perplexity_ is not None:
            torch.testing.assert_close((perplexity, one_hot.to_dense()), (perplexity_, one_hot_))
        entries = [layer.get_codebook_entry(indices.flatten(), (2, 5, 7, 8)) for layer in (ours, theirs)]
        torch.testing.assert_close(*entries)
    assert_both_train_the_same(model[0], theirs, lambda layer, x: layer(x)[:2], (2, 8, 4, 4))
