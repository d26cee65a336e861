"""How a codebook learns: what a forward sees of it, k-means at the start, moving averages, revival."""

import warnings
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..ops.recomputation import as_seen, change, enter
from .codebook import CodebookState
from .ema import ema_update_
from .initialisation import initial_codes
from .random import count_rows
from .revival import (
    Candidates,
    draw_candidates,
    draw_candidates_over_ranks,
    revival_draws,
    revive_,
    share_candidates,
)
from .rows import Rows

USAGE_DECAY = 0.99  # of the moving counts that revival looks at where the codebook is trained by gradient


class Seen(NamedTuple):
    """What a training forward sees of its layer's state, and what it may do (see `vqkernels.ops.recomputation`)."""

    codebook: Tensor | None  # where this forward overwrites it: as it was
    draws: list[Tensor]  # seed and counter of the layer's draws, where it draws
    scalars: list[Tensor]  # numbers of the layer that may be annealed
    again: bool | Tensor
    learns: bool | Tensor


class TrainedCodebook(CodebookState):
    """A codebook that learns in a forward in training mode, with gradients enabled, unless it is frozen.

    It is frozen by `freeze()` until `freeze(False)`, by `requires_grad_(False)` on the layer, by
    `forward(freeze=True)`, or, where it is trained by gradient, by `codebook.requires_grad_(False)`. A forward under
    `torch.no_grad()` changes no code and no statistic.
    """

    metric: str
    backend: str

    def _see(
        self, z: Tensor, rows: Rows, freeze: bool, steps: Tensor | None, scalars: Sequence[Tensor] = ()
    ) -> Seen | None:
        """Begins a training forward: computes the first codes where it must, and keeps what the forward sees.

        Args:
            steps: counter of the draws of this forward, where it draws.
            scalars: numbers of the layer that may be annealed.

        Returns:
            None in eval mode.
        """
        if not self.training:
            return None
        self.widen_buffers()
        if self._owner.device != self.codebook.device:
            self._forget()
        starts = self._learns(freeze) and self._must_start()
        if starts or self.revive != "off":
            self._check_writable()
        if starts:
            self.initialise(rows)
        writes = self._learns(freeze) and self._tracks_usage and not self._manual
        draws = [] if steps is None else [self.seed, steps]
        state, again, learns = enter(self._owner, z, [*scalars, *draws, *[self.codebook] * writes])
        first, last = len(scalars), len(scalars) + len(draws)
        return Seen(state[-1] if writes else None, state[first:last], state[:first], again, learns)

    def _check_writable(self) -> None:
        """Refuses a Parameter that FSDP1 has put into a flat one: it would lose what a forward writes into it."""
        codebook = self.codebook
        if self.ema_decay is None and not isinstance(codebook, nn.Parameter) and codebook._is_view():
            raise RuntimeError(
                'a codebook that FullyShardedDataParallel (FSDP1) has flattened cannot be written by init="kmeans" or '
                'revive="rows": set ema_decay, or leave this layer out with ignored_modules'
            )

    def _learns(self, freeze: bool) -> bool:
        """Whether a training forward may change the codes, by itself or through an optimizer."""
        return not freeze and (self.ema_decay is not None or self.codebook.requires_grad)

    def _looked_up(self, seen: Seen | None, freeze: bool) -> Tensor:
        """The codebook that this forward looks up, with its gradient."""
        if freeze:
            return self.codebook.detach()
        if seen is None or seen.codebook is None:
            return self.codebook
        return as_seen(self.codebook, seen.codebook)

    def _must_start(self) -> bool:
        """Whether the codes still have to be computed. The buffer decides; the host remembers that it was set.

        While compiling the host does not know the buffer, and the device decides (`initialise`).
        """
        if self.init != "kmeans":
            return False
        if torch.compiler.is_compiling():
            return not self._started
        if self._started_buffer != id(self.initialised):
            self._started = bool(self.initialised)
            self._started_buffer = id(self.initialised) if self._started else 0
        return not self._started

    def initialise(self, rows: Rows) -> None:
        """Computes the codes by k-means on these rows and those of the other ranks, in the first forward that learns.

        Without a usable row (unmasked and finite) on any rank the codes stay, and the next batch may initialise.
        """
        allowed = enter(self.initialised, rows.values, []).learns
        self._started = torch.compiler.is_compiling()
        change(allowed, [self.codebook, self.initialised], lambda: self._start(rows))

    def _start(self, rows: Rows) -> None:
        codes, distinct = self._initial_codes(rows)
        if not torch.compiler.is_compiling():
            self._remember_start(int(distinct))
        starts = (distinct > 0) & (self.initialised == 0)
        self.codebook.copy_(torch.where(starts, codes.to(self.codebook.dtype), self.codebook))
        self.initialised.copy_(torch.where(starts, 1.0, self.initialised))

    def _remember_start(self, found: int) -> None:
        """Keeps on the host that codes came from `found` different rows, and warns where they are too few."""
        size = self.codebook.shape[-2]
        self._started, self._started_buffer = found > 0, id(self.initialised) if found > 0 else 0
        if 0 < found < size:
            warnings.warn(
                f"k-means initialisation of {size} codes found {found} different usable rows (masked rows and rows "
                "with a NaN or an infinity are not usable): the other codes start as copies of these with a jitter; "
                "use a larger first batch",
                RuntimeWarning,
                stacklevel=7,
            )

    def _initial_codes(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """All codes from the rows of the first batch, and how many of them come from data."""
        return initial_codes(rows, self.codebook.shape[-2], self.metric, self.seed, self.backend, self.ranks)

    def _spread(self, candidates: Candidates) -> Candidates:
        """Candidates of every codebook from rows drawn from the batch; they are the same where there is no stack."""
        return candidates

    def learn(self, seen: Seen, counts: Tensor, sums: Tensor, rows: Rows) -> None:
        """Learns from the statistics of one training step: counts `(..., K)`, and sums of the codebook's shape."""
        change(seen.learns, self._written(), lambda: self._take_in(counts, sums, rows))

    def _written(self) -> Iterator[Tensor]:
        """What a training forward may write."""
        yield self.codebook
        yield from (x for name, x in self.named_buffers(recurse=False) if name != "codebook")
        if self._pending is not None:
            yield from self._pending.tensors

    def _take_in(self, counts: Tensor, sums: Tensor, rows: Rows) -> None:
        if not (self._tracks_usage and self._learns(False)):
            self.counts.copy_(self.ranks.sum(counts)[0])
            return
        totals = [counts] if self.ema_decay is None else [counts, sums]
        if self._pending is not None:
            self._pending.counts.add_(counts)
            self._pending.sums.add_(sums)
            if self._pending.candidates is not None:
                candidates = draw_candidates(rows, self._draws())
                self._pending.candidates.rows.copy_(candidates.rows)
                self._pending.candidates.usable.copy_(candidates.usable)
        elif self.revive == "off":
            self._update(self.ranks.sum(*totals))
        else:
            # The same all-reduce gathers the number of rows of each rank: all ranks draw from the joined batch.
            *totals, numbers = self.ranks.sum(*totals, self.ranks.one_hot(count_rows(rows)))
            draws = self._draws()
            candidates = draw_candidates_over_ranks(rows, draws, numbers, self.ranks)
            self._update(totals, self._spread(candidates), draws)

    @torch.no_grad()
    def update_codebook(self) -> None:
        """Updates the codebook from all training forwards since the last call; for ema_update="manual".

        Call it once per optimizer step, after the backward passes, on every rank. Revival draws from the rows of the
        last forward. Masked, empty or missing forwards add nothing. A frozen layer stays as it is.
        """
        if not self._manual:
            raise RuntimeError('update_codebook() is for ema_update="manual"; this layer updates itself in forward')
        if self.frozen:
            return
        self.widen_buffers()
        pending = self._pending
        assert pending is not None
        totals = self.ranks.sum(pending.counts, pending.sums)
        if pending.candidates is None:
            self._update(totals)
        else:
            draws = self._draws()
            self._update(totals, self._spread(share_candidates(pending.candidates, draws, self.ranks)), draws)
        for x in pending.tensors:
            x.zero_()

    def _draws(self) -> Tensor:
        """The random integers of this step's revival."""
        return revival_draws(self.seed, self.ema_steps, self.codebook.shape[-2])

    def _update(self, totals: list[Tensor], candidates: Candidates | None = None, draws: Tensor | None = None) -> None:
        """One step from the counts, and with EMA the sums, of all ranks; candidates and draws where codes revive."""
        counts = totals[0]
        self.counts.copy_(counts)
        if self.ema_decay is None:
            self.ema_counts.lerp_(counts.to(self.ema_counts.dtype), 1 - USAGE_DECAY)
        else:
            ema_update_(self.codebook, self.ema_counts, self.ema_sums, counts, totals[1], self.ema_decay)
        if candidates is not None and draws is not None:
            sums = None if self.ema_decay is None else self.ema_sums
            revive_(self.codebook, self.ema_counts, sums, candidates, self.revive_threshold, draws)
        self.ema_steps.add_(1)
