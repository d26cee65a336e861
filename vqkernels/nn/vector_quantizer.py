"""The layer: a codebook, trained by the codebook loss or by moving averages, over the fused operators."""

from functools import partial
from typing import Any

from torch import Tensor

from ..ops.quantize import quantize_with_statistics
from ..ops.recomputation import advance
from ..ops.sample import sample_code
from .arguments import check_codes, check_flag, check_number, check_positive, check_size
from .base import CodebookQuantizer, shown_defaults
from .entropy import entropy_penalty
from .learning import Seen
from .lookup import check_indices, look_up
from .normalisation import unit
from .random import step_key
from .rows import Rows
from .scalar import Scalar
from .synchronisation import global_rank


class VectorQuantizer(CodebookQuantizer):
    """Vector quantization (van den Oord et al. 2017, "Neural Discrete Representation Learning").

    Args:
        dim: channels of z.
        codebook_size: K.
        codebook_dim: D, channels of the codes of one head; `dim / heads` when None. Where `heads * codebook_dim` is not
            `dim`, linear maps `project_in` and `project_out` lead into the space of the codes and back.
        heads: H, into how many equal parts the channels are split, each quantized on its own.
        separate_codebooks: one codebook `(H, K, D)` per head instead of one `(K, D)` for all; nothing with one head.
        beta: weight of the commitment loss.
        ema_decay: None trains the codebook by the paper's codebook loss; a float in [0, 1) trains it by exponential
            moving averages of the rows of each code (see `vqkernels.nn.ema`).
        ema_update: "forward" updates the averages in every training forward; "manual" collects statistics until
            `update_codebook()` is called, once per optimizer step, for gradient accumulation.
        metric: "euclidean" or "dot", as in `vqkernels.nearest_code`; or "cosine": rows and codes are scaled to length
            one in float32, and search, result and losses are those of the scaled vectors.
        gradient: "straight_through" (the paper) or "rotation" (Fifty et al. 2024): how the gradient of `quantized`
            reaches z, as in `vqkernels.vector_quantize`.
        temperature: None takes the nearest code; a positive number draws codes in training as `vqkernels.sample_code`
            does, the nearest still in eval mode and with freeze.
        entropy_weight: None, or a number: in training mode the loss gains `entropy_weight * (sample_entropy -
            entropy_gamma * codebook_entropy)`, see `vqkernels.entropy_loss`, with the layer's metric (cosine: the
            product of unit vectors), the mean over the codebooks, and the rows of this rank alone.
            A codebook trained by moving averages gets no gradient; z does.
        entropy_gamma: how much even use of all codes counts beside decided rows.
        entropy_temperature: of the soft assignments, in units of the squared distance or the product.
        init: "uniform" starts the codes in [-1/K, 1/K]; "kmeans" computes them from the first training batch (see
            `vqkernels.nn.initialisation`).
        revive: "off", or "rows": a code with few rows becomes a row of the batch (see `vqkernels.nn.revival`).
        revive_threshold: how much of the mean usage of all codes a code needs to live, in (0, 1).
        seed: of every draw of the layer; None draws it from torch's default generator when the layer is built, so that
            layers differ and `torch.manual_seed` repeats them. It is a buffer, equal on all ranks like the codes.
        channel_dim: the axis of z that holds the channels; 1 for images `(B, C, H, W)`.
        precision, backend: as in `vqkernels.nearest_code`.
        process_group: the ranks that learn together: None for the default group, a `torch.distributed.ProcessGroup`, or
            False for this rank alone.

    State: see `vqkernels.nn.codebook.CodebookState`, and `project_in`, `project_out` where there are projections.
    Floating buffers are never narrower than float32, whatever the module is cast to. With a process group (looked up in
    every forward) the statistics of all ranks are summed, so every rank must call the layer equally often; a rank
    without rows calls it with an empty z. FSDP2 drops what a forward writes into a Parameter: with it, init="kmeans"
    and revive="rows" need ema_decay.
    """

    temperature = Scalar(partial(check_positive, none=True))
    entropy_temperature = Scalar(check_positive)
    _temperature: Tensor | None
    _entropy_temperature: Tensor

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        *,
        codebook_dim: int | None = None,
        heads: int = 1,
        separate_codebooks: bool = False,
        beta: float = 0.25,
        ema_decay: float | None = None,
        ema_update: str = "forward",
        metric: str = "euclidean",
        gradient: str = "straight_through",
        temperature: float | None = None,
        entropy_weight: float | None = None,
        entropy_gamma: float = 1.0,
        entropy_temperature: float = 0.01,
        init: str = "uniform",
        revive: str = "off",
        revive_threshold: float = 0.1,
        seed: int | None = None,
        channel_dim: int = -1,
        precision: str = "exact",
        backend: str = "auto",
        process_group: Any = None,
    ) -> None:
        check_size("heads", heads)
        check_flag("separate_codebooks", separate_codebooks)
        if entropy_weight is not None:
            check_number("entropy_weight", entropy_weight, 0)
        check_number("entropy_gamma", entropy_gamma, 0)
        separate = separate_codebooks and heads > 1
        super().__init__(
            dim,
            codebook_size,
            codebook_dim=codebook_dim,
            parts=("heads", heads),
            leading={"heads": heads} if separate else {},
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
            cosine=metric == "cosine",
            sampled=temperature is not None,
        )
        self.heads, self.separate_codebooks, self.temperature = heads, separate, temperature
        self.entropy_weight, self.entropy_gamma = entropy_weight, entropy_gamma
        self.entropy_temperature = entropy_temperature

    _shown = shown_defaults(__init__)

    @classmethod
    def from_codebook(cls, codes: Tensor, *, weight: float = 1.0, **options: Any) -> "VectorQuantizer":
        """A layer that starts from given codes.

        Args:
            codes: `(K, D)`, or `(H, K, D)` for one codebook per head.
            weight: rows that each code counts for in the moving averages, see `set_codebook`.
            options: the other arguments of the layer; `dim` is D times the heads unless it is given.
        """
        check_codes(codes)
        if codes.dim() not in (2, 3):
            raise ValueError(f"codes must be (K, D), or (H, K, D) for heads, got {list(codes.shape)}")
        if codes.dim() == 3:
            check_codes(codes, heads=(options.get("heads", len(codes)), len(codes)))
            options |= {"heads": len(codes), "separate_codebooks": True}
        return cls._holding(codes, weight, {"dim": codes.shape[-1] * options.get("heads", 1), **options})

    def forward(
        self, z: Tensor, *, mask: Tensor | None = None, lengths: Tensor | None = None, freeze: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Quantizes z.

        Args:
            z: `(..., dim)`, or the layout named by `channel_dim`.
            mask: bool or integers, z's shape without channels; rows where it is False or 0 become zeros with index -1,
                count nowhere and get gradient 0.
            lengths: instead of a mask, int `(B,)`: element b of the batch keeps its first `lengths[b]` positions along
                the first axis after the batch.
            freeze: leave codebook and statistics as they are, and give the codebook no gradient.

        Returns:
            quantized: z's shape and dtype, with the gradient named by `gradient`.
            indices: int64, z's shape without channels; with several heads a last axis H follows.
            loss: 0-d; `codebook + beta * commitment`, or `beta * commitment` with EMA; in the space of the codes, mean
                over all unmasked elements. Also in eval mode. With entropy_weight, the entropies in training mode.
        """
        scalars = [] if self.entropy_weight is None else [self._entropy_temperature]
        scalars += [] if self._temperature is None else [self._temperature]
        steps = None if self._temperature is None else self.sample_steps
        forward = self._enter(z, mask, lengths, freeze, separate=self.separate_codebooks, steps=steps, scalars=scalars)
        rows, seen = forward.rows, forward.seen
        codes = unit(forward.codebook) if self.metric == "cosine" else forward.codebook
        metric = "dot" if self.metric == "cosine" else self.metric
        drawn = None
        if seen is not None and seen.draws and not forward.freeze:
            drawn = self._sampled(rows, codes, metric, seen)
        result = quantize_with_statistics(
            rows.values,
            codes,
            mask=rows.mask,
            metric=metric,
            gradient=self.gradient,
            precision=self.precision,
            channel_dim=rows.channel_dim,
            backend=self.backend,
            statistics=forward.learns is not None,
            indices=drawn,
        )
        loss = self._loss(result.commitment_loss, result.codebook_loss)
        if seen is not None and self.entropy_weight is not None:
            options = (self.entropy_weight, self.entropy_gamma, seen.scalars[0], self.backend)
            loss = loss + entropy_penalty(rows, codes, metric, *options)
        if forward.learns is not None:
            counts, sums = result.counts.view(self.counts.shape), result.sums.view(self.codebook.shape)
            self.learn(forward.learns, counts, sums, rows)
        quantized, loss = self._leave(forward, result.quantized, loss, z.dtype)
        return quantized, forward.layout.join_indices(result.indices), loss

    def _sampled(self, rows: Rows, codes: Tensor, metric: str, seen: Seen) -> Tensor:
        """Codes drawn for the rows; other draws in every step and on every rank."""
        indices = sample_code(
            rows.values,
            codes,
            temperature=seen.scalars[-1],
            seed=step_key(*seen.draws),
            mask=rows.mask,
            metric=metric,
            channel_dim=rows.channel_dim,
            row_offset=global_rank() << 40,
            backend=self.backend,
        )
        advance(self.sample_steps, seen.again)
        return indices

    def decode(self, indices: Tensor, *, check: bool = True) -> Tensor:
        """What `forward` gives for `indices`, laid out like z; -1 becomes zeros.

        Args:
            indices: of any integer dtype, in [-1, codebook_size), shaped as `forward` returns them.
            check: on a GPU, check the range at the price of one synchronisation. Without it, and always while
                compiling, a row out of range becomes NaN. On the CPU the range is always checked.
        """
        indices = check_indices(indices, self.codebook_size, self.heads, check)
        return self._decoded(look_up(self.codes, indices), indices, int(self.heads > 1))
