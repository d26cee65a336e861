"""The residual layer: a stack of codebooks, each quantizes what the levels before it left, in one operator call."""

import math
from typing import Any

import torch
from torch import Tensor

from ..ops.recomputation import advance
from ..ops.residual import residual_quantize_with_statistics
from .arguments import check_codes, check_flag, check_number, check_size
from .base import CodebookQuantizer, Forward, shown_defaults
from .initialisation import initial_stack
from .lookup import check_stack_indices, sum_codes
from .random import hashed
from .revival import Candidates
from .rows import Rows
from .stack_residuals import residual_candidates


class ResidualVectorQuantizer(CodebookQuantizer):
    """Residual vector quantization (Zeghidour et al. 2021, "SoundStream: An End-to-End Neural Audio Codec").

    Level q quantizes r_q, what levels 0 to q - 1 left of z; `quantized` is the sum of all codes. Search,
    look-up, losses and statistics of all levels are one call, and with a process group their statistics one all-reduce.

    Args:
        dim: channels of z.
        codebook_size: K, codes of each level.
        levels: Q.
        codebook_dim: D, channels of the codes; `dim / groups` when None. Where `groups * codebook_dim` is not `dim`,
            linear maps `project_in` and `project_out` lead into the space of the codes and back.
        groups: G, into how many equal parts the channels are split; each has its own stack.
        shared_codebook: one codebook for all levels of a stack instead of one per level.
        dropout: quantizer dropout (Kumar et al. 2023, "High-Fidelity Audio Compression with Improved RVQGAN"): the
            fraction of the elements of z's first axis that pass, in a training forward, only the first n levels, n
            drawn uniformly from 1 to Q. Drawn on the device from (seed, step, element): the same on all ranks.
        beta: weight of the commitment losses.
        ema_decay, ema_update, revive, revive_threshold, seed, channel_dim, precision, backend, process_group: as in
            `VectorQuantizer`;
            a revived code of level q becomes what is left at level q of a row of the batch.
        metric: "euclidean", "dot" or "cosine", as in `vqkernels.nearest_code`: it governs the searches only.
        gradient: "straight_through" or "rotation": how the gradient of `quantized` reaches z, once for the whole stack.
        init: "uniform" starts the codes in [-1/K, 1/K]; "kmeans" computes them from the first training batch, level
            after level, each from what the levels before it leave.

    State: `codebook (Q, K, D)`, `(K, D)` if shared, with a leading axis G if there are groups; `counts`, `ema_counts`,
    `ema_sums` and the others of `VectorQuantizer` of like shape; with dropout `dropout_steps ()` int64.
    """

    dropout_steps: Tensor

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        levels: int,
        *,
        codebook_dim: int | None = None,
        groups: int = 1,
        shared_codebook: bool = False,
        dropout: float = 0.0,
        beta: float = 0.25,
        ema_decay: float | None = None,
        ema_update: str = "forward",
        metric: str = "euclidean",
        gradient: str = "straight_through",
        init: str = "uniform",
        revive: str = "off",
        revive_threshold: float = 0.1,
        seed: int | None = None,
        channel_dim: int = -1,
        precision: str = "exact",
        backend: str = "auto",
        process_group: Any = None,
    ) -> None:
        check_size("levels", levels)
        check_size("groups", groups)
        check_flag("shared_codebook", shared_codebook)
        check_number("dropout", dropout, 0)
        if dropout > 1:
            raise ValueError(f"dropout must be a fraction in [0, 1], got {dropout!r}")
        axes = {"groups": groups} if groups > 1 else {}
        super().__init__(
            dim,
            codebook_size,
            codebook_dim=codebook_dim,
            parts=("groups", groups),
            leading=axes if shared_codebook else {**axes, "levels": levels},
            beta=beta,
            ema_decay=ema_decay,
            ema_update=ema_update,
            metric=metric,
            gradient=gradient,
            init=init,
            revive=revive,
            revive_threshold=revive_threshold,
            seed=seed,
            channel_dim=channel_dim,
            precision=precision,
            backend=backend,
            process_group=process_group,
            draws=dropout > 0,
            candidates=groups,
        )
        self.levels, self.groups, self.shared_codebook, self.dropout = levels, groups, shared_codebook, float(dropout)
        if dropout > 0:
            self.register_buffer("dropout_steps", torch.zeros((), dtype=torch.int64))

    _shown = shown_defaults(__init__)

    @classmethod
    def from_codebook(cls, codes: Tensor, *, weight: float = 1.0, **options: Any) -> "ResidualVectorQuantizer":
        """A layer that starts from given codes.

        Args:
            codes: `(Q, K, D)`, or `(G, Q, K, D)` with groups; with `shared_codebook=True` and `levels` given `(K, D)`,
                or `(G, K, D)`.
            weight: rows that each code counts for in the moving averages, see `set_codebook`.
            options: the other arguments of the layer; `dim` is D times the groups unless it is given.
        """
        check_codes(codes)
        axes = 2 if options.get("shared_codebook", False) else 3
        if codes.dim() not in (axes, axes + 1):
            expected = "(K, D) or (G, K, D)" if axes == 2 else "(Q, K, D) or (G, Q, K, D)"
            raise ValueError(f"codes must be {expected}, got {list(codes.shape)}")
        groups = codes.shape[:-axes].numel()
        options = {"dim": codes.shape[-1] * groups, "groups": groups, **options}
        if axes == 3:
            check_codes(codes, levels=(options.get("levels", codes.shape[-3]), codes.shape[-3]))
            options["levels"] = codes.shape[-3]
        return cls._holding(codes, weight, options)

    def forward(
        self,
        z: Tensor,
        *,
        mask: Tensor | None = None,
        lengths: Tensor | None = None,
        levels: int | Tensor | None = None,
        freeze: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Quantizes z.

        Args:
            z: `(..., dim)`, or the layout named by `channel_dim`.
            mask, lengths: as in `VectorQuantizer`; rows that do not count become zeros with indices -1.
            levels: how many levels to pass, in [1, Q], instead of all or of what dropout draws: an int, or int64 `(B,)`
                for the elements of z's first axis. The others get index -1, add nothing and count in no loss.
            freeze: leave codebooks and statistics as they are, and give the codebooks no gradient.

        Returns:
            quantized: z's shape and dtype, the sum of the codes, with the gradient named by `gradient`.
            indices: int64, z's shape without channels, then Q; with several groups G and Q.
            losses: `(Q,)`, or `(G, Q)`: `codebook + beta * commitment` of every level, or `beta * commitment` with EMA;
                in the space of the codes, mean over the elements of the rows that pass the level. Also in eval mode.
        """
        steps = self.dropout_steps if self.dropout > 0 else None
        forward = self._enter(z, mask, lengths, freeze, separate=True, steps=steps)
        rows, passed = forward.rows, forward.layout.levels(levels, self.levels, z.device)
        if passed is None and self.dropout > 0 and forward.seen is not None:
            passed = forward.layout.levels(self._dropped(forward), self.levels, z.device)
        result = residual_quantize_with_statistics(
            rows.values,
            self._stack(forward.codebook),
            mask=rows.mask,
            levels=passed if passed is None or not rows.batched else passed.expand(self.groups, *passed.shape),
            metric=self.metric,
            gradient=self.gradient,
            precision=self.precision,
            channel_dim=rows.channel_dim,
            backend=self.backend,
            statistics=forward.learns is not None,
        )
        if forward.learns is not None:
            counts, sums = result.counts, result.sums
            if self.shared_codebook:  # it has the statistics of all levels
                counts, sums = counts.sum(1), sums.sum(1)
            self.learn(forward.learns, counts.view(self.counts.shape), sums.view(self.codebook.shape), rows)
        losses = self._loss(result.commitment_losses, result.codebook_losses)
        indices = result.indices.movedim(0, -2).contiguous() if self.groups > 1 else result.indices
        losses = losses if self.groups > 1 else losses[0]
        quantized, losses = self._leave(forward, result.quantized, losses, z.dtype)
        return quantized, indices, losses

    def _dropped(self, forward: Forward) -> Tensor:
        """How many levels each element of z's first axis passes in this training forward."""
        assert forward.seen is not None
        shape = forward.layout.shape
        elements = shape[0] if shape else 1
        seed, steps = forward.seen.draws
        draws = hashed(seed, steps, 2 * elements)
        chance, number = draws[:elements], draws[elements:]
        advance(self.dropout_steps, forward.seen.again)
        short = chance < math.ceil(self.dropout * 2**32)
        return torch.where(short, 1 + number % self.levels, self.levels)

    def _stack(self, codebook: Tensor) -> Tensor:
        """The codebooks of all levels `(Q, K, D)`, or `(G, Q, K, D)`; a shared one is expanded, not copied."""
        if not self.shared_codebook:
            return codebook
        return codebook.unsqueeze(-3).expand(*codebook.shape[:-2], self.levels, *codebook.shape[-2:])

    def _initial_codes(self, rows: Rows) -> tuple[Tensor, Tensor]:
        size, shared = self.codebook_size, self.shared_codebook
        codes, distinct = initial_stack(rows, size, self.levels, self.seed, self.backend, shared, self.ranks)
        return codes.view_as(self.codebook), distinct

    def _spread(self, candidates: Candidates) -> Candidates:
        stack = self._stack(self.codebook.detach())
        stack = stack if self.groups > 1 else stack.unsqueeze(0)
        return residual_candidates(candidates, stack, self.shared_codebook, self.metric, self.backend)

    def decode(self, indices: Tensor, *, check: bool = True) -> Tensor:
        """What `forward` gives for `indices`, laid out like z; -1 adds nothing.

        Args:
            indices: of any integer dtype, in [-1, codebook_size), shaped as `forward` returns them; the last axis may
                hold fewer levels than Q, the first ones, for a lower bit rate.
            check: as in `VectorQuantizer.decode`.
        """
        indices = check_stack_indices(indices, self.codebook_size, self.groups, self.levels, check)
        return self._decoded(sum_codes(self._stack(self.codebook), indices), indices, 1 + int(self.groups > 1))

    def _sizes_repr(self) -> str:
        return f"{super()._sizes_repr()}, levels={self.levels}"
