"""What the layers around a trained codebook share: arguments, projections, the frame of a forward, decoding, repr."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple, TypeVar

from torch import Tensor, nn

from ..backends import registry
from ..ops.checks import GRADIENTS, METRICS, PRECISIONS, check_choice
from .arguments import check_decay, check_int, check_number, check_positive, check_seed, check_size
from .freezing import untouched
from .learning import Seen, TrainedCodebook
from .normalisation import unit
from .projection import channels_at, project, project_codes
from .rows import RowLayout, Rows, zero_masked
from .synchronisation import Ranks

Layer = TypeVar("Layer", bound="CodebookQuantizer")
_NEVER_SHOWN = {"codebook_dim", "beta", "revive_threshold", "seed", "process_group"}  # as differing from their defaults


class Forward(NamedTuple):
    """What a forward works with."""

    layout: RowLayout
    rows: Rows  # z in the space of the codes, split among heads
    codebook: Tensor  # that is looked up, with its gradient
    freeze: bool  # codes and statistics stay as they are
    seen: Seen | None  # None in eval mode
    learns: Seen | None  # None where neither codes nor statistics change


def check_common(
    dim: int, codebook_size: int, beta: float, gradient: str, channel_dim: int, precision: str, backend: str
) -> None:
    """Checks the arguments that every quantizer layer has."""
    check_size("dim", dim)
    check_size("codebook_size", codebook_size)
    check_number("beta", beta, 0)
    check_int("channel_dim", channel_dim)
    check_choice("gradient", gradient, GRADIENTS)
    check_choice("precision", precision, PRECISIONS)
    check_choice("backend", backend, registry.NAMES)


def shown_defaults(constructor: Callable[..., None]) -> dict[str, Any]:
    """Keyword arguments that the repr of a layer shows where they differ from these defaults."""
    arguments = inspect.signature(constructor).parameters.values()
    return {x.name: x.default for x in arguments if x.kind is x.KEYWORD_ONLY and x.name not in _NEVER_SHOWN}


class CodebookQuantizer(TrainedCodebook):
    """A layer around a trained codebook, which splits the channels of z into equal parts.

    A subclass documents its arguments, and looks up codes in `forward` between `_enter` and `_leave`.

    Args:
        parts: what the parts of the channels are called, and how many there are.
        leading: names and sizes of the axes of the codebook before `(K, D)`.
        cosine: rows and codes are scaled to length one.
        sampled, draws, candidates: as in `CodebookState._make_state`.
        Everything else as in `VectorQuantizer`.
    """

    _shown: ClassVar[dict[str, Any]]  # `shown_defaults` of the constructor

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        *,
        codebook_dim: int | None,
        parts: tuple[str, int],
        leading: dict[str, int],
        beta: float,
        ema_decay: float | None,
        ema_update: str,
        metric: str,
        gradient: str,
        init: str,
        revive: str,
        revive_threshold: float,
        seed: int | None,
        channel_dim: int,
        precision: str,
        backend: str,
        process_group: Any,
        cosine: bool = False,
        sampled: bool = False,
        draws: bool = False,
        candidates: int | None = None,
    ) -> None:
        check_common(dim, codebook_size, beta, gradient, channel_dim, precision, backend)
        name, number = parts
        check_size(name, number)
        if codebook_dim is None:
            if dim % number:
                raise ValueError(f"dim must be a multiple of {name}={number} where codebook_dim is None, got {dim}")
            codebook_dim = dim // number
        check_size("codebook_dim", codebook_dim)
        check_decay("ema_decay", ema_decay)
        check_positive("revive_threshold", revive_threshold, below=1)
        check_seed(seed)
        check_choice("ema_update", ema_update, ("forward", "manual"))
        check_choice("metric", metric, METRICS)
        check_choice("init", init, ("uniform", "kmeans"))
        check_choice("revive", revive, ("off", "rows"))
        if ema_update == "manual" and ema_decay is None:
            raise ValueError('ema_update="manual" needs ema_decay: without it the optimizer updates the codebook')
        super().__init__()
        self.dim, self.codebook_size, self.codebook_dim, self._parts = dim, codebook_size, codebook_dim, number
        self.beta, self.metric, self.gradient = beta, metric, gradient
        self.channel_dim, self.precision, self.backend = channel_dim, precision, backend
        self.ema_decay, self.ema_update, self.ranks = ema_decay, ema_update, Ranks(process_group)
        self.init, self.revive, self.revive_threshold = init, revive, revive_threshold
        self._manual, self._cosine, self._given_seed = ema_update == "manual", cosine, seed
        axes = {**leading, "codebook_size": codebook_size, "channels per code": codebook_dim}
        self._make_state(axes, sampled=sampled, draws=draws, candidates=candidates)
        projects = number * codebook_dim != dim
        self.project_in = nn.Linear(dim, number * codebook_dim) if projects else None
        self.project_out = nn.Linear(number * codebook_dim, dim) if projects else None
        self.reset_codebook()

    @classmethod
    def _holding(cls: type[Layer], codes: Tensor, weight: float, options: dict[str, Any]) -> Layer:
        """A layer with these codes `(..., K, D)`."""
        size, dim = codes.shape[-2:]
        layer = cls(codebook_size=size, codebook_dim=dim, **options).to(codes.device)
        layer.set_codebook(codes.view(layer.codebook.shape), weight)
        return layer

    def reset_parameters(self) -> None:
        """Draws codes and projections anew and clears all statistics."""
        self.reset_codebook()
        for linear in (self.project_in, self.project_out):
            if linear is not None:
                linear.reset_parameters()

    def _enter(
        self,
        z: Tensor,
        mask: Tensor | None,
        lengths: Tensor | None,
        freeze: bool,
        *,
        separate: bool,
        steps: Tensor | None = None,
        scalars: Sequence[Tensor] = (),
    ) -> Forward:
        """Begins a forward.

        Args:
            z, mask, lengths, freeze: of `forward`.
            separate: each part of the channels has its own codebook.
            steps, scalars: as in `TrainedCodebook._see`.
        """
        layout = RowLayout.of(
            z, self.dim, self.channel_dim, mask=mask, lengths=lengths, heads=self._parts, separate=separate
        )
        inner = z
        if self.project_in is not None or self._cosine:
            inner = layout.zero_masked(z)  # a masked row may hold a NaN, and 0 * NaN would reach the weights' gradient
        if self.project_in is not None:
            inner = project(self.project_in, inner, layout.channel_dim)
        rows = layout.split(inner)
        if self._cosine:
            rows = rows._replace(values=unit(rows.values, rows.channel_dim))
        freeze = freeze or self.frozen
        seen = self._see(z, rows, freeze, steps, scalars)
        learns = None if freeze or (seen is not None and seen.learns is False) else seen
        # The backward pass needs the codes that are looked up, and the update after it overwrites them.
        return Forward(layout, rows, self._looked_up(seen, freeze), freeze, seen, learns)

    def _loss(self, commitment: Tensor, codebook: Tensor) -> Tensor:
        """`codebook + beta * commitment`, or `beta * commitment` with EMA."""
        loss = self.beta * commitment
        return loss if self.ema_decay is not None else loss + codebook

    def _leave(self, forward: Forward, quantized: Tensor, loss: Tensor, dtype: Any) -> tuple[Tensor, Tensor]:
        """Ends a forward: quantized rows in z's shape and dtype, and the loss."""
        quantized = forward.layout.join(quantized)
        if self.project_out is not None:
            quantized = project_codes(self.project_out, quantized, forward.layout.channel_dim)
            quantized = forward.layout.zero_masked(quantized)
        quantized = quantized.to(dtype)
        if forward.freeze and self.training:  # DDP needs an edge to the codebook, though no gradient
            quantized, loss = untouched(self.codebook, quantized, loss)
        return quantized, loss

    def _decoded(self, codes: Tensor, indices: Tensor, axes: int) -> Tensor:
        """Codes of indices laid out like z; the last `axes` axes of the indices are parts and levels."""
        codes = codes.flatten(-2) if self._parts > 1 else codes
        if self.project_out is not None:
            masked = indices == -1
            for _ in range(axes):
                masked = masked.all(-1)
            codes = zero_masked(project_codes(self.project_out, codes), ~masked, -1)
        return channels_at(codes, self.channel_dim)

    def _sizes_repr(self) -> str:
        return f"{self.dim}, {self.codebook_size}"

    def extra_repr(self) -> str:
        parts = [self._sizes_repr(), f"beta={self.beta}"]
        for name, default in self._shown.items():
            if getattr(self, name) != default:
                parts.append(f"{name}={getattr(self, name)!r}")
        if self.codebook_dim * self._parts != self.dim:
            parts.insert(1, f"codebook_dim={self.codebook_dim}")
        return ", ".join(parts)
