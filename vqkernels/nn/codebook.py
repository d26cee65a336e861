"""The state of a codebook: its tensors, and how they are drawn, replaced, loaded, cast and moved."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .arguments import check_codes, check_number
from .freezing import Freezable
from .loading import explain_keys, explain_sizes
from .metrics import Counted
from .normalisation import unit
from .pending import Pending
from .random import fill_seed_
from .synchronisation import Ranks
from .wide import WideBuffers


class CodebookState(Counted, Freezable, WideBuffers):
    """A codebook with its statistics.

    State: `codebook (K, D)` or `(H, K, D)` float32, a Parameter when trained by gradient and otherwise a buffer;
    `counts (K,)` or `(H, K)` int64 of the last training step; with EMA or revival `ema_counts` float32 like `counts`
    and `ema_steps ()` int64, the updates so far; with EMA `ema_sums` float32 like the codebook; with a temperature
    `sample_steps ()` int64, the training forwards so far; with init="kmeans" `initialised ()`, 0 until the codes
    are computed, float32 because averaged copies of a model average floating buffers; in a layer that draws random
    numbers `seed ()` int64.
    With ema_update="manual" the statistics since the last update belong to this rank and are in no state dict.
    """

    ema_decay: float | None
    init: str
    revive: str
    revive_threshold: float
    ranks: Ranks
    codebook: Tensor
    ema_counts: Tensor
    ema_sums: Tensor
    ema_steps: Tensor
    sample_steps: Tensor
    initialised: Tensor
    seed: Tensor
    _manual: bool  # statistics wait for `update_codebook()`
    _cosine: bool  # codes are looked up at length one
    _given_seed: int | None
    _owner: Tensor  # on which the first passes of checkpoints hang
    _pending: Pending | None
    _started: bool
    _started_buffer: int

    def _make_state(self, axes: dict[str, int], *, sampled: bool, draws: bool, candidates: int | None) -> None:
        """Makes the tensors, once the options of the layer are set.

        Args:
            axes: names and sizes of the codebook's axes.
            sampled: codes are drawn in training.
            draws: the layer draws random numbers of other kinds than those for codes, samples and revival.
            candidates: heads of the rows that revival draws from; None: one per codebook.
        """
        ema_decay, init, revive = self.ema_decay, self.init, self.revive
        self._axes, shape = tuple(axes), tuple(axes.values())
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

    def requires_grad_(self, requires_grad: bool = True) -> "CodebookState":
        """As for every module; False also freezes a codebook that is trained by moving averages.

        `requires_grad_` of a model around the layer reaches Parameters only. Such a codebook is a buffer.
        """
        if self.ema_decay is not None:
            self.frozen = not requires_grad
        return super().requires_grad_(requires_grad)

    def _no_statistics(self) -> Pending:
        return Pending.of_no_forward(self.codebook, None if self.revive == "off" else self._candidates)

    @property
    def codes(self) -> Tensor:
        """The vectors that are looked up, like the codebook: with metric="cosine" its codes at length one."""
        return unit(self.codebook) if self._cosine else self.codebook

    def _forget(self) -> None:
        """Drops what the host remembers of tensors that have new contents."""
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
