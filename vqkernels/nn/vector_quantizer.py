"""The layer: a codebook, trained by the codebook loss or by moving averages, over the fused operators."""

import torch
from torch import Tensor, nn

from ..backends import registry
from ..ops.checks import METRICS, PRECISIONS, check_choice
from ..ops.quantize import quantize_with_statistics
from ..ops.snapshot import snapshot
from . import metrics
from .ema import ema_update_


class VectorQuantizer(nn.Module):
    """Vector quantization (van den Oord et al. 2017, "Neural Discrete Representation Learning").

    Args:
        dim: D, channels of z and of the codes.
        codebook_size: K.
        beta: weight of the commitment loss.
        ema_decay: None trains the codebook by the paper's codebook loss; a float in [0, 1) trains it by exponential
            moving averages of the rows of each code (see `vqkernels.nn.ema`), during every training forward.
        metric, precision, backend: as in `vqkernels.nearest_code`.
        channel_dim: the axis of z that holds the D channels; 1 for images `(B, D, H, W)`.

    State: `codebook (K, D)` float32, a Parameter when trained by gradient and otherwise a buffer; `counts (K,)` int64
    of the last training step; with EMA `ema_counts (K,)`, `ema_sums (K, D)` float32 and `ema_steps ()` int64. Codes
    start uniform in [-1/K, 1/K]. Floating buffers are never narrower than float32, whatever the module is cast to.
    """

    codebook: Tensor
    counts: Tensor
    ema_counts: Tensor
    ema_sums: Tensor
    ema_steps: Tensor

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        *,
        beta: float = 0.25,
        ema_decay: float | None = None,
        metric: str = "euclidean",
        channel_dim: int = -1,
        precision: str = "exact",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        for name, value in (("dim", dim), ("codebook_size", codebook_size)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive int, got {value!r}")
        if ema_decay is not None and not 0 <= ema_decay < 1:
            raise ValueError(f"ema_decay must be None or in [0, 1), got {ema_decay!r}")
        if beta < 0:
            raise ValueError(f"beta must not be negative, got {beta!r}")
        check_choice("metric", metric, METRICS)
        check_choice("precision", precision, PRECISIONS)
        check_choice("backend", backend, registry.NAMES)
        self.dim, self.codebook_size, self.beta, self.ema_decay = dim, codebook_size, beta, ema_decay
        self.metric, self.channel_dim, self.precision, self.backend = metric, channel_dim, precision, backend

        codebook = torch.empty(codebook_size, dim, dtype=torch.float32)
        self.register_buffer("counts", torch.zeros(codebook_size, dtype=torch.int64))
        if ema_decay is None:
            self.codebook = nn.Parameter(codebook)
        else:
            self.register_buffer("codebook", codebook)
            self.register_buffer("ema_counts", torch.zeros(codebook_size))
            self.register_buffer("ema_sums", torch.zeros(codebook_size, dim))
            self.register_buffer("ema_steps", torch.zeros((), dtype=torch.int64))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws the codes anew and clears all statistics."""
        self.codebook.uniform_(-1 / self.codebook_size, 1 / self.codebook_size)
        for _, buffer in self.named_buffers(recurse=False):
            if buffer is not self.codebook:
                buffer.zero_()

    def forward(self, z: Tensor, *, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Quantizes z.

        Args:
            z: `(..., D)`, or the layout named by `channel_dim`.
            mask: bool, z's shape without channels; rows where it is False become zeros with index -1 and count nowhere.

        Returns:
            quantized: z's shape, dtype and layout, with the straight-through gradient.
            indices: int64, z's shape without channels.
            loss: 0-d; `codebook + beta * commitment`, or `beta * commitment` with EMA. Also in eval mode.
        """
        if z.dim() <= max(self.channel_dim, -self.channel_dim - 1) or z.shape[self.channel_dim] != self.dim:
            raise ValueError(f"z must have {self.dim} channels at channel_dim={self.channel_dim}, got {list(z.shape)}")
        updates = self.training and self.ema_decay is not None
        # The backward pass needs the codes that were looked up, and the update below overwrites them.
        codebook = snapshot(self.codebook) if updates and torch.is_grad_enabled() else self.codebook
        result = quantize_with_statistics(
            z,
            codebook,
            mask=mask,
            metric=self.metric,
            precision=self.precision,
            channel_dim=self.channel_dim,
            backend=self.backend,
            statistics=self.training,
        )
        if self.training:
            self.counts.copy_(result.counts[0])
        if self.training and self.ema_decay is not None:
            ema_update_(self.codebook, self.ema_counts, self.ema_sums, result.counts[0], result.sums[0], self.ema_decay)
            self.ema_steps.add_(1)
        loss = self.beta * result.commitment_loss
        if self.ema_decay is None:
            loss = loss + result.codebook_loss
        return result.quantized, result.indices, loss

    def decode(self, indices: Tensor, *, check: bool = True) -> Tensor:
        """Codes of `indices`, laid out like z; -1 becomes zeros.

        Args:
            indices: int64 of z's shape without channels, in [-1, codebook_size).
            check: on a GPU, check the range at the price of one synchronisation. Without it, and always while
                compiling, a row out of range becomes NaN. On the CPU the range is always checked.
        """
        if indices.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"indices must be int64 or int32, got {indices.dtype}")
        outside = (indices < -1) | (indices >= self.codebook_size)
        if not torch.compiler.is_compiling() and (check or indices.device.type == "cpu") and bool(outside.any()):
            worst = int(indices[outside].flatten()[0])
            raise IndexError(f"indices must be in [-1, {self.codebook_size - 1}], got {worst}")
        codes = self.codebook[indices.clamp(0, self.codebook_size - 1)]
        codes = torch.where((indices < 0).unsqueeze(-1), 0.0, codes)
        codes = torch.where(outside.unsqueeze(-1), torch.nan, codes)
        return codes.movedim(-1, self.channel_dim)

    @property
    def perplexity(self) -> Tensor:
        """exp of the entropy of the last training step's code frequencies, 0-d: between 1 and K."""
        return metrics.perplexity(self.counts)

    @property
    def usage(self) -> Tensor:
        """Fraction of codes that the last training step used, 0-d."""
        return metrics.usage(self.counts)

    @property
    def dead_codes(self) -> Tensor:
        """Number of codes that the last training step did not use, 0-d int64."""
        return metrics.dead_codes(self.counts)

    def _apply(self, fn, recurse=True):
        """Moves the state where `fn` moves it, but keeps the EMA state in float32 when a cast would go below."""
        names = ("codebook", "ema_counts", "ema_sums") if self.ema_decay is not None else ()
        wide = {name: getattr(self, name) for name in names}
        super()._apply(fn, recurse)
        for name, buffer in wide.items():
            moved = getattr(self, name)
            if moved.dtype.itemsize < torch.float32.itemsize:
                setattr(self, name, buffer.to(moved.device, torch.float32))
        return self

    def extra_repr(self) -> str:
        parts = [f"{self.dim}, {self.codebook_size}", f"beta={self.beta}"]
        if self.ema_decay is not None:
            parts.append(f"ema_decay={self.ema_decay}")
        defaults = {"metric": "euclidean", "channel_dim": -1, "precision": "exact", "backend": "auto"}
        parts += [f"{name}={getattr(self, name)!r}" for name, value in defaults.items() if getattr(self, name) != value]
        return ", ".join(parts)
