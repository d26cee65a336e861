"""Heads: each is a quantizer of its own channels, and splitting makes no copy."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vqkernels.nn import VectorQuantizer
from vqkernels.nn.rows import RowLayout


@pytest.mark.parametrize("shape,channel_dim", [((4, 7, 6), -1), ((4, 6, 7), 1), ((2, 6, 3, 5), 1), ((9, 6), -1)])
@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_each_head_is_a_quantizer_of_its_own(shape, channel_dim, separate, ema_decay, backend):
    layer = VectorQuantizer(
        6, 10, heads=3, separate_codebooks=separate, ema_decay=ema_decay, channel_dim=channel_dim, backend=backend
    )
    assert layer.codebook.shape == ((3, 10, 2) if separate else (10, 2))
    z = torch.randn(shape)
    codebook = layer.codebook.detach().clone()
    quantized, indices, _ = layer(z)
    for head, part in enumerate(z.chunk(3, channel_dim)):
        alone = VectorQuantizer(2, 10, channel_dim=channel_dim, backend=backend).eval()
        alone.codebook.data.copy_(codebook[head] if separate else codebook)
        expected, chosen, _ = alone(part)
        assert indices[..., head].equal(chosen)
        assert quantized.chunk(3, channel_dim)[head].equal(expected)
    assert indices.is_contiguous() and quantized.stride() == z.stride()
    assert layer.perplexity.shape == ((3,) if separate else ())


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("shape,channel_dim", [((4, 7, 6), 2), ((4, 6, 7), 1), ((2, 6, 3, 5), 1)])
def test_splitting_and_joining_are_views(shape, channel_dim, separate):
    z = torch.randn(shape)
    heads = RowLayout.of(z, 6, channel_dim, heads=3, separate=separate)
    rows = heads.split(z)
    assert rows.values.data_ptr() == z.data_ptr() and rows.values.shape[rows.channel_dim] == 2
    assert rows.number == z.numel() // (6 if separate else 2)
    assert heads.join(rows.values).equal(z) and heads.join(rows.values).data_ptr() == z.data_ptr()
    assert heads.join(torch.empty_like(rows.values)).stride() == z.stride()


@pytest.mark.parametrize("separate", [False, True])
def test_no_copy_of_z_around_the_operator(separate):
    """Between the caller's z and the operator there are only views, and so behind it."""
    names = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.numel() >= 6 * 64 and out.is_floating_point():
                names.append((func.overloadpacket.__name__, out._is_view()))
            return out

    layer = VectorQuantizer(6, 5, heads=2, separate_codebooks=separate, channel_dim=1).eval()
    z = torch.randn(4, 6, 4, 4)
    with torch.no_grad(), Watch():
        layer(z)
    assert [name for name, is_view in names if name in ("clone", "copy_", "contiguous", "cat", "index")] == []


def test_one_head_has_one_codebook_whatever_is_asked():
    assert VectorQuantizer(6, 10, separate_codebooks=True).codebook.shape == (10, 6)
