"""The contenders of residual quantization: a forward in eval, and a training step with moving averages.

All get the same rows and start from the same codes of every level. A call gives the indices of all levels `(N, Q)`.
"""

import torch
from torch import Tensor, nn

from vqkernels.nn import ResidualVectorQuantizer
from vqkernels.ops.nearest import nearest_code

from .layers import Step
from .peers import Peer


def _ours(codebooks: Tensor) -> nn.Module:
    levels, size, dim = codebooks.shape
    layer = ResidualVectorQuantizer(dim, size, levels, ema_decay=0.99)
    layer.codebook.copy_(codebooks)
    return layer


def _lucidrains(codebooks: Tensor) -> nn.Module:
    from vector_quantize_pytorch import ResidualVQ

    levels, size, dim = codebooks.shape
    stack = ResidualVQ(dim=dim, num_quantizers=levels, codebook_size=size, decay=0.99, rotation_trick=False)
    stack = stack.to(codebooks.device)
    for layer, codes in zip(stack.layers, codebooks, strict=True):
        layer._codebook.embed.data.copy_(codes[None])
        layer._codebook.embed_avg.data.copy_(codes[None])
    return stack


class LevelByLevel(nn.Module):
    """Our search with one call and one subtraction per level. It shows what the single call saves."""

    def __init__(self, codebooks: Tensor) -> None:
        super().__init__()
        self.codebooks = codebooks

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rest, indices = z, []
        for codes in self.codebooks:
            index = nearest_code(rest, codes)
            rest = rest - codes[index]
            indices.append(index)
        return z - rest, torch.stack(indices, -1), z.new_zeros(())


def _in_eval(build):
    def prepare(z: Tensor, codebooks: Tensor) -> Step:
        layer, rows = build(codebooks).eval(), z[None]

        @torch.no_grad()
        def call() -> Tensor:
            return layer(rows)[1][0]

        return call

    return prepare


def _in_training(build):
    def prepare(z: Tensor, codebooks: Tensor) -> Step:
        layer, rows = build(codebooks).train(), z[None].clone().requires_grad_()
        incoming = torch.randn(rows.shape, generator=torch.Generator().manual_seed(1)).to(z.device) / rows.numel()

        def step() -> Tensor:
            rows.grad = None
            quantized, indices, losses = layer(rows)
            torch.autograd.backward([quantized, losses.sum()], [incoming, None])
            return indices[0]

        return step

    return prepare


_PACKAGE = ("vector_quantize_pytorch", "vector-quantize-pytorch")

RESIDUAL: dict[str, tuple[Peer, ...]] = {
    "residual": (
        Peer("vqkernels", "all levels in one call", _in_eval(_ours), "vqkernels", ours=True),
        Peer("lucidrains", "ResidualVQ", _in_eval(_lucidrains), *_PACKAGE, matrices=5),
        Peer("level by level", "our search, one call a level", _in_eval(LevelByLevel), "vqkernels", searches=False),
    ),
    "residual training": (
        Peer("vqkernels", "all levels in one call, moving averages", _in_training(_ours), "vqkernels", ours=True),
        Peer(
            "lucidrains", "ResidualVQ, moving averages, no rotation", _in_training(_lucidrains), *_PACKAGE, matrices=7
        ),
    ),
}
