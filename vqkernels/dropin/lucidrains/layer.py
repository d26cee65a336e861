"""`VectorQuantize` of lucidrains' vector-quantize-pytorch over the fused operators: its arguments, results and state.

One fused pass gives codes, indices, commitment loss and the statistics of the moving averages. Nothing of size N x K is
built, in training or not.

As in the peer: the codes looked up in training are those before the update. The loss is 0 in eval mode. A gradient
reaches the input only in training, by default by the rotation trick.

Different on purpose: ties go to the lowest index. The forward value in training is the code itself, bit for bit, also
for a zero row, which the peer turns into zeros. Index -1 decodes to zeros. Cross entropy and the orthogonal loss have
their gradient at the codes that gave them; the peer may overwrite these before its backward pass.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...nn.lookup import look_up
from ...nn.normalisation import unit
from ...nn.orthogonal import orthogonal_loss
from ...nn.projection import channels_at, project
from ...nn.rows import RowLayout, Rows
from ...ops.quantize import Quantization, quantize_with_statistics
from ...ops.recomputation import as_seen, enter
from ...ops.statistics import codebook_statistics
from .logits import cross_entropy, draw_codes
from .options import ConfiguredQuantizer, refuse
from .rows import as_peer_rows, canonical, directional


class LossBreakdown(NamedTuple):
    """The parts of the loss, each before its weight; 0-d."""

    commitment: Tensor
    codebook_diversity: Tensor
    orthogonal_reg: Tensor
    inplace_optimize: Tensor


class Step(NamedTuple):
    """The tensors of one forward."""

    x: Tensor
    layout: RowLayout  # of x
    rows: Rows
    embed: Tensor  # the codes that were looked up, before any update
    result: Quantization
    quantized: Tensor  # with its gradient, laid out like `rows.values`
    indices: Tensor  # as `forward` returns them
    freeze: bool
    first: bool | Tensor  # as in `Codebook.learn`


class VectorQuantize(ConfiguredQuantizer):
    """Stands in for `vector_quantize_pytorch.VectorQuantize`: same arguments, defaults, results and state dict.

    The arguments are the peer's. Not supported, and refused by name with a ValueError: `straight_through` (of Gumbel),
    `codebook_diversity_loss_weight`, `vq_bridge`, `in_place_codebook_optimizer`, `affine_param`; and in `forward`
    `topk` and `codebook_transform_fn`. With `sync_codebook=None` every forward looks for a process group. Masks and
    lengths work with every layout, heads and projections. `directional_reparam` works without dead-code replacement.

    State: `_codebook` as in `Codebook`; `project_in`, `project_out` where `codebook_dim * heads` is not `dim`.
    """

    def forward(
        self,
        x: Tensor,
        indices: Tensor | None = None,
        mask: Tensor | None = None,
        lens: Tensor | None = None,
        topk: int | None = None,
        sample_codebook_temp: float | None = None,
        freeze_codebook: bool | None = None,
        return_loss_breakdown: bool = False,
        codebook_transform_fn: Callable[..., Any] | None = None,
        ema_update_weight: Tensor | Callable[[Tensor, Tensor], Tensor] | None = None,
        accum_ema_update: bool = False,
        ema_update: bool | None = None,
    ) -> Any:
        """Quantizes x.

        Args:
            x: `(B, N, dim)` or `(B, dim)`; `(B, dim, N)` with channel_last=False; `(B, dim, H, W)` or
                `(B, dim, D, H, W)` for images and volumes.
            indices: codes to compare with, shaped as `forward` returns them, -1 where there is none.
            mask, lens: bool, x's shape without channels, or int `(B,)`: which rows count.
            sample_codebook_temp: temperature of the sampling, in place of the layer's.
            freeze_codebook: leave the codebook and its averages as they are.
            ema_update_weight, accum_ema_update, ema_update: as `weight`, `accumulate` and `ema_update` of
                `Codebook.learn`.

        Returns:
            quantized: x's shape and dtype; masked rows are zeros, or x where `return_zeros_for_masked_padding=False`.
            indices: int64, x's shape without channels, with several heads a last axis more; -1 where masked.
            loss: 0-d, with a gradient in training, 0 in eval mode; then the `LossBreakdown` if asked for.
            With `indices` instead: the codes of the rows as the peer lays them out, and their mean cross entropy.
        """
        refuse(topk=topk, codebook_transform_fn=codebook_transform_fn)
        step = self.step(
            x,
            mask=mask,
            lens=lens,
            sample_codebook_temp=sample_codebook_temp,
            freeze_codebook=freeze_codebook,
            ema_update_weight=ema_update_weight,
            accum_ema_update=accum_ema_update,
            ema_update=ema_update,
        )
        if indices is not None:
            values = step.quantized.to(x.dtype)
            return as_peer_rows(values, step.rows, step.layout), self.cross_entropy(step, indices)
        loss, parts = self.loss(step)
        results = (self.output(step), step.indices, loss)
        return (*results, parts) if return_loss_breakdown else results

    def step(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        lens: Tensor | None = None,
        sample_codebook_temp: float | None = None,
        freeze_codebook: bool | None = None,
        ema_update_weight: Tensor | Callable[[Tensor, Tensor], Tensor] | None = None,
        accum_ema_update: bool = False,
        ema_update: bool | None = None,
    ) -> Step:
        """One forward without its results: finds codes, then in training updates the codebook."""
        freeze = self.freeze_codebook if freeze_codebook is None else freeze_codebook
        layout = self._layout(x, mask, lens)
        rows = self._rows(x, layout)
        codebook = self._codebook
        if self.training:
            codebook.widen_buffers()
        codebook.initialise(rows)
        ema_update = codebook.ema_update if ema_update is None else ema_update
        learns = self.training and not freeze and (ema_update or codebook.has_dead_code_replacement)
        # The backward pass needs the codes that were looked up, and this forward or a later one overwrites them.
        embed, first = self._as_seen(rows)
        embed = embed if rows.batched else embed[0]
        result = self._quantize(rows, embed, freeze, learns, sample_codebook_temp)
        if learns:
            shape = codebook.embed.shape
            codebook.learn(
                result.counts.view(shape[:2]),
                result.sums.view(shape),
                rows,
                weight=ema_update_weight,
                accumulate=accum_ema_update,
                ema_update=ema_update,
                first=first,
            )
        quantized = self._with_gradient(x, rows, embed, result)
        indices = layout.join_indices(result.indices)
        return Step(x, layout, rows, embed, result, quantized, indices, freeze, first)

    def _as_seen(self, rows: Rows, *here: Tensor) -> tuple[Tensor, bool | Tensor]:
        """`embed (h, K, D)` as the first pass of this forward has it here, for its backward pass; and `Step.first`.

        Args:
            here: tensors whose number tells this place from others in the forward.
        """
        codebook = self._codebook
        if not (self.training and (codebook.ema_update or codebook.has_dead_code_replacement)):
            return codebook.embed, True
        seen = enter(codebook.initted, rows.values, [codebook.embed, *here], changes=torch.is_grad_enabled())
        return as_seen(codebook.embed, seen.state[0]), seen.first

    def _layout(self, x: Tensor, mask: Tensor | None, lens: Tensor | None) -> RowLayout:
        """Where x keeps its channels, and which of its rows count."""
        if lens is not None and (self.accept_image_fmap or self.accept_3d_fmap):
            raise ValueError("lens is for sequences: give a mask for images and volumes")
        channel_dim = 1 if self._channels_first and isinstance(x, Tensor) and x.dim() > 2 else -1
        separate = self.separate_codebook_per_head
        return RowLayout.of(x, self.dim, channel_dim, mask=mask, lengths=lens, heads=self.heads, separate=separate)

    def _rows(self, x: Tensor, layout: RowLayout) -> Rows:
        """x -> rows in the space of the codes, split among heads."""
        inner = x
        if self.has_projections or self.use_cosine_sim:
            # A masked row may hold a NaN, and 0 * NaN would reach the weights' gradient.
            inner = layout.zero_masked(x)
        if self.has_projections:
            inner = project(self.project_in, inner, layout.channel_dim)
        # Autocast narrows a projection; codes are looked up in x's precision.
        rows = layout.split(inner.to(torch.promote_types(inner.dtype, x.dtype)))
        return rows._replace(values=unit(rows.values, rows.channel_dim)) if self.use_cosine_sim else rows

    def _quantize(
        self, rows: Rows, embed: Tensor, freeze: bool, statistics: bool, temperature: float | None
    ) -> Quantization:
        temperature = self.sample_codebook_temp if temperature is None else temperature
        drawn = None
        if self.stochastic_sample_codes and self.training and temperature > 0:
            values = canonical(rows.values, rows)
            codes = embed if rows.batched else embed.unsqueeze(0)
            drawn = draw_codes(values, codes, temperature, self.use_cosine_sim)
            drawn = drawn.view(rows.values.movedim(rows.channel_dim, -1).shape[:-1])
            drawn = drawn if rows.mask is None else torch.where(rows.mask, drawn, -1)
        trains = self.training and self.learnable_codebook and not freeze and self.has_commitment_loss
        return quantize_with_statistics(
            rows.values if self.training else rows.values.detach(),
            embed if trains else embed.detach(),
            mask=rows.mask,
            metric="dot" if self.use_cosine_sim else "euclidean",
            gradient="rotation" if self.rotation_trick else "straight_through",
            channel_dim=rows.channel_dim,
            statistics=statistics,
            indices=drawn,
        )

    def _with_gradient(self, x: Tensor, rows: Rows, embed: Tensor, result: Quantization) -> Tensor:
        """The codes of the rows, with the gradient that this layer gives them; laid out like `rows.values`."""
        routes = self.training and x.requires_grad and self.route_gradients_to_input
        if routes and not self.directional_reparam:
            quantized = result.quantized
        elif torch.is_grad_enabled() and embed.requires_grad:
            indices = result.indices.movedim(0, -1) if rows.batched else result.indices
            codes = look_up(embed, indices)
            codes = codes.movedim(-2, 0) if rows.batched else codes
            quantized = codes.movedim(-1, rows.channel_dim)
            if routes:
                quantized = directional(rows.values, quantized, rows.channel_dim, self.directional_reparam_variance)
        else:
            quantized = result.quantized.detach()
        if self.training and self.sync_update_v > 0:
            quantized = quantized + self.sync_update_v * (quantized - quantized.detach())
        return quantized

    def loss(self, step: Step) -> tuple[Tensor, LossBreakdown]:
        """The weighted sum and its parts; zeros in eval mode."""
        dtype = torch.promote_types(self._codebook.embed.dtype, torch.float32)
        zero = torch.zeros((), dtype=dtype, device=step.x.device)
        loss = commitment = orthogonal = zero
        if self.training and self.has_commitment_loss:
            commitment = self._commitment(step)
            loss = loss + commitment * self.commitment_weight
        if self.training and self.has_codebook_orthogonal_loss:
            orthogonal = self._orthogonal(step.result.indices, step.rows)
            loss = loss + orthogonal * self.orthogonal_reg_weight
        if self.training and torch.is_grad_enabled() and not loss.requires_grad and not torch.compiler.is_compiling():
            loss = loss.detach().requires_grad_()  # backward must work on every training loss
        return loss, LossBreakdown(commitment, zero, orthogonal, zero)

    def _commitment(self, step: Step) -> Tensor:
        if self.commitment_use_cross_entropy_loss:
            return self.cross_entropy(step, step.indices)
        if step.layout.mask is not None and self.use_cosine_sim and self.heads == 1 and not self.has_projections:
            # The peer measures masked batches against x before it is scaled to length one.
            given, axis = step.result.indices, step.layout.channel_dim
            return quantize_with_statistics(
                step.x, step.embed.detach(), channel_dim=axis, statistics=False, indices=given
            ).commitment_loss
        result = step.result
        if self.learnable_codebook and not step.freeze:  # one squared error, with a gradient on both sides
            return result.commitment_loss + (result.codebook_loss - result.codebook_loss.detach())
        return result.commitment_loss

    def _orthogonal(self, indices: Tensor, rows: Rows) -> Tensor:
        """Of all codes, of those that this batch uses, or of a random choice among them."""
        embed, _ = self._as_seen(rows, indices)
        size, most = self.codebook_size, self.orthogonal_reg_max_codes
        if not self.orthogonal_reg_active_codes_only:
            if most is not None and size > most:
                embed = embed[:, torch.randperm(size, device=embed.device)[:most]]
            return orthogonal_loss(embed)
        if rows.batched:
            raise ValueError("orthogonal_reg_active_codes_only does not go with separate_codebook_per_head")
        used = torch.zeros(size + 1, dtype=torch.bool, device=embed.device)
        used = used.scatter(0, indices.flatten() % (size + 1), True)[:-1]  # -1 goes to the last place, which is cut off
        if most is not None and size > most:
            chosen = torch.where(used, torch.rand(size, device=embed.device), -1.0).topk(most).indices
            used = used & torch.zeros_like(used).scatter(0, chosen, True)
        return orthogonal_loss(embed, used.unsqueeze(0))

    def cross_entropy(self, step: Step, targets: Tensor) -> Tensor:
        """Of the rows against codes shaped as `forward` returns them, or with their positions flattened."""
        rows = step.rows
        targets = targets.movedim(-1, 0) if rows.batched else targets
        values = canonical(rows.values, rows, step.layout)
        if targets.numel() != values.shape[:2].numel():
            raise ValueError(f"indices must be shaped {list(step.indices.shape)}, got {list(targets.shape)}")
        codes = step.embed if rows.batched else step.embed.unsqueeze(0)
        codes = codes if self._codebook.learnable_codebook else codes.detach()
        return cross_entropy(values, codes, targets.reshape(values.shape[:2]), self.use_cosine_sim)

    def output(self, step: Step) -> Tensor:
        """The codes of a step laid out like x."""
        x, mask, axis = step.x, step.layout.mask, step.layout.channel_dim
        quantized = step.layout.join(step.quantized.to(x.dtype))
        if self.has_projections:
            quantized = project(self.project_out, quantized, axis)
        if mask is None or (self.return_zeros_for_masked_padding and not self.has_projections):
            return quantized
        padding = torch.zeros_like(quantized) if self.return_zeros_for_masked_padding else x
        return torch.where(mask.unsqueeze(axis), quantized, padding)

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """The codes of indices as `forward` returns them, channels where x has them; -1 gives zeros.

        With several heads their codes are joined if each has its codebook, and otherwise keep an axis H before D.
        """
        separate = self.separate_codebook_per_head and self.heads > 1
        codes = look_up(self._codebook.codes_for(separate), indices)
        codes = codes.flatten(-2) if separate else codes
        return channels_at(codes, 1) if self._channels_first else codes

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """What `forward` gives for these indices in eval mode, laid out like x."""
        codes = look_up(self._codebook.codes_for(self.separate_codebook_per_head and self.heads > 1), indices)
        codes = self.project_out(codes.flatten(-2) if self.heads > 1 else codes)
        return channels_at(codes, 1) if self._channels_first else codes

    @torch.no_grad()
    def update_indices(self, x: Tensor, indices: Tensor, mask: Tensor | None = None) -> None:
        """One step of the codebook from rows and codes that were chosen elsewhere; -1 counts nowhere."""
        layout = self._layout(x, mask, None)
        rows = self._rows(x, layout)
        if self.heads > 1:
            indices = indices.movedim(-1, 0 if rows.batched else layout.channel_dim)
        codebook, shape = self._codebook, self._codebook.embed.shape
        if not (self.ema_update or codebook.has_dead_code_replacement):
            return
        counts, sums = codebook_statistics(
            rows.values,
            indices.contiguous(),
            self.codebook_size,
            mask=rows.mask,
            channel_dim=rows.channel_dim,
            batched=rows.batched,
        )
        codebook.widen_buffers()
        first = enter(codebook.initted, rows.values, [], changes=False).first
        codebook.learn(counts.view(shape[:2]), sums.view(shape), rows, ema_update=self.ema_update, first=first)

    update_ema_indices = update_indices

    @torch.no_grad()
    def expire_codes_(self, x: Tensor) -> None:
        """Replaces dead codes by rows of x `(B, N, D H)`, which is in the space of the codes; in training only."""
        separate = self.separate_codebook_per_head
        rows = RowLayout.of(x, x.shape[-1], -1, heads=self.heads, separate=separate).split(x)
        rows = rows._replace(values=unit(rows.values, rows.channel_dim)) if self.use_cosine_sim else rows
        self._codebook.expire(rows, enter(self._codebook.initted, rows.values, [], changes=False).first)

    def update_in_place_optimizer(self) -> None:
        """Nothing: an optimizer of the codebook inside the layer is not supported."""

    def extra_repr(self) -> str:
        return f"{self.dim}, {self.codebook_size}, heads={self.heads}, commitment_weight={self.commitment_weight}"
