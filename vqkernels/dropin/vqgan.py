"""The quantizer of the VQGAN family (Esser et al. 2021, "Taming Transformers"): images, two losses, remapped indices.

One fused pass searches, looks up and computes both losses. It reads images (B, C, H, W) without a permuted copy. Ties
go to the lowest index. The output is exactly the code; the peers give z + (code - z).
"""

from typing import Any

import torch
from torch import Tensor, nn

from ..ops.quantize import Quantization, quantize_with_statistics


def quantize_images(z: Tensor, codes: Tensor, statistics: bool = False) -> Quantization:
    """One pass over z (B, C, H, W). The quantized images are contiguous; all have the common dtype of z and codes."""
    if z.dim() != 4:
        raise ValueError(f"z must be (B, C, H, W), got {list(z.shape)}")
    dtype = torch.promote_types(z.dtype, codes.dtype)
    result = quantize_with_statistics(z.to(dtype), codes, channel_dim=1, statistics=statistics)
    return result._replace(
        quantized=result.quantized.contiguous(),
        codebook_loss=result.codebook_loss.to(dtype),
        commitment_loss=result.commitment_loss.to(dtype),
    )


def code_images(codes: Tensor, shape: Any) -> Tensor:
    """Codes (B * H * W, C) -> (B, C, H, W) for shape (B, H, W, C); unchanged for shape None."""
    return codes if shape is None else codes.view(tuple(shape)).permute(0, 3, 1, 2).contiguous()


class RemappedQuantizer(nn.Module):
    """Codes in `embedding`; optionally indices are renumbered among the codes in use.

    State: `embedding.weight (K, D)`, a Parameter; with remap `used (R,)`, a buffer.
    """

    n_e: int
    beta: float
    legacy: bool
    remap: str | None
    re_embed: int
    unknown_index: str | int
    sane_index_shape: bool
    embedding: nn.Embedding
    used: Tensor

    def __init__(
        self,
        n_e: int,
        dim: int,
        beta: float,
        remap: str | None,
        unknown_index: str | int,
        sane_index_shape: bool,
        legacy: bool,
    ) -> None:
        super().__init__()
        if unknown_index not in ("random", "extra") and not isinstance(unknown_index, int):
            raise ValueError(f"unknown_index must be 'random', 'extra' or an int, got {unknown_index!r}")
        self.n_e, self.beta, self.legacy = n_e, beta, legacy
        self.embedding = nn.Embedding(n_e, dim)
        self.embedding.weight.data.uniform_(-1.0 / n_e, 1.0 / n_e)
        self.remap, self.re_embed = remap, n_e
        if remap is not None:
            import numpy as np

            self.register_buffer("used", torch.tensor(np.load(remap)))
            self.re_embed = len(self.used) + (unknown_index == "extra")
            self.unknown_index = len(self.used) if unknown_index == "extra" else unknown_index
        self.sane_index_shape = sane_index_shape

    def quantize(self, z: Tensor) -> tuple[Tensor, Tensor, tuple[None, None, Tensor]]:
        """z (B, C, H, W) -> `(quantized (B, C, H, W), loss (), (None, None, indices))`.

        The indices are (B * H * W,) in the order of b, h, w; (B * H * W, 1) with remap; (B, H, W) with
        sane_index_shape. With legacy, beta weighs the codebook loss, otherwise the commitment loss.
        """
        result = quantize_images(z, self.embedding.weight)
        if self.legacy:
            loss = result.commitment_loss + self.beta * result.codebook_loss
        else:
            loss = self.beta * result.commitment_loss + result.codebook_loss
        indices = result.indices
        if self.remap is not None:
            indices = self.remap_to_used(indices)
        if not self.sane_index_shape:
            indices = indices.flatten() if self.remap is None else indices.reshape(-1, 1)
        return result.quantized, loss, (None, None, indices)

    def remap_to_used(self, inds: Tensor) -> Tensor:
        """Indices of codes -> their first places in `used`; a code that is not in it becomes `unknown_index`."""
        used = self.used.to(inds)
        places = torch.full((self.n_e,), len(used), dtype=inds.dtype, device=inds.device)
        places.scatter_reduce_(0, used, torch.arange(len(used), device=inds.device).to(inds), "amin")
        found = places[inds]
        unknown = found == len(used)
        if isinstance(self.unknown_index, str):  # "random": as many draws as the peer makes
            drawn = torch.randint(0, self.re_embed, (int(unknown.sum()),))
            found[unknown] = drawn.to(found)
            return found
        return torch.where(unknown, self.unknown_index, found)

    def unmap_to_all(self, inds: Tensor) -> Tensor:
        """Places in `used` -> indices of codes; the extra index means the first of them."""
        if self.re_embed > len(self.used):
            inds = torch.where(inds >= len(self.used), 0, inds)
        return self.used.to(inds)[inds]

    def get_codebook_entry(self, indices: Tensor, shape: Any) -> Tensor:
        """Codes of `indices`: (B, C, H, W) for shape (B, H, W, C), (..., C) for shape None."""
        if self.remap is not None:
            indices = self.unmap_to_all(indices).reshape(-1)
        return code_images(self.embedding(indices), shape)

    def extra_repr(self) -> str:
        return f"{self.n_e}, {self.embedding.weight.shape[1]}, beta={self.beta}, legacy={self.legacy}"
