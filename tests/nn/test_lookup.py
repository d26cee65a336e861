"""decode: every integer dtype, what `vqkernels encode` writes among them, for every layer."""

import numpy as np
import pytest
import torch

from vqkernels.models import VQVAE
from vqkernels.nn import GroupedResidualVectorQuantizer, ResidualVectorQuantizer, SimVQ, VectorQuantizer

LAYERS = {
    "plain": lambda: VectorQuantizer(8, 200, channel_dim=1),
    "projection": lambda: VectorQuantizer(8, 200, codebook_dim=3, channel_dim=1),
    "heads": lambda: VectorQuantizer(8, 200, heads=2, separate_codebooks=True),
    "residual": lambda: ResidualVectorQuantizer(8, 200, 3, channel_dim=1),
    "residual projection": lambda: ResidualVectorQuantizer(8, 200, 3, codebook_dim=3),
    "grouped": lambda: GroupedResidualVectorQuantizer(8, 200, 3, 2),
    "simvq": lambda: SimVQ(8, 200, channel_dim=1),
}
DTYPES = [torch.int64, torch.int32, torch.int16, torch.uint8, torch.uint16, torch.uint32]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_every_integer_dtype_decodes(name, dtype):
    layer = LAYERS[name]().eval()
    quantized, indices, _ = layer(torch.randn(4, 8, 5) if layer.channel_dim == 1 else torch.randn(4, 5, 8))
    torch.testing.assert_close(layer.decode(indices.to(dtype)), quantized)
    if dtype.is_signed:
        assert layer.decode(torch.full_like(indices, -1).to(dtype)).eq(0).all()
    with pytest.raises(IndexError, match=r"indices must be in \[-1, 199\], got 2"):
        layer.decode((torch.zeros_like(indices) + 200).to(dtype))


def test_a_signed_byte_decodes():
    layer = VectorQuantizer(4, 100)
    codes = torch.arange(-1, 100)
    assert layer.decode(codes.to(torch.int8)).equal(layer.decode(codes))


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_another_dtype_is_one_sentence(dtype):
    with pytest.raises(TypeError, match=f"indices must be an integer tensor, got {dtype}"):
        VectorQuantizer(4, 8).decode(torch.zeros(3, dtype=dtype))


def test_the_array_that_encode_writes_decodes(tmp_path):
    model = VQVAE(3, hidden_channels=8, code_dim=4, codebook_size=16, residual_blocks=1).eval()
    codes = model.encode(torch.rand(2, 3, 16, 16))
    np.save(tmp_path / "codes-000000.npy", codes.numpy().astype(np.uint16))
    read = torch.from_numpy(np.load(tmp_path / "codes-000000.npy"))
    assert read.dtype == torch.uint16 and model.decode(read).equal(model.decode(codes))
