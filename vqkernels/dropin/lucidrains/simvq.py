"""`SimVQ` of lucidrains' vector-quantize-pytorch: a frozen codebook behind a learned map, over the fused operators."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ...nn.lookup import look_up
from ...nn.projection import channels_at
from ...nn.rows import RowLayout
from ...ops.quantize import quantize_with_statistics


class SimVQ(nn.Module):
    """Stands in for `vector_quantize_pytorch.SimVQ` (Zhu et al. 2024, "Addressing Representation Collapse in Vector
    Quantized Models with One Linear Layer"): same arguments, defaults, results and state dict.

    State: `frozen_codebook (K, Df)`, a buffer; `code_transform.weight (dim, Df)`, or the state of `codebook_transform`.
    """

    frozen_codebook: Tensor

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        codebook_transform: nn.Module | None = None,
        init_fn: Callable[[Tensor], Tensor] = lambda codebook: codebook,
        channel_first: bool = False,
        rotation_trick: bool = True,
        input_to_quantize_commit_loss_weight: float = 0.25,
        commitment_weight: float = 1.0,
        frozen_codebook_dim: int | None = None,
    ) -> None:
        super().__init__()
        width = dim if frozen_codebook_dim is None else frozen_codebook_dim
        self.codebook_size, self.channel_first, self.rotation_trick = codebook_size, channel_first, rotation_trick
        self.input_to_quantize_commit_loss_weight = input_to_quantize_commit_loss_weight
        self.commitment_weight = commitment_weight
        frozen = init_fn(torch.randn(codebook_size, width) * width**-0.5)
        self.code_transform = nn.Linear(width, dim, bias=False) if codebook_transform is None else codebook_transform
        self.register_buffer("frozen_codebook", frozen)

    @property
    def codebook(self) -> Tensor:
        """The codes `(K, dim)`, with their gradient to the transform."""
        return self.code_transform(self.frozen_codebook)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Quantizes x `(..., dim)`, or `(B, dim, ...)` with `channel_first`.

        Returns:
            quantized: x's shape and dtype, with the gradient of the rotation trick or the straight-through one.
            indices: int64, x's shape without channels.
            loss: 0-d, `commitment_weight * (codebook + input_to_quantize_commit_loss_weight * commitment)`; also in
                eval mode.
        """
        codes = self.codebook
        result = quantize_with_statistics(
            x,
            codes,
            gradient="rotation" if self.rotation_trick else "straight_through",
            channel_dim=RowLayout.of(x, codes.shape[-1], 1 if self.channel_first else -1).channel_dim,
            statistics=False,
        )
        loss = result.codebook_loss + self.input_to_quantize_commit_loss_weight * result.commitment_loss
        return result.quantized, result.indices, loss * self.commitment_weight

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        """The codes of `indices`, laid out like x; -1 gives zeros."""
        frozen = look_up(self.frozen_codebook, indices)
        codes = self.code_transform(frozen).masked_fill((indices < 0).unsqueeze(-1), 0)
        return channels_at(codes, 1) if self.channel_first else codes

    def extra_repr(self) -> str:
        return f"codebook_size={self.codebook_size}, commitment_weight={self.commitment_weight}"
