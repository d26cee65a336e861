"""Drop-in quantizer for rosinality's vq-vae-2-pytorch: `Quantize`, channels last, its codebook transposed.

Search, look-up, loss and statistics are one pass. No distances and no one-hot matrix are built. As in the peer, codes
that were never used move far away in the first steps, where their smoothed usage is nearly 0: checkpoints depend on it.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..nn.wide import WideBuffers, wide_dtype
from ..ops.quantize import quantize_with_statistics
from ..ops.recomputation import enter
from .adoption import adopt_as, check_tensors, share
from .laplace import laplace_step_


class Quantize(WideBuffers):
    """`Quantize` of vq-vae-2-pytorch's `vqvae.py`.

    Args:
        dim: D, channels of the input and of the codes.
        n_embed: K.
        decay, eps: of the averages, see `vqkernels.dropin.laplace`.

    State, float32 buffers, also after a cast of the module: `embed (D, K)`, `cluster_size (K,)`, `embed_avg (D, K)`.
    With a process group the statistics of all ranks are summed. Set `synchronise = False` on the layer to use no group,
    for example if only some ranks have it.
    """

    synchronise = True

    dim: int
    n_embed: int
    decay: float
    eps: float
    embed: Tensor
    cluster_size: Tensor
    embed_avg: Tensor

    def __init__(self, dim: int, n_embed: int, decay: float = 0.99, eps: float = 1e-5) -> None:
        super().__init__()
        self.dim, self.n_embed, self.decay, self.eps = dim, n_embed, decay, eps
        self.register_buffer("embed", torch.randn(dim, n_embed, dtype=wide_dtype()))
        self.register_buffer("cluster_size", self.embed.new_zeros(n_embed))
        self.register_buffer("embed_avg", self.embed.clone())

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """input (..., D) -> `(quantized (..., D), loss (), indices (...))`; the loss is the commitment, unweighted."""
        if self.training:
            self.widen_buffers()
        # A copy: the search needs codes in rows, and the update below overwrites what the backward pass needs.
        codes = self.embed.t().clone(memory_format=torch.contiguous_format)
        seen = enter(self.embed_avg, input, [codes], changes=False) if self.training else None
        codes = codes if seen is None else seen.state[0]
        dtype = torch.promote_types(input.dtype, codes.dtype)
        learns = seen is not None and seen.first is not False
        result = quantize_with_statistics(input.to(dtype), codes, statistics=learns)
        if seen is not None:
            averages = self.embed.t(), self.cluster_size, self.embed_avg.t()
            laplace_step_(averages, result, seen, decay=self.decay, eps=self.eps, synchronise=self.synchronise)
        return result.quantized, result.commitment_loss.to(dtype), result.indices

    def embed_code(self, embed_id: Tensor) -> Tensor:
        """Codes (..., D) of int64 (...)."""
        return F.embedding(embed_id, self.embed.t())

    def extra_repr(self) -> str:
        return f"{self.dim}, {self.n_embed}, decay={self.decay}, eps={self.eps}"


def _adopt(peer: nn.Module) -> Quantize:
    size, dim = getattr(peer, "n_embed", None), getattr(peer, "dim", None)
    check_tensors(peer, {"embed": (dim, size), "cluster_size": (size,), "embed_avg": (dim, size)}, ("decay", "eps"))
    return adopt_as(Quantize, peer)


ADAPTERS = {"vqvae.Quantize": _adopt}
RELEASERS = {"vqvae.Quantize": share}
