"""Drop-in quantizers for taming-transformers (CompVis): `VectorQuantizer` and `VectorQuantizer2`.

Both have beta on the codebook loss as the peer does: always in the first, by default (legacy=True) in the second. Every
released VQGAN depends on it. No matrix of distances and no one-hot matrix is built. The peer of the first class returns
the one-hot matrix; ours returns it as a sparse tensor.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .adoption import adopt_as, check_unhooked, share
from .vqgan import RemappedQuantizer, code_images, quantize_images


class VectorQuantizer(nn.Module):
    """`taming.modules.vqvae.quantize.VectorQuantizer`.

    Args:
        n_e: K.
        e_dim: C, channels of z and of the codes.
        beta: weight of the codebook loss, as in the peer; the commitment loss has weight 1.

    State: `embedding.weight (K, C)`, a Parameter, uniform in [-1/K, 1/K].
    """

    n_e: int
    e_dim: int
    beta: float
    embedding: nn.Embedding

    def __init__(self, n_e: int, e_dim: int, beta: float) -> None:
        super().__init__()
        self.n_e, self.e_dim, self.beta = n_e, e_dim, beta
        self.embedding = nn.Embedding(n_e, e_dim)
        self.embedding.weight.data.uniform_(-1.0 / n_e, 1.0 / n_e)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
        """z (B, C, H, W) -> `(quantized (B, C, H, W), loss (), (perplexity (), one_hot (N, K), indices (N, 1)))`.

        N = B * H * W in the order of b, h, w. The one-hot matrix is a sparse tensor of N entries; there
        `torch.compile` breaks the graph.
        """
        result = quantize_images(z, self.embedding.weight, statistics=True)
        loss = result.commitment_loss + self.beta * result.codebook_loss
        indices = result.indices.flatten()
        frequency = result.counts[0].to(torch.promote_types(z.dtype, torch.float32)) / max(len(indices), 1)
        perplexity = torch.exp(-(frequency * torch.log(frequency + 1e-10)).sum()).to(z.dtype)
        entries = torch.stack([torch.arange(len(indices), device=z.device), indices])
        one_hot = torch.sparse_coo_tensor(
            entries, torch.ones_like(indices, dtype=z.dtype), (len(indices), self.n_e), check_invariants=False
        )
        return result.quantized, loss, (perplexity, one_hot, indices.unsqueeze(1))

    def get_codebook_entry(self, indices: Tensor, shape: Any) -> Tensor:
        """Codes of `indices (N,)`: (B, C, H, W) for shape (B, H, W, C), (N, C) for shape None."""
        return code_images(F.embedding(indices, self.embedding.weight), shape)

    def extra_repr(self) -> str:
        return f"{self.n_e}, {self.e_dim}, beta={self.beta}"


class VectorQuantizer2(RemappedQuantizer):
    """`taming.modules.vqvae.quantize.VectorQuantizer2`.

    Args:
        n_e: K.
        e_dim: C, channels of z and of the codes.
        beta: weight of the codebook loss with legacy, of the commitment loss without; the other has weight 1.
        remap: file of an array with the codes in use; indices are places in this array. Or None.
        unknown_index: the index of a code that is not in use: "random", "extra" for one more index, or an int.
        sane_index_shape: indices (B, H, W) instead of (B * H * W,).
        legacy: see beta.

    State: see `vqkernels.dropin.vqgan.RemappedQuantizer`.
    """

    e_dim: int

    def __init__(
        self,
        n_e: int,
        e_dim: int,
        beta: float,
        remap: str | None = None,
        unknown_index: str | int = "random",
        sane_index_shape: bool = False,
        legacy: bool = True,
    ) -> None:
        super().__init__(n_e, e_dim, beta, remap, unknown_index, sane_index_shape, legacy)
        self.e_dim = e_dim

    def forward(
        self, z: Tensor, temp: float | None = None, rescale_logits: bool = False, return_logits: bool = False
    ) -> tuple[Tensor, Tensor, tuple[None, None, Tensor]]:
        """As `RemappedQuantizer.quantize`. The other arguments are the peer's, and must have their defaults."""
        if temp is not None and temp != 1.0:
            raise ValueError(f"temp must be None or 1.0: there are no logits, got {temp!r}")
        for name, value in (("rescale_logits", rescale_logits), ("return_logits", return_logits)):
            if value:
                raise ValueError(f"{name} must be False: there are no logits, got {value!r}")
        return self.quantize(z)


def _adopt(peer: nn.Module) -> VectorQuantizer:
    check_unhooked(peer, "embedding")
    return adopt_as(VectorQuantizer, peer)


def _adopt2(peer: nn.Module) -> VectorQuantizer2:
    check_unhooked(peer, "embedding")
    return adopt_as(VectorQuantizer2, peer)


ADAPTERS = {
    "taming.modules.vqvae.quantize.VectorQuantizer": _adopt,
    "taming.modules.vqvae.quantize.VectorQuantizer2": _adopt2,
}
RELEASERS = dict.fromkeys(ADAPTERS, share)
