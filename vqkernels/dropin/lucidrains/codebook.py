"""The codebook of lucidrains' vector-quantize-pytorch: its state, its moving averages, its replacement of dead codes.

Counts and sums come from the fused quantizer, so no one-hot matrix is built. A row with a NaN or an infinity is in
neither. Only k-means, which runs once, reads from the device. Every forward checks whether ranks share their
statistics; the layer may be older than the process group. A forward that a checkpoint computes again changes nothing.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...nn.initialisation import sample_rows
from ...nn.random import count_rows, hashed
from ...nn.revival import Candidates, draw_candidates, draw_candidates_over_ranks
from ...nn.rows import Rows
from ...nn.synchronisation import one_hot_rank, sum_over_ranks, world_size
from ...nn.wide import wide_dtype
from ...ops.kmeans import kmeans
from ...ops.quantize import quantize_with_statistics
from ...ops.recomputation import change
from ..from_data import FromData, has_rows

TINY = 1e-6  # the norm below which the peer no longer scales to length one
_DRAWS = 1 << 15  # the draws of 512 ranks add up exactly in float32


class Codebook(FromData):
    """State of one codebook for all heads, `(1, K, D)`, or of one per head, `(H, K, D)`.

    State: `initted ()` bool; `cluster_size (h, K)` float32, from ones; `embed_avg (h, K, D)`, from `embed`;
    `embed (h, K, D)`, a Parameter if a gradient trains it, otherwise a buffer. Floating buffers are never
    narrower than float32, also after a cast of the module.

    Args:
        learnable: `embed` is a Parameter.
        sync_codebook: None sums statistics over the ranks of a process group whenever there is one; False never does.
        sync_kmeans: k-means sees the rows of all ranks, where statistics are summed.
        Everything else as in `VectorQuantize`.
    """

    initted: Tensor
    cluster_size: Tensor
    embed_avg: Tensor
    embed: Tensor

    _flag = "initted"

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        num_codebooks: int = 1,
        *,
        kmeans_init: bool = False,
        kmeans_iters: int = 10,
        sync_kmeans: bool = True,
        decay: float = 0.8,
        eps: float = 1e-5,
        threshold_ema_dead_code: float = 0,
        learnable: bool = False,
        ema_update: bool = True,
        manual_ema_update: bool = False,
        use_cosine_sim: bool = False,
        sync_codebook: bool | None = None,
    ) -> None:
        super().__init__()
        self.codebook_size, self.num_codebooks = codebook_size, num_codebooks
        self.kmeans_iters, self.sync_kmeans, self.sync_codebook = kmeans_iters, sync_kmeans, sync_codebook
        self.decay, self.eps, self.threshold_ema_dead_code = decay, eps, threshold_ema_dead_code
        self.reset_cluster_size = threshold_ema_dead_code
        self.learnable_codebook, self.ema_update, self.manual_ema_update = learnable, ema_update, manual_ema_update
        self.use_cosine_sim = use_cosine_sim
        if kmeans_init:
            embed = torch.zeros(num_codebooks, codebook_size, dim, dtype=wide_dtype())
        else:
            embed = torch.empty(num_codebooks, codebook_size, dim, dtype=wide_dtype())
            nn.init.kaiming_uniform_(embed)  # diffusers' loader replaces it by a function that returns nothing
            embed = F.normalize(embed, dim=-1, eps=TINY) if use_cosine_sim else embed
        self.register_buffer("initted", torch.tensor(not kmeans_init))
        self._seen = None if kmeans_init else self.initted
        self.register_buffer("cluster_size", embed.new_ones(num_codebooks, codebook_size))
        self.register_buffer("embed_avg", embed.clone())
        if learnable:
            self.embed = nn.Parameter(embed)
        else:
            self.register_buffer("embed", embed)

    @property
    def has_dead_code_replacement(self) -> bool:
        return self.threshold_ema_dead_code > 0

    @property
    def synced(self) -> bool:
        """Whether statistics are summed over ranks, now."""
        return self.sync_codebook is not False and world_size() > 1

    def codes_for(self, batched: bool) -> Tensor:
        """`embed` as the operators want it: `(H, K, D)` for batched rows, otherwise `(K, D)`."""
        return self.embed if batched else self.embed[0]

    @torch.no_grad()
    def initialise(self, rows: Rows) -> None:
        """k-means on the first rows that come, in training or not; later calls do nothing.

        A batch of which no row counts, or of which every row has a NaN, is not the first.
        """
        if self._is_initialised():
            return
        joined = self.synced and self.sync_kmeans
        if rows.number == 0 and not joined:
            return  # the next batch may have rows
        sample = sample_rows(rows, self.codebook_size, rows.values.new_zeros((), dtype=torch.int64)) if joined else rows
        codes, distinct = kmeans(
            sample.values,
            self.codebook_size,
            iterations=self.kmeans_iters,
            mask=sample.mask,
            channel_dim=sample.channel_dim,
            batched=sample.batched,
            metric="cosine" if self.use_cosine_sim else "euclidean",
        )
        if not has_rows(distinct, self.codebook_size):
            return
        self.embed.copy_(codes.view_as(self.embed))
        found = quantize_with_statistics(
            rows.values,
            self.codes_for(rows.batched),
            mask=rows.mask,
            metric="dot" if self.use_cosine_sim else "euclidean",
            channel_dim=rows.channel_dim,
        )
        counts = sum_over_ranks(found.counts)[0] if joined else found.counts
        # A code without rows starts with weight 1, as it does without k-means; weight 0 would make it a zero code.
        self.cluster_size.copy_(counts.clamp_min(1))
        self.embed_avg.copy_(self.embed * self.cluster_size.unsqueeze(-1))
        self.update_ema()
        self.initted.fill_(True)
        self._seen = self.initted

    @torch.no_grad()
    def learn(
        self,
        counts: Tensor,
        sums: Tensor,
        rows: Rows,
        *,
        weight: Tensor | Callable[[Tensor, Tensor], Tensor] | None = None,
        accumulate: bool = False,
        ema_update: bool = True,
        first: bool | Tensor = True,
    ) -> None:
        """One step from counts `(h, K)` and sums `(h, K, D)` of the rows of each code.

        Args:
            weight: of this step in the averages, `(K,)` or `(h, K)`; or a function of sums and counts that returns it.
            accumulate: only add to what the next step takes in, for gradient accumulation.
            ema_update: write `embed`; without, only replace dead codes.
            first: False where the forward is computed again (`vqkernels.ops.recomputation`), which draws the same
                random numbers and changes nothing; `counts` and `sums` are not read then.
        """
        draw = self._draw(counts.device)
        if first is False:
            return
        numbers = None
        if self.synced and draw is not None:
            counts, sums, numbers, draw = sum_over_ranks(counts, sums, one_hot_rank(count_rows(rows)), draw)
        elif self.synced:
            counts, sums = sum_over_ranks(counts, sums)
        if callable(weight):
            weight = weight(sums, counts.to(self.cluster_size.dtype))
        news = ((self.cluster_size, counts), (self.embed_avg, sums))
        if accumulate:
            for average, new in news:
                _accumulate(average, new, first)
            return

        def write() -> None:
            for average, new in news:
                new = new.to(average.dtype)
                if average.grad is not None:
                    new, average.grad = new + average.grad, None
                average.lerp_(new, (1 - self.decay) * _like(weight, average))
            if ema_update and not self.manual_ema_update:
                self.update_ema()
            if draw is not None and self.training:
                self._expire(rows, draw, numbers)

        change(first, [self.cluster_size, self.embed_avg, self.embed], write)

    @torch.no_grad()
    def update_ema(self) -> None:
        """`embed` from the averages: `embed_avg / n`, n the cluster sizes after Laplace smoothing by `eps`."""
        total = self.cluster_size.sum(-1, keepdim=True)
        smoothed = (self.cluster_size + self.eps) / (total + self.codebook_size * self.eps) * total
        embed = self.embed_avg / smoothed.unsqueeze(-1)
        self.embed.copy_(F.normalize(embed, dim=-1, eps=TINY) if self.use_cosine_sim else embed)

    @torch.no_grad()
    def expire(self, rows: Rows, first: bool | Tensor = True) -> None:
        """Replaces codes with a cluster size below the threshold by rows; in training only. `first` as in `learn`."""
        draw = self._draw(rows.values.device) if self.training else None
        if draw is None or first is False:
            return
        numbers = None
        if self.synced:
            numbers, draw = sum_over_ranks(one_hot_rank(count_rows(rows)), draw)
        state = [self.cluster_size, self.embed_avg, self.embed]
        change(first, state, lambda: self._expire(rows, draw, numbers))

    def _draw(self, device: torch.device) -> Tensor | None:
        """What the replacement of dead codes draws from torch's generator, in every step and on every rank."""
        return torch.randint(0, _DRAWS, (), device=device) if self.has_dead_code_replacement else None

    def _expire(self, rows: Rows, draw: Tensor, rows_of_ranks: Tensor | None) -> None:
        dead = self.cluster_size < self.threshold_ema_dead_code
        if dead.device.type == "cpu" and not torch.compiler.is_compiling() and not bool(dead.any()):
            return
        size = self.codebook_size
        draws = hashed(draw, torch.zeros_like(draw), 2 * size + 1)
        if rows_of_ranks is None:
            candidates = draw_candidates(rows, draws)
        else:
            candidates = draw_candidates_over_ranks(rows, draws, rows_of_ranks)
        replacement, take = _assign(dead, candidates, draws[size:-1])
        replacement = replacement.to(self.embed_avg.dtype)
        lasting = self.reset_cluster_size
        self.embed.copy_(torch.where(take.unsqueeze(-1), replacement.to(self.embed.dtype), self.embed))
        self.embed_avg.copy_(torch.where(take.unsqueeze(-1), replacement * lasting, self.embed_avg))
        self.cluster_size.masked_fill_(take, lasting)

    def extra_repr(self) -> str:
        return f"codebook_size={self.codebook_size}, num_codebooks={self.num_codebooks}, decay={self.decay}"


def _accumulate(average: Tensor, new: Tensor, first: bool | Tensor) -> None:
    """Adds to what the next step of an average takes in, which hangs on it as its gradient."""
    new = new.to(average.dtype)
    if isinstance(first, Tensor):
        new = torch.where(first, new, 0)
    average.grad = new.clone() if average.grad is None else average.grad + new


def _like(weight: Tensor | None, average: Tensor) -> Tensor:
    """A weight of codes that broadcasts over `average`."""
    if weight is None:
        return average.new_ones(())
    weight = weight.to(average.dtype)
    weight = weight.unsqueeze(0) if weight.dim() == 1 else weight
    if weight.shape != average.shape[:2]:
        expected = f"[{average.shape[1]}] or {list(average.shape[:2])}"
        raise ValueError(f"ema_update_weight must have shape {expected}, got {list(weight.shape)}")
    return weight.view(*weight.shape, *[1] * (average.dim() - 2))


def _assign(dead: Tensor, candidates: Candidates, order: Tensor) -> tuple[Tensor, Tensor]:
    """Row `(h, K, D)` for every code, and which codes `(h, K)` take theirs: as many dead ones as rows can be had.

    The i-th dead code takes the i-th usable candidate, in a random order, so that no row is taken twice.
    """
    shuffled = order.argsort(stable=True)
    unusable = candidates.usable[:, shuffled].logical_not()
    places = shuffled[unusable.to(torch.uint8).argsort(dim=-1, stable=True)]
    turn = (dead.cumsum(-1) - 1).clamp_min(0)
    chosen = places.gather(1, turn)
    rows = candidates.rows.gather(1, chosen.unsqueeze(-1).expand(-1, -1, candidates.rows.shape[-1]))
    return rows, dead & (turn < candidates.usable.sum(-1, keepdim=True))
