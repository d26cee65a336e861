"""The residual layer: a stack of codebooks, each quantizing what its predecessors left, in one operator call."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..backends import registry
from ..ops.checks import GRADIENTS, METRICS, PRECISIONS, check_choice
from ..ops.recomputation import advance
from ..ops.residual import ResidualQuantization, residual_quantize_with_statistics
from .checks import (
    check_channels,
    check_codes,
    check_decay,
    check_flag,
    check_int,
    check_number,
    check_positive,
    check_seed,
    check_size,
)
from .codebook import Seen, TrainedCodebook
from .draws import hashed
from .heads import Heads, Rows
from .initialisation import initial_stack
from .lookup import check_stack_indices, sum_codes
from .masks import row_levels, row_mask, zero_masked
from .projection import channels_at, project, project_codes
from .residuals import residual_candidates
from .revival import Candidates


class ResidualVectorQuantizer(TrainedCodebook):
    """Residual vector quantization (Zeghidour et al. 2021, "SoundStream: An End-to-End Neural Audio Codec").

    Level q quantizes r_q, the rest that levels 0 to q - 1 left of z, and `quantized` is the sum of all codes. Search,
    look-up, losses and statistics of all levels are one call, and with a process group their statistics one all-reduce.

    Args:
        dim: channels of z.
        codebook_size: K, codes of each level.
        levels: Q.
        codebook_dim: D, channels of the codes; `dim / groups` when None. Where `groups * codebook_dim` is not `dim`,
            linear maps `project_in` and `project_out` lead into the space of the codes and back.
        groups: G, into how many equal parts the channels are split, each with a stack of its own.
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
        for name, size in (("dim", dim), ("codebook_size", codebook_size), ("levels", levels), ("groups", groups)):
            check_size(name, size)
        if codebook_dim is None:
            if dim % groups:
                raise ValueError(f"dim must be a multiple of groups={groups} where codebook_dim is None, got {dim}")
            codebook_dim = dim // groups
        check_size("codebook_dim", codebook_dim)
        check_flag("shared_codebook", shared_codebook)
        check_number("dropout", dropout, 0)
        if dropout > 1:
            raise ValueError(f"dropout must be a fraction in [0, 1], got {dropout!r}")
        check_decay("ema_decay", ema_decay)
        check_number("beta", beta, 0)
        check_positive("revive_threshold", revive_threshold, below=1)
        check_int("channel_dim", channel_dim)
        check_seed(seed)
        check_choice("ema_update", ema_update, ("forward", "manual"))
        check_choice("metric", metric, METRICS)
        check_choice("gradient", gradient, GRADIENTS)
        check_choice("init", init, ("uniform", "kmeans"))
        check_choice("revive", revive, ("off", "rows"))
        check_choice("precision", precision, PRECISIONS)
        check_choice("backend", backend, registry.NAMES)
        if ema_update == "manual" and ema_decay is None:
            raise ValueError('ema_update="manual" needs ema_decay: without it the optimizer updates the codebooks')
        axes = {"groups": groups, "levels": levels, "codebook_size": codebook_size, "channels per code": codebook_dim}
        if groups == 1:
            del axes["groups"]
        if shared_codebook:
            del axes["levels"]
        super().__init__(
            tuple(axes.values()),
            axes=tuple(axes),
            ema_decay=ema_decay,
            manual=ema_update == "manual",
            cosine=False,
            init=init,
            revive=revive,
            revive_threshold=revive_threshold,
            seed=seed,
            sampled=False,
            draws=dropout > 0,
            process_group=process_group,
            candidates=groups,
        )
        self.dim, self.codebook_size, self.levels, self.codebook_dim = dim, codebook_size, levels, codebook_dim
        self.groups, self.shared_codebook, self.dropout, self.beta = groups, shared_codebook, float(dropout), beta
        self.ema_update, self.metric, self.gradient = ema_update, metric, gradient
        self.channel_dim, self.precision, self.backend = channel_dim, precision, backend
        if dropout > 0:
            self.register_buffer("dropout_steps", torch.zeros((), dtype=torch.int64))
        projects = groups * codebook_dim != dim
        self.project_in = nn.Linear(dim, groups * codebook_dim) if projects else None
        self.project_out = nn.Linear(groups * codebook_dim, dim) if projects else None
        self.reset_codebook()

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
        groups, (size, codebook_dim) = codes.shape[:-axes].numel(), codes.shape[-2:]
        options = {"dim": codebook_dim * groups, "groups": groups, **options}
        if axes == 3:
            check_codes(codes, levels=(options.get("levels", codes.shape[-3]), codes.shape[-3]))
            options["levels"] = codes.shape[-3]
        layer = cls(codebook_size=size, codebook_dim=codebook_dim, **options).to(codes.device)
        layer.set_codebook(codes.view(layer.codebook.shape), weight)
        return layer

    def reset_parameters(self) -> None:
        """Draws codes and projections anew and clears all statistics."""
        self.reset_codebook()
        for linear in (self.project_in, self.project_out):
            if linear is not None:
                linear.reset_parameters()

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
        channel_dim = check_channels(z, self.dim, self.channel_dim)
        mask = row_mask(z, channel_dim, mask, lengths)
        heads = Heads(self.groups, True, channel_dim)
        rows = self._rows(z, mask, heads)
        freeze = freeze or self.frozen
        seen = self._begin(z, rows, freeze, self.dropout_steps if self.dropout > 0 else None)
        learns = None if freeze or (seen is not None and seen.learns is False) else seen
        passed = row_levels(z, channel_dim, levels, self.levels)
        if passed is None and self.dropout > 0 and seen is not None:
            passed = row_levels(z, channel_dim, self._dropped(z, channel_dim, seen), self.levels)
        # The backward pass needs the codes that were looked up, and an update below overwrites them.
        codebook = self._looked_up(seen, freeze)
        result = residual_quantize_with_statistics(
            rows.values,
            self._stack(codebook),
            mask=rows.mask,
            levels=passed if passed is None or not rows.batched else passed.expand(self.groups, *passed.shape),
            metric=self.metric,
            gradient=self.gradient,
            precision=self.precision,
            channel_dim=rows.channel_dim,
            backend=self.backend,
            statistics=learns is not None,
        )
        if learns is not None:
            result = self._per_codebook(result)
            self.learn(learns, result.counts, result.sums, rows)
        losses = self.beta * result.commitment_losses
        if self.ema_decay is None:
            losses = losses + result.codebook_losses
        indices = result.indices.movedim(0, -2).contiguous() if self.groups > 1 else result.indices
        losses = losses if self.groups > 1 else losses[0]
        quantized, losses = self._reached(self._restore(result.quantized, z, mask, heads), losses, freeze)
        return quantized, indices, losses

    def _dropped(self, z: Tensor, channel_dim: int, seen: Seen) -> Tensor:
        """How many levels each element of z's first axis but channels passes in this training forward."""
        sizes = z.shape[:channel_dim] + z.shape[channel_dim + 1 :]
        elements = sizes[0] if sizes else 1
        seed, steps = seen.draws
        draws = hashed(seed, steps, 2 * elements)
        chance, number = draws[:elements], draws[elements:]
        advance(self.dropout_steps, seen.again)
        short = chance < math.ceil(self.dropout * 2**32)
        return torch.where(short, 1 + number % self.levels, self.levels)

    def _rows(self, z: Tensor, mask: Tensor | None, heads: Heads) -> Rows:
        """z -> rows in the space of the codes, split among groups."""
        if self.project_in is not None:
            # A masked row may hold a NaN, and 0 * NaN would reach the weights' gradient.
            z = zero_masked(z, mask, heads.channel_dim)
        return heads.split(project(self.project_in, z, heads.channel_dim), mask)

    def _stack(self, codebook: Tensor) -> Tensor:
        """The codebooks of all levels `(Q, K, D)`, or `(G, Q, K, D)`; a shared one is expanded, not copied."""
        if not self.shared_codebook:
            return codebook
        return codebook.unsqueeze(-3).expand(*codebook.shape[:-2], self.levels, *codebook.shape[-2:])

    def _per_codebook(self, result: ResidualQuantization) -> ResidualQuantization:
        """Statistics of the stored codebooks: a shared one has those of all its levels."""
        counts, sums = result.counts, result.sums
        if self.shared_codebook:
            counts, sums = counts.sum(1), sums.sum(1)
        return result._replace(counts=counts.view(self.counts.shape), sums=sums.view(self.codebook.shape))

    def _initial_codes(self, rows: Rows, metric: str, backend: str) -> tuple[Tensor, Tensor]:
        size, shared = self.codebook_size, self.shared_codebook
        codes, distinct = initial_stack(rows, size, self.levels, self.seed, backend, shared, self.ranks)
        return codes.view_as(self.codebook), distinct

    def _spread(self, candidates: Candidates) -> Candidates:
        stack = self._stack(self.codebook.detach())
        stack = stack if self.groups > 1 else stack.unsqueeze(0)
        return residual_candidates(candidates, stack, self.shared_codebook, self.metric, self.backend)

    def _restore(self, quantized: Tensor, z: Tensor, mask: Tensor | None, heads: Heads) -> Tensor:
        """Quantized rows -> z's shape and dtype."""
        quantized = heads.join(quantized)
        if self.project_out is not None:
            quantized = project_codes(self.project_out, quantized, heads.channel_dim)
            quantized = zero_masked(quantized, mask, heads.channel_dim)
        return quantized.to(z.dtype)

    def decode(self, indices: Tensor, *, check: bool = True) -> Tensor:
        """What `forward` gives for `indices`, laid out like z; -1 adds nothing.

        Args:
            indices: of any integer dtype, in [-1, codebook_size), shaped as `forward` returns them; the last axis may
                hold fewer levels than Q, the first ones, for a lower bit rate.
            check: as in `VectorQuantizer.decode`.
        """
        indices = check_stack_indices(indices, self.codebook_size, self.groups, self.levels, check)
        stack = self._stack(self.codebook)
        codes = sum_codes(stack, indices)
        codes = codes.flatten(-2) if self.groups > 1 else codes
        if self.project_out is not None:
            none = (indices == -1).all(-1)
            none = none.all(-1) if self.groups > 1 else none
            codes = zero_masked(project_codes(self.project_out, codes), ~none, -1)
        return channels_at(codes, self.channel_dim)

    def extra_repr(self) -> str:
        parts = [f"{self.dim}, {self.codebook_size}, levels={self.levels}", f"beta={self.beta}"]
        for name, default in _DEFAULTS.items():
            if getattr(self, name) != default:
                parts.append(f"{name}={getattr(self, name)!r}")
        if self.codebook_dim * self.groups != self.dim:
            parts.insert(1, f"codebook_dim={self.codebook_dim}")
        return ", ".join(parts)


_DEFAULTS = {
    "groups": 1,
    "shared_codebook": False,
    "dropout": 0.0,
    "ema_decay": None,
    "ema_update": "forward",
    "metric": "euclidean",
    "gradient": "straight_through",
    "init": "uniform",
    "revive": "off",
    "channel_dim": -1,
    "precision": "exact",
    "backend": "auto",
}
