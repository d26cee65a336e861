"""Drop-in quantizers for the Descript audio codec (Kumar et al. 2023) and for DAC in `transformers`.

Rows are projected to few channels, compared with the codes by direction (Yu et al. 2021, "Vector-quantized Image
Modeling with Improved VQGAN"), and looked up unscaled. The search compares directions itself: it builds neither scaled
copies nor an N x K matrix. Ties go to the lowest index. A code of length 0 has the product 0 with every row.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops.nearest import nearest_code
from ..ops.quantize import vector_quantize
from .adoption import adopt_as, check_unhooked, share


class _Factorized(nn.Module):
    """A codebook of `codebook_dim` channels between two convolutions of width one."""

    codebook_dim: int
    in_proj: nn.Conv1d
    out_proj: nn.Conv1d
    codebook: nn.Embedding

    def decode_latents(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """latents (B, codebook_dim, T) -> `(codes (B, codebook_dim, T), indices (B, T))`; codes train the codebook."""
        indices = nearest_code(latents, self.codebook.weight, metric="cosine", channel_dim=1)
        return F.embedding(indices.clone(), self.codebook.weight).transpose(1, 2), indices


class VectorQuantize(_Factorized):
    """`dac.nn.quantize.VectorQuantize`.

    Args:
        input_dim: channels of z.
        codebook_size: K.
        codebook_dim: channels of the codes.

    State: `in_proj`, `out_proj` with `weight_g`, `weight_v`, `bias` (weight normalisation); `codebook.weight`.
    """

    def __init__(self, input_dim: int, codebook_size: int, codebook_dim: int) -> None:
        super().__init__()
        self.codebook_size, self.codebook_dim = codebook_size, codebook_dim
        self.in_proj = nn.utils.weight_norm(nn.Conv1d(input_dim, codebook_dim, kernel_size=1))
        self.out_proj = nn.utils.weight_norm(nn.Conv1d(codebook_dim, input_dim, kernel_size=1))
        self.codebook = nn.Embedding(codebook_size, codebook_dim)

    def embed_code(self, embed_id: Tensor) -> Tensor:
        """Codes (..., codebook_dim) of int64 (...)."""
        return F.embedding(embed_id, self.codebook.weight)

    def decode_code(self, embed_id: Tensor) -> Tensor:
        """Codes (B, codebook_dim, T) of int64 (B, T)."""
        return self.embed_code(embed_id).transpose(1, 2)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """z (B, input_dim, T) -> `(quantized, commitment (B,), codebook (B,), indices (B, T), latents)`.

        The losses are means over channels and time, one per element of the batch.
        """
        latents = self.in_proj(z)
        quantized, indices, _, _ = vector_quantize(
            latents, self.codebook.weight.detach(), metric="cosine", channel_dim=1
        )
        # A clone, because the look-up saves its indices and a caller may change those returned.
        codes = self.decode_code(indices.clone())
        commitment = (latents - codes.detach()).square().mean((1, 2))
        codebook = (codes - latents.detach()).square().mean((1, 2))
        return self.out_proj(quantized), commitment, codebook, indices, latents


class ResidualVectorQuantize(nn.Module):
    """`dac.nn.quantize.ResidualVectorQuantize`: each quantizer quantizes the residual of the ones before.

    Args:
        input_dim: channels of z.
        n_codebooks: Q.
        codebook_size: K.
        codebook_dim: channels of the codes, for all or for each.
        quantizer_dropout: share of a training batch in which a random number of quantizers is used.

    State: `quantizers.{i}.*`.
    """

    def __init__(
        self,
        input_dim: int = 512,
        n_codebooks: int = 9,
        codebook_size: int = 1024,
        codebook_dim: int | Sequence[int] = 8,
        quantizer_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        dims = [codebook_dim] * n_codebooks if isinstance(codebook_dim, int) else list(codebook_dim)
        self.n_codebooks, self.codebook_size, self.codebook_dim = n_codebooks, codebook_size, dims
        self.quantizer_dropout = quantizer_dropout
        self.quantizers = nn.ModuleList(VectorQuantize(input_dim, codebook_size, dim) for dim in dims[:n_codebooks])

    def forward(self, z: Tensor, n_quantizers: int | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """z (B, input_dim, T) -> `(quantized, codes (B, Q, T), latents (B, sum of dims, T), commitment, codebook)`.

        Args:
            n_quantizers: how many to use in eval. In training all are used, except by dropout, as in the peer.
        """
        batch = len(z)
        kept = torch.full((batch,), self.n_codebooks + 1 if self.training else n_quantizers or self.n_codebooks)
        if self.training:
            drawn = torch.randint(1, self.n_codebooks + 1, (batch,))
            dropped = int(batch * self.quantizer_dropout)
            kept[:dropped] = drawn[:dropped]
        kept = kept.to(z.device)
        count = self.n_codebooks if self.training or n_quantizers is None else n_quantizers
        residual, total = z, torch.zeros_like(z)
        losses: list[Tensor] = [z.new_zeros(()), z.new_zeros(())]
        codes, latents = [], []
        for number, quantizer in enumerate(self.quantizers[:count]):
            quantized, commitment, codebook, indices, latent = quantizer(residual)
            mask = number < kept
            total = total + quantized * mask[:, None, None]
            residual = residual - quantized
            losses = [loss + (part * mask).mean() for loss, part in zip(losses, (commitment, codebook), strict=True)]
            codes.append(indices)
            latents.append(latent)
        return total, torch.stack(codes, 1), torch.cat(latents, 1), losses[0], losses[1]

    def _first(self, count: int) -> list[VectorQuantize]:
        return [x for x in self.quantizers[:count] if isinstance(x, VectorQuantize)]

    def from_codes(self, codes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """codes (B, Q, T) -> `(quantized (B, input_dim, T), their latents (B, sum of dims, T), codes)`."""
        pairs = zip(self._first(codes.shape[1]), codes.unbind(1), strict=True)
        latents = [quantizer.decode_code(indices) for quantizer, indices in pairs]
        parts = [q.out_proj(latent) for q, latent in zip(self._first(len(latents)), latents, strict=True)]
        return torch.stack(parts).sum(0), torch.cat(latents, 1), codes

    def from_latents(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """latents (B, sum of dims, T) -> `(quantized, quantized latents, codes (B, Q, T))`, of the levels that fit."""
        total, found, codes, start = None, [], [], 0
        for quantizer in self._first(self.n_codebooks):
            end = start + quantizer.codebook_dim
            if end > latents.shape[1]:
                break
            latent, indices = quantizer.decode_latents(latents[:, start:end])
            part = quantizer.out_proj(latent)
            total = part if total is None else total + part
            found.append(latent)
            codes.append(indices)
            start = end
        if total is None:
            raise ValueError(f"latents must have the channels of one quantizer at least, got {list(latents.shape)}")
        return total, torch.cat(found, 1), torch.stack(codes, 1)


class DacVectorQuantize(_Factorized):
    """`transformers.models.dac.modeling_dac.DacVectorQuantize`.

    State: `in_proj.{weight, bias}`, `out_proj.{weight, bias}`, `codebook.weight`.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.codebook_dim = config.codebook_dim
        self.in_proj = nn.Conv1d(config.hidden_size, config.codebook_dim, kernel_size=1)
        self.out_proj = nn.Conv1d(config.codebook_dim, config.hidden_size, kernel_size=1)
        self.codebook = nn.Embedding(config.codebook_size, config.codebook_dim)

    def forward(self, hidden_state: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """hidden_state (B, hidden_size, T) -> `(quantized, commitment (), codebook (), indices (B, T), latents)`."""
        latents = self.in_proj(hidden_state)
        quantized, indices, codebook, commitment = vector_quantize(
            latents, self.codebook.weight, metric="cosine", channel_dim=1
        )
        dtype = torch.promote_types(latents.dtype, self.codebook.weight.dtype)
        return self.out_proj(quantized), commitment.to(dtype), codebook.to(dtype), indices, latents


def _adopt(peer: nn.Module) -> VectorQuantize:
    check_unhooked(peer, "codebook")
    return adopt_as(VectorQuantize, peer)


def _adopt_transformers(peer: nn.Module) -> DacVectorQuantize:
    check_unhooked(peer, "codebook")
    return adopt_as(DacVectorQuantize, peer)


ADAPTERS = {
    "dac.nn.quantize.VectorQuantize": _adopt,
    "transformers.models.dac.modeling_dac.DacVectorQuantize": _adopt_transformers,
}
RELEASERS = dict.fromkeys(ADAPTERS, share)
