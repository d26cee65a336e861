"""The state of a codebook and how it learns: initialisation, moving averages, revival, checkpoints, freezing."""

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..ops.recomputation import as_seen, change, enter
from .checks import check_codes, check_number
from .draws import count_rows, fill_seed_
from .ema import ema_update_
from .freezing import Freezable, untouched
from .heads import Rows
from .initialisation import initial_codes
from .loading import explain_keys, explain_sizes
from .metrics import Counted
from .normalisation import unit
from .pending import Pending
from .revival import (
    Candidates,
    draw_candidates,
    draw_candidates_over_ranks,
    revival_draws,
    revive_,
    share_candidates,
)
from .synchronisation import Ranks
from .wide import WideBuffers

USAGE_DECAY = 0.99  # of the moving counts that revival looks at where the codebook is trained by gradient


class Seen(NamedTuple):
    """What a training forward sees of its layer's state, and what it may do (see `vqkernels.ops.recomputation`)."""

    codebook: Tensor | None  # where this forward overwrites it: as it was
    draws: list[Tensor]  # seed and counter of the layer's draws, where it draws
    scalars: list[Tensor]  # numbers of the layer that may be annealed
    again: bool | Tensor
    learns: bool | Tensor


class TrainedCodebook(Counted, Freezable, WideBuffers):
    """A codebook with its statistics; `VectorQuantizer` is the layer around it and documents the arguments.

    State: `codebook (K, D)` or `(H, K, D)` float32, a Parameter when trained by gradient and otherwise a buffer;
    `counts (K,)` or `(H, K)` int64 of the last training step; with EMA or revival `ema_counts` float32 like `counts`
    and `ema_steps ()` int64, the updates so far; with EMA `ema_sums` float32 like the codebook; with a temperature
    `sample_steps ()` int64, the training forwards so far; with init="kmeans" `initialised ()`, 0 until the codes
    are computed, float32 because averaged copies of a model average floating buffers; in a layer that draws random
    numbers `seed ()` int64.
    With ema_update="manual" the statistics since the last update belong to this rank and to no state dict.

    A codebook learns in a forward in training mode, with gradients enabled, unless it is frozen: by `freeze()` until
    `freeze(False)`, by `requires_grad_(False)` on the layer, by `forward(freeze=True)`, or, where it is trained by
    gradient, by `codebook.requires_grad_(False)`. A forward under `torch.no_grad()` changes no code and no statistic.
    """

    metric: str
    backend: str
    codebook: Tensor
    ema_counts: Tensor
    ema_sums: Tensor
    ema_steps: Tensor
    sample_steps: Tensor
    initialised: Tensor
    seed: Tensor
    _owner: Tensor  # on which the first passes of checkpoints hang
    _pending: Pending | None
    _started: bool
    _started_buffer: int

    def __init__(
        self,
        shape: tuple[int, ...],
        *,
        ema_decay: float | None,
        manual: bool,
        cosine: bool,
        init: str,
        revive: str,
        revive_threshold: float,
        seed: int | None,
        sampled: bool,
        draws: bool,
        process_group: Any,
        axes: tuple[str, ...] = ("heads", "codebook_size", "channels per code"),
        candidates: int | None = None,
    ) -> None:
        """`axes` names those of `shape`, from its end; `candidates`: heads of the rows that revival draws from;
        `draws`: whether the layer draws random numbers of other kinds than those for codes, samples and revival."""
        super().__init__()
        self._axes = axes[-len(shape) :]
        self.ema_decay, self.init, self.revive, self.revive_threshold = ema_decay, init, revive, revive_threshold
        self.ranks = Ranks(process_group)
        self._manual, self._cosine, self._given_seed = manual, cosine, seed
        self._candidates = candidates or math.prod(shape[:-2])
        self._tracks_usage = ema_decay is not None or revive != "off"
        codebook = torch.empty(shape, dtype=torch.float32)
        if ema_decay is None:
            self.codebook = nn.Parameter(codebook)
        else:
            self.register_buffer("codebook", codebook)
        self.register_buffer("counts", torch.zeros(shape[:-1], dtype=torch.int64))
        if self._tracks_usage:
            self.register_buffer("ema_counts", torch.zeros(shape[:-1], dtype=torch.float32))
            self.register_buffer("ema_steps", torch.zeros((), dtype=torch.int64))
        if ema_decay is not None:
            self.register_buffer("ema_sums", torch.zeros(shape, dtype=torch.float32))
        if sampled:
            self.register_buffer("sample_steps", torch.zeros((), dtype=torch.int64))
        if init == "kmeans":
            self.register_buffer("initialised", torch.zeros((), dtype=torch.float32))
        if draws or sampled or init == "kmeans" or revive != "off":
            self.register_buffer("seed", torch.zeros((), dtype=torch.int64))
        self._forget()

    @torch.no_grad()
    def reset_codebook(self) -> None:
        """Draws the codes and the seed of later draws anew, codes uniform in [-1/K, 1/K], and clears all statistics."""
        size = self.codebook.shape[-2]
        self.codebook.uniform_(-1 / size, 1 / size)
        if "seed" in self._buffers:
            fill_seed_(self.seed, self._given_seed)
        self._clear()

    def _clear(self) -> None:
        """All statistics and counters become zero."""
        for name, buffer in self.named_buffers(recurse=False):
            if name not in ("codebook", "seed"):
                buffer.zero_()
        self._forget()

    @torch.no_grad()
    def set_codebook(self, codes: Tensor, weight: float = 1.0) -> None:
        """Goes on from given codes, of the codebook's shape: all statistics are cleared, and k-means does not run.

        The seed stays, so ranks that agree on it still do. The codes may be the layer's own.

        Args:
            weight: rows that each code counts for in the moving averages. With 1, a code at 0 that gets one row at 4
                goes to 0.04 with decay 0.99.

        Raises:
            TypeError: the codes are no tensor.
            ValueError: the codes are of another shape, or the weight is no finite number of at least 0.
        """
        check_codes(codes)
        check_number("weight", weight, 0)
        if codes.shape != self.codebook.shape:
            expected = f"{list(self.codebook.shape)} ({', '.join(self._axes)})"
            raise ValueError(f"codes must have the shape of the codebook, {expected}, got {list(codes.shape)}")
        self._clear()
        self.codebook.copy_(codes)
        self._weigh(weight)
        if self.init == "kmeans":
            self.initialised.fill_(1)

    @torch.no_grad()
    def _weigh(self, weight: float) -> None:
        """Moving averages as if each code had been the mean of `weight` rows in every step so far."""
        if self._tracks_usage:
            self.ema_counts.fill_(weight)
        if self.ema_decay is not None:
            self.ema_sums.copy_(self.codes * weight)

    def requires_grad_(self, requires_grad: bool = True) -> "TrainedCodebook":
        """As for every module; False also freezes a codebook that is trained by moving averages.

        `requires_grad_` of a model around the layer reaches Parameters only, and such a codebook is none.
        """
        if self.ema_decay is not None:
            self.frozen = not requires_grad
        return super().requires_grad_(requires_grad)

    def _begin(
        self, z: Tensor, rows: Rows, freeze: bool, steps: Tensor | None, scalars: Sequence[Tensor] = ()
    ) -> Seen | None:
        """Begins a forward: first codes; what it sees of the codebook, of `steps`, of `scalars`; what it may do.

        None in eval.
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
            self.initialise(rows, self.metric, self.backend)
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

    def _reached(self, quantized: Tensor, loss: Tensor, freeze: bool) -> tuple[Tensor, Tensor]:
        """Results of a forward; those of a frozen one reach the codebook without a gradient, as DDP needs it."""
        if freeze and self.training:
            quantized, loss = untouched(self.codebook, quantized, loss)
        return quantized, loss

    def _must_start(self) -> bool:
        """Whether the codes still have to be computed. The buffer decides; that it was set is remembered of it.

        While compiling the host does not know, and the device decides (`initialise`).
        """
        if self.init != "kmeans":
            return False
        if torch.compiler.is_compiling():
            return not self._started
        if self._started_buffer != id(self.initialised):
            self._started = bool(self.initialised)
            self._started_buffer = id(self.initialised) if self._started else 0
        return not self._started

    def initialise(self, rows: Rows, metric: str, backend: str) -> None:
        """Codes by k-means on these rows and those of the other ranks; the first training forward that learns does it.

        Without a usable row (unmasked and finite) on any rank the codes stay, and the next batch may initialise.
        """
        allowed = enter(self.initialised, rows.values, []).learns
        self._started = torch.compiler.is_compiling()
        change(allowed, [self.codebook, self.initialised], lambda: self._start(rows, metric, backend))

    def _start(self, rows: Rows, metric: str, backend: str) -> None:
        codes, distinct = self._initial_codes(rows, metric, backend)
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

    def _initial_codes(self, rows: Rows, metric: str, backend: str) -> tuple[Tensor, Tensor]:
        """All codes from the rows of the first batch, and how many of them come from data."""
        return initial_codes(rows, self.codebook.shape[-2], metric, self.seed, backend, self.ranks)

    def _spread(self, candidates: Candidates) -> Candidates:
        """Candidates of every codebook from rows drawn from the batch; they are the same where there is no stack."""
        return candidates

    def learn(self, seen: Seen, counts: Tensor, sums: Tensor, rows: Rows) -> None:
        """Takes in the statistics of one training step: counts `(..., K)` and sums like the codebook, of its shape."""
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
            # The number of rows of each rank rides along, so that all ranks draw from the joined batch.
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

    def _no_statistics(self) -> Pending:
        return Pending.of_no_forward(self.codebook, None if self.revive == "off" else self._candidates)

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

    @property
    def codes(self) -> Tensor:
        """The vectors that are looked up, like the codebook: with metric="cosine" its codes at length one."""
        return unit(self.codebook) if self._cosine else self.codebook

    def _forget(self) -> None:
        """Drops what the host remembers of tensors that were filled anew."""
        if getattr(self, "_owner", None) is None or self._owner.device != self.codebook.device:
            self._owner = torch.empty(0, device=self.codebook.device)
        self._pending = self._no_statistics() if self._manual else None
        self._started, self._started_buffer = False, 0

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        error_msgs += explain_sizes(state_dict, prefix, self.codebook, self._axes)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        explain_keys(missing_keys, prefix, missing=True)
        explain_keys(unexpected_keys, prefix, missing=False)
        if f"{prefix}codebook" in state_dict:
            if self.init == "kmeans" and f"{prefix}initialised" not in state_dict:
                with torch.no_grad():  # k-means must not overwrite loaded codes
                    self.initialised.fill_(1)
            statistics = "ema_counts" if self.ema_decay is None else "ema_sums"
            if self._tracks_usage and f"{prefix}{statistics}" not in state_dict and not error_msgs:
                self._weigh(1.0)
        self._forget()

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        waits = self._pending
        self._forget()
        if waits is not None and not (waits.counts.is_meta or self.codebook.is_meta):
            self._pending = waits.follow(self.codebook)
        return self
