"""Drop-ins for ritheshkumar95's pytorch-vqvae: the functions `vq` and `vq_st`, and `VQEmbedding`.

The search is fused and builds no N x K distances. The gradient of the codebook is a deterministic sum of segments.
"""

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ..ops.differentiation import is_differentiated, kept_indices
from ..ops.nearest import nearest_code
from ..ops.quantize import vector_quantize
from ..ops.statistics import codebook_statistics
from .adoption import adopt_as, check_tensors, check_unhooked, share


def vq(inputs: Tensor, codebook: Tensor) -> Tensor:
    """Rows (..., D) and codes (K, D) -> the indices of the nearest codes, int64 (...). No gradient flows."""
    return nearest_code(inputs, codebook)


def vq_st(inputs: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (..., D) and codes (K, D) -> `(codes (..., D), their indices (N,))`, N rows in all.

    The gradient of the codes reaches the rows unchanged (straight through), and the chosen codes of the codebook.
    """
    function = _StraightThrough.apply if is_differentiated(inputs, codebook) else _StraightThrough.forward
    return function(inputs, codebook)[:2]


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(inputs: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        quantized, indices, _, _ = vector_quantize(inputs, codebook)
        return quantized, indices.flatten(), kept_indices(indices.flatten())

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(output[2])
        ctx.codebook = inputs[1].shape[0], inputs[1].dtype

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (indices,), (size, dtype) = ctx.saved_tensors, ctx.codebook
        to_codebook = None
        if ctx.needs_input_grad[1]:
            rows = gradient.reshape(len(indices), gradient.shape[-1])
            to_codebook = codebook_statistics(rows, indices, size)[1].to(dtype)
        return gradient if ctx.needs_input_grad[0] else None, to_codebook


class VQEmbedding(nn.Module):
    """`VQEmbedding` of pytorch-vqvae's `modules.py`.

    Args:
        K: number of codes.
        D: their channels.

    State: `embedding.weight (K, D)`, a Parameter, uniform in [-1/K, 1/K].
    """

    embedding: nn.Embedding

    def __init__(self, K: int, D: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(K, D)
        self.embedding.weight.data.uniform_(-1.0 / K, 1.0 / K)

    def forward(self, z_e_x: Tensor) -> Tensor:
        """z_e_x (B, D, H, W) -> int64 (B, H, W)."""
        return nearest_code(z_e_x, self.embedding.weight, channel_dim=1)

    def straight_through(self, z_e_x: Tensor) -> tuple[Tensor, Tensor]:
        """z_e_x (B, D, H, W) -> the codes twice, (B, D, H, W): with their gradient to z_e_x, and to the codebook."""
        weight = self.embedding.weight
        quantized, indices, _, _ = vector_quantize(z_e_x, weight.detach(), channel_dim=1)
        return quantized.contiguous(), F.embedding(indices, weight).permute(0, 3, 1, 2).contiguous()


def _adopt(peer: nn.Module) -> VQEmbedding:
    embedding = getattr(peer, "embedding", None)
    size, dim = getattr(embedding, "num_embeddings", None), getattr(embedding, "embedding_dim", None)
    check_tensors(peer, {"embedding.weight": (size, dim)}, ("straight_through",))
    check_unhooked(peer, "embedding")
    return adopt_as(VQEmbedding, peer)


ADAPTERS = {"modules.VQEmbedding": _adopt}
RELEASERS = {"modules.VQEmbedding": share}
