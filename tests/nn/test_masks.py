"""Masks and lengths: the same rows either way, nothing masked is read, and mistakes are one sentence."""

import itertools

import pytest
import torch

from vqkernels.nn import ResidualVectorQuantizer, SimVQ, VectorQuantizer


@pytest.mark.parametrize("shape,channel_dim", [((3, 7, 6), -1), ((3, 6, 7), 1), ((3, 6, 7, 4), 1), ((3, 7, 4, 6), -1)])
def test_lengths_are_the_mask_they_describe(shape, channel_dim, backend):
    lengths = torch.tensor([7, 0, 3])
    layer = VectorQuantizer(6, 12, channel_dim=channel_dim, backend=backend).eval()
    z = torch.randn(shape)
    row_shape = z.select(channel_dim, 0).shape
    mask = torch.zeros(row_shape, dtype=torch.bool)
    mask[0], mask[2, :3] = True, True
    for given in (lengths, lengths.int(), torch.tensor([99, -2, 3])):
        for a, b in zip(layer(z, lengths=given), layer(z, mask=mask), strict=True):
            assert a.equal(b)


@pytest.mark.parametrize(
    "metric,codebook_dim,heads,ema_decay",
    list(itertools.product(["euclidean", "cosine"], [None, 5], [(1, False), (2, False), (2, True)], [None, 0.9])),
)
def test_a_masked_nan_changes_nothing(metric, codebook_dim, heads, ema_decay):
    def run(fill):
        torch.manual_seed(1)
        layer = VectorQuantizer(
            6, 9, metric=metric, codebook_dim=codebook_dim, heads=heads[0], separate_codebooks=heads[1],
            ema_decay=ema_decay, revive="rows", channel_dim=1,
        )  # fmt: skip
        z = torch.randn(2, 6, 8)
        mask = torch.rand(2, 8) < 0.5
        z = torch.where(mask.unsqueeze(1), z, fill).requires_grad_()
        quantized, indices, loss = layer(z, mask=mask)
        (quantized.square().sum() + loss).backward()
        assert z.grad.movedim(1, -1)[~mask].eq(0).all() and quantized.movedim(1, -1)[~mask].eq(0).all()
        assert indices[~mask].eq(-1).all()
        return [quantized, indices, loss, z.grad, *(p.grad for p in layer.parameters()), *layer.state_dict().values()]

    for clean, dirty in zip(run(0.0), run(torch.nan), strict=True):
        assert clean.equal(dirty) and clean.isfinite().all()


@pytest.mark.parametrize("ema_decay", [None, 0.9])
@pytest.mark.parametrize("revive", ["off", "rows"])
@pytest.mark.parametrize("shape", [(0, 6), (2, 0, 6), (2, 5, 6)])
def test_no_rows_at_all(shape, revive, ema_decay, backend):
    layer = VectorQuantizer(6, 9, ema_decay=ema_decay, revive=revive, codebook_dim=3, heads=3, backend=backend)
    before = layer.codebook.clone()
    z = torch.full(shape, torch.nan, requires_grad=True)
    quantized, indices, loss = layer(z, mask=torch.zeros(shape[:-1], dtype=torch.bool))
    (quantized.sum() + loss).backward()
    assert loss == 0 and z.grad.eq(0).all() and indices.eq(-1).all() and quantized.eq(0).all()
    assert layer.codebook.equal(before) and layer.counts.eq(0).all()


@pytest.mark.parametrize(
    "arguments,message",
    [
        (dict(mask=torch.ones(2, 5, dtype=torch.bool), lengths=torch.tensor([1, 2])), "give one of them"),
        (
            dict(mask=torch.ones(2, 6, dtype=torch.bool)),
            "mask must have z's shape without channels, .2, 5., got",
        ),
        (
            dict(mask=torch.ones(2, 5)),
            "got torch.float32: of a mask of ones and zeros give mask.bool.., of one that is",
        ),
        (dict(mask=[1, 0]), "mask must be bool .True: the row counts. or integers .non-zero: it counts., got <class"),
        (dict(lengths=torch.tensor([1, 2, 3])), r"lengths must be .2,., one per batch element, got \[3\]"),
        (dict(lengths=torch.tensor([1.0, 2.0])), "lengths must be an int64 or int32 tensor, got torch.float32"),
        (dict(lengths=[1, 2]), "lengths must be an int64 or int32 tensor, got <class 'list'>"),
    ],
)
def test_mistakes_are_one_sentence(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        VectorQuantizer(4, 8)(torch.randn(2, 5, 4), **arguments)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8], ids=str)
def test_an_attention_mask_of_integers_is_the_bool_mask(dtype, backend):
    z, mask = torch.randn(2, 5, 4), torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 0]])
    for layer in (
        VectorQuantizer(4, 8, codebook_dim=2, backend=backend),
        ResidualVectorQuantizer(4, 8, 2, backend=backend),
        SimVQ(4, 8, backend=backend),
    ):
        layer.eval()
        for a, b in zip(layer(z, mask=mask.to(dtype)), layer(z, mask=mask.bool()), strict=True):
            assert a.equal(b)


def test_lengths_need_positions():
    with pytest.raises(ValueError, match="lengths need a z with a batch and a position axis"):
        VectorQuantizer(4, 8)(torch.randn(5, 4), lengths=torch.tensor([1, 2, 3, 4, 5]))
