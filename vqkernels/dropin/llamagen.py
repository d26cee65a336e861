"""Drop-in quantizer for LlamaGen (Sun et al. 2024, "Autoregressive Model Beats Diffusion"): images, codes on a sphere.

One fused pass for search, look-up and both losses, without a matrix of distances. The entropy loss is not computed; the
peer computes it even if its weight is 0.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..nn.wide import WideBuffers, wide_dtype
from ..ops.recomputation import change, enter
from .adoption import adopt_as, check_tensors, check_unhooked, share
from .vqgan import code_images, quantize_images

WINDOW = 65536  # rows whose codes `codebook_used` remembers


class VectorQuantizer(WideBuffers):
    """`tokenizer.tokenizer_image.vq_model.VectorQuantizer` of LlamaGen.

    Args:
        n_e: K.
        e_dim: C, channels of z and of the codes.
        beta: weight of the commitment loss.
        entropy_loss_ratio: must be 0, the peer's default.
        l2_norm: scale rows and codes to length one; losses and output are those of the scaled vectors.
        show_usage: in training, return the fraction of the codes that the last 65,536 rows used.

    State: `embedding.weight (K, C)`, a Parameter; with show_usage `codebook_used (65536,)`, a buffer that stays float32
    if the layer is cast to a narrower type.

    Raises:
        ValueError: entropy_loss_ratio is not 0.
    """

    n_e: int
    e_dim: int
    beta: float
    l2_norm: bool
    show_usage: bool
    embedding: nn.Embedding
    codebook_used: Tensor

    def __init__(
        self, n_e: int, e_dim: int, beta: float, entropy_loss_ratio: float, l2_norm: bool, show_usage: bool
    ) -> None:
        super().__init__()
        _check_ratio(entropy_loss_ratio)
        self.n_e, self.e_dim, self.beta, self.entropy_loss_ratio = n_e, e_dim, beta, entropy_loss_ratio
        self.l2_norm, self.show_usage = l2_norm, show_usage
        self.embedding = nn.Embedding(n_e, e_dim)
        weight = self.embedding.weight.data.uniform_(-1.0 / n_e, 1.0 / n_e)
        if l2_norm:
            self.embedding.weight.data = F.normalize(weight, dim=-1)
        if show_usage:
            self.register_buffer("codebook_used", torch.zeros(WINDOW, dtype=wide_dtype()))

    def _codes(self) -> Tensor:
        weight = self.embedding.weight
        return F.normalize(weight, dim=-1) if self.l2_norm else weight

    def forward(self, z: Tensor) -> tuple[Tensor, tuple[Any, Any, Any, float], tuple[None, None, Tensor]]:
        """z (B, C, H, W) -> `(quantized (B, C, H, W), (codebook, commitment, entropy, usage), (None, None, indices))`.

        The losses are 0-d in training, the commitment weighted by beta and the entropy 0, and None in eval; usage is a
        float, 0 in eval and without show_usage; indices are (B * H * W,) in the order of b, h, w.
        """
        rows = F.normalize(z, dim=1) if self.l2_norm else z
        result = quantize_images(rows, self._codes())
        indices = result.indices.flatten()
        extra = (None, None, indices)
        if not self.training:
            return result.quantized, (None, None, None, 0), extra
        usage: float = 0
        if self.show_usage:
            self.widen_buffers()
            usage = self._usage(enter(self.codebook_used, z, [], changes=False).first, indices)
        losses = (result.codebook_loss, self.beta * result.commitment_loss, torch.zeros_like(result.codebook_loss))
        return result.quantized, (*losses, usage), extra

    @torch.no_grad()
    def _usage(self, first: bool | Tensor, indices: Tensor) -> float:
        """Adds the codes of these rows to the window, once per batch; returns the fraction of all codes in it."""
        remembered = self.codebook_used
        window = torch.cat([remembered, indices.to(remembered.dtype)])[-len(remembered) :]

        def remember() -> None:
            remembered.copy_(window)

        change(first, [remembered], remember)
        used = torch.zeros(self.n_e, dtype=torch.bool, device=indices.device)
        return int(used.index_fill_(0, window.to(torch.int64), True).sum()) / self.n_e

    def get_codebook_entry(self, indices: Tensor, shape: Any = None, channel_first: bool = True) -> Tensor:
        """Codes of `indices` for shape (B, C, H, W), or (B, H, W, C) without channel_first; (..., C) for None."""
        codes = F.embedding(indices, self._codes())
        if shape is None or not channel_first:
            return codes if shape is None else codes.view(tuple(shape))
        batch, channels, height, width = shape
        return code_images(codes, (batch, height, width, channels))

    def extra_repr(self) -> str:
        return f"{self.n_e}, {self.e_dim}, beta={self.beta}, l2_norm={self.l2_norm}, show_usage={self.show_usage}"


def _check_ratio(ratio: float) -> None:
    if ratio != 0:
        raise ValueError(f"entropy_loss_ratio must be 0: the entropy loss has no counterpart here, got {ratio!r}")


def _adopt(peer: nn.Module) -> VectorQuantizer:
    shapes = {"embedding.weight": (getattr(peer, "n_e", None), getattr(peer, "e_dim", None))}
    check_tensors(peer, shapes, ("beta", "entropy_loss_ratio", "l2_norm", "show_usage"))
    check_unhooked(peer, "embedding")
    ours = adopt_as(VectorQuantizer, peer)
    _check_ratio(ours.entropy_loss_ratio)
    return ours


ADAPTERS = {"tokenizer.tokenizer_image.vq_model.VectorQuantizer": _adopt}
RELEASERS = dict.fromkeys(ADAPTERS, share)
