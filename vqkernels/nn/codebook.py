"""The state of a codebook and how it learns: initialisation, moving averages, revival, checkpoints."""

import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from . import metrics
from .draws import count_rows
from .ema import ema_update_
from .heads import Rows
from .initialisation import initial_codes
from .loading import explain_keys, explain_sizes
from .normalisation import unit
from .revival import (
    Candidates,
    candidate_count,
    draw_candidates,
    draw_candidates_over_ranks,
    revival_draws,
    revive_,
    share_candidates,
)
from .synchronisation import one_hot_rank, sum_over_ranks, world_size

USAGE_DECAY = 0.99  # of the moving counts that revival looks at where the codebook is trained by gradient


class TrainedCodebook(nn.Module):
    """A codebook with its statistics; `VectorQuantizer` is the layer around it and documents the arguments.

    State: `codebook (K, D)` or `(H, K, D)` float32, a Parameter when trained by gradient and otherwise a buffer;
    `counts (K,)` or `(H, K)` int64 of the last training step; with EMA or revival `ema_counts` float32 like `counts`
    and `ema_steps ()` int64, the updates so far; with EMA `ema_sums` float32 like the codebook; with a temperature
    `sample_steps ()` int64, the training forwards so far; with init="kmeans" `initialised ()` bool.
    With ema_update="manual" the statistics since the last update are buffers that no checkpoint holds.
    """

    codebook: Tensor
    counts: Tensor
    ema_counts: Tensor
    ema_sums: Tensor
    ema_steps: Tensor
    sample_steps: Tensor
    initialised: Tensor
    pending_counts: Tensor
    pending_sums: Tensor
    pending_rows: Tensor
    pending_usable: Tensor

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
        seed: int,
        sampled: bool,
        axes: tuple[str, ...] = ("heads", "codebook_size", "channels per code"),
        candidates: int | None = None,
    ) -> None:
        """`axes` names those of `shape`, from its end; `candidates`: heads of the rows that revival draws from."""
        super().__init__()
        self._axes = axes[-len(shape) :]
        self.ema_decay, self.init, self.revive, self.revive_threshold = ema_decay, init, revive, revive_threshold
        self.seed = seed
        self._manual, self._cosine = manual, cosine
        self._initialised = init == "uniform"  # on the host: nobody waits for the device to know
        self._tracks_usage = ema_decay is not None or revive != "off"
        codebook = torch.empty(shape, dtype=torch.float32)
        if ema_decay is None:
            self.codebook = nn.Parameter(codebook)
        else:
            self.register_buffer("codebook", codebook)
        self.register_buffer("counts", torch.zeros(shape[:-1], dtype=torch.int64))
        if self._tracks_usage:
            self.register_buffer("ema_counts", torch.zeros(shape[:-1]))
            self.register_buffer("ema_steps", torch.zeros((), dtype=torch.int64))
        if ema_decay is not None:
            self.register_buffer("ema_sums", torch.zeros(shape))
        if sampled:
            self.register_buffer("sample_steps", torch.zeros((), dtype=torch.int64))
        if init == "kmeans":
            self.register_buffer("initialised", torch.zeros((), dtype=torch.bool))
        if manual:
            self.register_buffer("pending_counts", torch.zeros(shape[:-1], dtype=torch.int64), persistent=False)
            self.register_buffer("pending_sums", torch.zeros(shape), persistent=False)
            if revive != "off":
                drawn = (candidates or math.prod(shape[:-2]), candidate_count(shape[-2]))
                self.register_buffer("pending_rows", torch.zeros(*drawn, shape[-1]), persistent=False)
                self.register_buffer("pending_usable", torch.zeros(drawn, dtype=torch.bool), persistent=False)

    @torch.no_grad()
    def reset_codebook(self) -> None:
        """Draws the codes anew, uniform in [-1/K, 1/K], and clears all statistics."""
        size = self.codebook.shape[-2]
        self.codebook.uniform_(-1 / size, 1 / size)
        for _, buffer in self.named_buffers(recurse=False):
            if buffer is not self.codebook:
                buffer.zero_()
        self._initialised = self.init == "uniform"

    @torch.no_grad()
    def initialise(self, rows: Rows, metric: str, backend: str) -> None:
        """Codes by k-means on these rows and those of the other ranks; the first training forward calls it, once."""
        size = self.codebook.shape[-2]
        if world_size() == 1:
            if rows.number == 0:
                return  # the next batch may have rows; ranks cannot know of one another, and none waits
            if rows.number < size and not torch.compiler.is_compiling():
                warnings.warn(
                    f"k-means initialisation of {size} codes from {rows.number} rows: the others start as copies of "
                    "these with a jitter; use a larger first batch",
                    RuntimeWarning,
                    stacklevel=3,
                )
        self.codebook.copy_(self._initial_codes(rows, metric, backend))
        self.initialised.fill_(True)
        self._initialised = True

    def _initial_codes(self, rows: Rows, metric: str, backend: str) -> Tensor:
        """All codes from the rows of the first batch."""
        return initial_codes(rows, self.codebook.shape[-2], metric, self.seed, backend)

    def _spread(self, candidates: Candidates) -> Candidates:
        """Candidates of every codebook from rows drawn from the batch; they are the same where there is no stack."""
        return candidates

    @torch.no_grad()
    def learn(self, counts: Tensor, sums: Tensor, rows: Rows) -> None:
        """Takes in the statistics of one training step: counts `(..., K)` and sums like the codebook, of its shape."""
        if not self._tracks_usage:
            self.counts.copy_(counts)
            return
        totals = [counts] if self.ema_decay is None else [counts, sums]
        if self._manual:
            self.pending_counts.add_(totals[0])
            self.pending_sums.add_(totals[1])
            if self.revive != "off":
                candidates = draw_candidates(rows, self._draws())
                self.pending_rows.copy_(candidates.rows)
                self.pending_usable.copy_(candidates.usable)
        elif self.revive == "off":
            self._update(sum_over_ranks(*totals))
        else:
            # The number of rows of each rank rides along, so that all ranks draw from the joined batch.
            *totals, numbers = sum_over_ranks(*totals, one_hot_rank(count_rows(rows)))
            draws = self._draws()
            self._update(totals, self._spread(draw_candidates_over_ranks(rows, draws, numbers)), draws)

    @torch.no_grad()
    def update_codebook(self) -> None:
        """Updates the codebook from all training forwards since the last call; for ema_update="manual".

        Call it once per optimizer step, after the backward passes, on every rank. Revival draws from the rows of the
        last forward. Masked, empty or missing forwards add nothing.
        """
        if not self._manual:
            raise RuntimeError('update_codebook() is for ema_update="manual"; this layer updates itself in forward')
        totals = sum_over_ranks(self.pending_counts, self.pending_sums)
        if self.revive == "off":
            self._update(totals)
        else:
            draws = self._draws()
            mine = Candidates(self.pending_rows, self.pending_usable)
            self._update(totals, self._spread(share_candidates(mine, draws)), draws)
            self.pending_usable.zero_()
        self.pending_counts.zero_()
        self.pending_sums.zero_()

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

    @property
    def perplexity(self) -> Tensor:
        """exp of the entropy of the last training step's code frequencies, in [1, K]; 0-d, or (H,) per codebook."""
        return metrics.perplexity(self.counts)

    @property
    def usage(self) -> Tensor:
        """Fraction of codes that the last training step used; 0-d, or (H,) per codebook."""
        return metrics.usage(self.counts)

    @property
    def dead_codes(self) -> Tensor:
        """Number of codes that the last training step did not use, int64; 0-d, or (H,) per codebook."""
        return metrics.dead_codes(self.counts)

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
        flag = f"{prefix}initialised"
        if flag in unexpected_keys:  # how the codes began matters only to a layer that may have to begin
            unexpected_keys.remove(flag)
        explain_keys(missing_keys, prefix, missing=True)
        explain_keys(unexpected_keys, prefix, missing=False)
        if self.init == "kmeans" and f"{prefix}codebook" in state_dict:
            # Without the flag (strict=False) the codes count as initialised: k-means must not overwrite them.
            self._initialised = bool(state_dict[flag]) if flag in state_dict else True
            if flag not in state_dict:
                self.initialised.fill_(True)
        for name, buffer in self.named_buffers(recurse=False):
            if name.startswith("pending_"):
                buffer.zero_()

    def _apply(self, fn, recurse=True):
        """Moves the state where `fn` moves it, but keeps floating buffers in float32 when a cast would go below."""
        wide = {name: buffer for name, buffer in self.named_buffers(recurse=False) if buffer.is_floating_point()}
        super()._apply(fn, recurse)
        for name, buffer in wide.items():
            moved = getattr(self, name)
            if moved.dtype.itemsize < torch.float32.itemsize:
                setattr(self, name, buffer.to(moved.device, torch.float32))
        return self
