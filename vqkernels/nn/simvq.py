"""SimVQ (Zhu et al. 2024, "Addressing Representation Collapse in Vector Quantized Models with One Linear Layer")."""

from typing import Any

import torch
from torch import Tensor, nn

from ..ops.quantize import quantize_with_statistics
from ..ops.recomputation import change, enter
from .arguments import check_size
from .base import check_common
from .freezing import Freezable, untouched
from .lookup import check_indices, look_up
from .metrics import Counted
from .projection import channels_at, project_codes
from .rows import RowLayout
from .synchronisation import Ranks
from .wide import WideBuffers


class SimVQ(Counted, Freezable, WideBuffers):
    """Codes that are one learned linear map of frozen random vectors: every step moves all of them.

    Args:
        dim: channels of z and of the codes.
        codebook_size: K.
        basis_dim: channels of the frozen vectors; `dim` when None.
        beta: weight of the commitment loss.
        gradient, precision, backend: as in `vqkernels.vector_quantize`.
        channel_dim: the axis of z that holds the channels.
        process_group: the ranks whose counts are summed, as in `VectorQuantizer`.

    State: `basis (K, basis_dim)` float32, a buffer, normal with variance 1 / basis_dim; `transform.weight
    (dim, basis_dim)`; `counts (K,)` int64 of the last training step. The codes are `basis @ transform.weight.T`.
    """

    basis: Tensor

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        *,
        basis_dim: int | None = None,
        beta: float = 0.25,
        gradient: str = "straight_through",
        channel_dim: int = -1,
        precision: str = "exact",
        backend: str = "auto",
        process_group: Any = None,
    ) -> None:
        super().__init__()
        check_common(dim, codebook_size, beta, gradient, channel_dim, precision, backend)
        basis_dim = dim if basis_dim is None else basis_dim
        check_size("basis_dim", basis_dim)
        self.dim, self.codebook_size, self.beta, self.gradient = dim, codebook_size, beta, gradient
        self.channel_dim, self.precision, self.backend = channel_dim, precision, backend
        self.ranks = Ranks(process_group)
        self.register_buffer("basis", torch.empty(codebook_size, basis_dim, dtype=torch.float32))
        self.register_buffer("counts", torch.zeros(codebook_size, dtype=torch.int64))
        self.transform = nn.Linear(basis_dim, dim, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws basis and transform anew and clears the counts."""
        self.basis.normal_(std=self.basis.shape[1] ** -0.5)
        self.transform.reset_parameters()
        self.counts.zero_()

    @property
    def codes(self) -> Tensor:
        """The vectors that are looked up, `(K, dim)`, with their gradient to the transform."""
        return project_codes(self.transform, self.basis)

    def forward(
        self, z: Tensor, *, mask: Tensor | None = None, lengths: Tensor | None = None, freeze: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Quantizes z; arguments and results as in `VectorQuantizer.forward`, loss = codebook + beta * commitment."""
        layout = RowLayout.of(z, self.dim, self.channel_dim, mask=mask, lengths=lengths)
        freeze = freeze or self.frozen
        if self.training:
            self.widen_buffers()
        seen = enter(self.basis, z, []) if self.training and not freeze else None
        result = quantize_with_statistics(
            z,
            self.codes.detach() if freeze else self.codes,
            mask=layout.mask,
            gradient=self.gradient,
            precision=self.precision,
            channel_dim=layout.channel_dim,
            backend=self.backend,
            statistics=seen is not None and seen.learns is not False,
        )
        if seen is not None and seen.learns is not False:
            change(seen.learns, [self.counts], lambda: self._count(result.counts[0]))
        quantized, loss = result.quantized, result.codebook_loss + self.beta * result.commitment_loss
        if freeze and self.training:
            quantized, loss = untouched(self.transform.weight, quantized, loss)
        return quantized, result.indices, loss

    @torch.no_grad()
    def _count(self, counts: Tensor) -> None:
        self.counts.copy_(self.ranks.sum(counts)[0])

    def decode(self, indices: Tensor, *, check: bool = True) -> Tensor:
        """Codes of `indices`, laid out like z; as `VectorQuantizer.decode`."""
        indices = check_indices(indices, self.codebook_size, 1, check)
        return channels_at(look_up(self.codes, indices), self.channel_dim)

    def extra_repr(self) -> str:
        return f"{self.dim}, {self.codebook_size}, beta={self.beta}, gradient={self.gradient!r}"
