"""`ResidualVQ` and `GroupedResidualVQ` of lucidrains' vector-quantize-pytorch: a chain of our `VectorQuantize` layers.

Every level quantizes the residual of the levels before it, held constant, and has its gradient to the input. Different
from the peer: images `(B, dim, H, W)` work with projections too, coarse indices decode also without quantizer dropout,
and cross entropy against given codes is added over the levels.
"""

import random
from typing import Any

import torch
from torch import Tensor, nn

from ...nn.lookup import look_up
from ...nn.projection import channels_at, project
from ...nn.synchronisation import sum_over_ranks
from ...ops.recomputation import change
from .layer import VectorQuantize
from .options import refuse
from .rows import directional


def _dropout_seed(layer: VectorQuantize, device: torch.device) -> int:
    """A number below 10 000 from torch's generator. With ranks it is their sum, so all drop the same levels."""
    if not layer._codebook.synced:
        return int(torch.randint(0, 10_000, ()))
    return int(sum_over_ranks(torch.randint(0, 10_000, (), device=device))[0])


class ResidualVQ(nn.Module):
    """Stands in for `vector_quantize_pytorch.ResidualVQ` (Zeghidour et al. 2021, "SoundStream", algorithm 1).

    The arguments are the peer's; those that it does not name go to every `VectorQuantize`. Not supported, and refused
    by name with a ValueError: `heads`, `implicit_neural_codebook`, and beams (`beam_size`, `eval_beam_size`).

    State: `layers.{i}` as in `VectorQuantize`; `project_in`, `project_out` where `codebook_dim` is not `dim`. With
    `shared_codebook` every level has the same tensors.
    """

    def __init__(
        self,
        *,
        dim: int,
        num_quantizers: int | None = None,
        codebook_size: int | tuple[int, ...],
        codebook_dim: int | None = None,
        shared_codebook: bool = False,
        diveq: bool = False,
        heads: int = 1,
        quantize_dropout: bool = False,
        quantize_dropout_cutoff_index: int = 0,
        quantize_dropout_multiple_of: int = 1,
        accept_image_fmap: bool = False,
        implicit_neural_codebook: bool = False,
        mlp_kwargs: dict[str, Any] | None = None,
        beam_size: int | None = None,
        eval_beam_size: int | None = None,
        beam_score_quantizer_weights: list[float] | None = None,
        quant_grad_frac: float = 0.0,
        return_zeros_for_masked_padding: bool = True,
        **vq_kwargs: Any,
    ) -> None:
        refuse(
            heads=None if heads == 1 else heads,
            implicit_neural_codebook=implicit_neural_codebook,
            beam_size=None if beam_size == 1 else beam_size,
            eval_beam_size=None if eval_beam_size == 1 else eval_beam_size,
        )
        if num_quantizers is None and not isinstance(codebook_size, tuple):
            raise ValueError("num_quantizers is needed where codebook_size is one number")
        sizes = codebook_size if isinstance(codebook_size, tuple) else (codebook_size,) * int(num_quantizers or 0)
        if num_quantizers is not None and len(sizes) != num_quantizers:
            raise ValueError(f"codebook_size must name {num_quantizers} sizes, one per quantizer, got {len(sizes)}")
        if shared_codebook and len(set(sizes)) != 1:
            raise ValueError(f"shared_codebook needs codebooks of one size, got {sizes}")
        if quantize_dropout_cutoff_index < 0:
            raise ValueError(f"quantize_dropout_cutoff_index must be at least 0, got {quantize_dropout_cutoff_index}")
        super().__init__()
        codebook_dim = dim if codebook_dim is None else codebook_dim
        self.codebook_dim, self.num_quantizers, self.codebook_sizes = codebook_dim, len(sizes), sizes
        self.uniform_codebook_size = len(set(sizes)) == 1
        self.has_projections = codebook_dim != dim
        self.project_in: nn.Module = nn.Linear(dim, codebook_dim) if self.has_projections else nn.Identity()
        self.project_out: nn.Module = nn.Linear(codebook_dim, dim) if self.has_projections else nn.Identity()
        self.accept_image_fmap = accept_image_fmap
        self.return_zeros_for_masked_padding = return_zeros_for_masked_padding
        self.quantize_dropout = quantize_dropout and self.num_quantizers > 1
        self.quantize_dropout_cutoff_index = quantize_dropout_cutoff_index
        self.quantize_dropout_multiple_of = quantize_dropout_multiple_of
        self.diveq, self.quant_grad_frac = diveq, 1.0 if diveq else quant_grad_frac
        self.shared_codebook = shared_codebook
        options = vq_kwargs | {"return_zeros_for_masked_padding": return_zeros_for_masked_padding}
        if shared_codebook:
            options |= {"manual_ema_update": True}
        if diveq:
            options |= {
                "ema_update": False,
                "learnable_codebook": True,
                "route_gradients_to_input": False,
                "commitment_weight": 0.0,
            }
        self.layers = nn.ModuleList(
            VectorQuantize(codebook_dim, size, codebook_dim, accept_image_fmap=accept_image_fmap, **options)
            for size in sizes
        )
        if shared_codebook:
            for layer in self._levels[1:]:
                layer._codebook = self._levels[0]._codebook

    @property
    def _levels(self) -> list[VectorQuantize]:
        return list(self.layers)  # type: ignore[arg-type]

    @property
    def _channel_dim(self) -> int:
        return 1 if self._levels[0]._channels_first else -1

    @property
    def vq_is_ema_updating(self) -> bool:
        return self._levels[0].ema_update

    @property
    def codebook_size(self) -> int:
        return self._levels[0].codebook_size

    @property
    def codebooks(self) -> Tensor | tuple[Tensor, ...]:
        """`(Q, K, D)`, or a tuple where the sizes differ."""
        codebooks = tuple(layer._codebook.embed[0] for layer in self._levels)
        return torch.stack(codebooks) if self.uniform_codebook_size else codebooks

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        indices: Tensor | list[Tensor] | None = None,
        return_all_codes: bool = False,
        sample_codebook_temp: float | None = None,
        freeze_codebook: bool = False,
        beam_size: int | None = None,
        rand_quantize_dropout_fixed_seed: int | None = None,
    ) -> Any:
        """Quantizes x `(B, N, dim)`, or `(B, dim, H, W)` with `accept_image_fmap`.

        Returns:
            quantized: x's shape.
            indices: int64, x's shape without channels, then Q; -1 where masked and for levels that were dropped.
            losses: `(Q,)`, 0 for levels that were dropped; then `(Q, ..., D)`, all codes, if asked for.
            With `indices` instead: quantized, and the mean cross entropy against them, added over the levels.
        """
        refuse(beam_size=None if beam_size == 1 else beam_size)
        axis = self._channel_dim
        residual = self._project(self.project_in, x)
        inner, quantized = residual, torch.zeros_like(residual)
        given = list(indices) if isinstance(indices, list | tuple) else None
        if isinstance(indices, Tensor):
            given = list(indices.unbind(-1))
        last = self.num_quantizers - 1
        if self.training and self.quantize_dropout and given is None:
            last = self._last_level(rand_quantize_dropout_fixed_seed, x.device)
        found: list[Tensor] = []
        losses: list[Tensor] = []
        seen: list[Tensor] = []
        for level, layer in enumerate(self._levels):
            if level > last:
                found.append(torch.full_like(found[0], -1))
                losses.append(torch.zeros_like(losses[0]))
                continue
            seen.append(residual)
            step = layer.step(
                residual, mask=mask, sample_codebook_temp=sample_codebook_temp, freeze_codebook=freeze_codebook
            )
            codes = layer.output(step)
            through = codes.detach()
            if self.quant_grad_frac > 0:
                through = self.quant_grad_frac * codes + (1 - self.quant_grad_frac) * through
            residual = residual - through
            quantized = quantized + codes
            found.append(step.indices)
            losses.append(layer.loss(step)[0] if given is None else layer.cross_entropy(step, given[level]))
        if self.training and self.shared_codebook and not freeze_codebook:
            self._learn_shared(seen, step.first)
        if self.diveq:
            quantized = directional(inner, quantized, axis)
        quantized = self._project(self.project_out, quantized)
        if mask is not None:
            padding = torch.zeros_like(quantized) if self.return_zeros_for_masked_padding else x
            quantized = torch.where(mask.unsqueeze(axis), quantized, padding)
        if given is not None:
            return quantized, torch.stack(losses).sum()
        result = (quantized, torch.stack(found, -1), torch.stack(losses))
        return (*result, self.get_codes_from_indices(result[1])) if return_all_codes else result

    def _project(self, module: nn.Module, x: Tensor) -> Tensor:
        if not self.has_projections:
            return x
        return project(module, x, self._channel_dim)

    def _last_level(self, seed: int | None, device: torch.device) -> int:
        """The last level of this step, drawn as the peer does."""
        draw = random.Random(_dropout_seed(self._levels[0], device) if seed is None else seed)
        last = draw.randrange(self.quantize_dropout_cutoff_index, self.num_quantizers)
        multiple = self.quantize_dropout_multiple_of
        return -(-(last + 1) // multiple) * multiple - 1

    def _learn_shared(self, seen: list[Tensor], first: bool | Tensor) -> None:
        """Writes the one codebook of all levels once, after the last level; `first` as in `Codebook.learn`."""
        layer = self._levels[0]
        codebook = layer._codebook
        if self.vq_is_ema_updating:
            change(first, [codebook.embed], codebook.update_ema)
        if codebook.has_dead_code_replacement:
            rows = torch.stack([x.detach().movedim(self._channel_dim, -1) for x in seen], -2)
            layer.expire_codes_(rows.reshape(len(rows), -1, rows.shape[-1]))

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """Codes `(Q, ..., D)` of indices `(..., q)`, q levels or fewer than Q; zeros for -1 and for levels left out."""
        missing = self.num_quantizers - indices.shape[-1]
        indices = nn.functional.pad(indices, (0, missing), value=-1)
        levels = zip(self._levels, indices.unbind(-1), strict=True)
        return torch.stack([look_up(layer._codebook.embed[0], level) for layer, level in levels])

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """What `forward` gives for these indices in eval mode, laid out like x."""
        return channels_at(self.project_out(self.get_codes_from_indices(indices).sum(0)), self._channel_dim)


class GroupedResidualVQ(nn.Module):
    """Stands in for `vector_quantize_pytorch.GroupedResidualVQ`: the channels in equal groups, a `ResidualVQ` for each.

    State: `rvqs.{g}` as in `ResidualVQ`. Results as there with an axis G in front: indices `(G, ..., Q)`, losses
    `(G, Q)`; all codes as a tuple of G tensors `(Q, ..., D)`.
    """

    def __init__(self, *, dim: int, groups: int = 1, accept_image_fmap: bool = False, **kwargs: Any) -> None:
        if dim % groups:
            raise ValueError(f"dim must be a multiple of groups={groups}, got {dim}")
        super().__init__()
        self.dim, self.groups, self.accept_image_fmap = dim, groups, accept_image_fmap
        self.rvqs = nn.ModuleList(
            ResidualVQ(dim=dim // groups, accept_image_fmap=accept_image_fmap, **kwargs) for _ in range(groups)
        )

    @property
    def _groups(self) -> list[ResidualVQ]:
        return list(self.rvqs)  # type: ignore[arg-type]

    @property
    def codebooks(self) -> Tensor:
        """`(G, Q, K, D)`."""
        return torch.stack([group.codebooks for group in self._groups])  # type: ignore[misc]

    @property
    def split_dim(self) -> int:
        return self._groups[0]._channel_dim

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """Codes `(G, Q, ..., D)` of indices `(G, ..., q)`."""
        return torch.stack([g.get_codes_from_indices(part) for g, part in zip(self._groups, indices, strict=True)])

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """What `forward` gives for these indices in eval mode, laid out like x."""
        parts = zip(self._groups, indices, strict=True)
        return torch.cat([group.get_output_from_indices(part) for group, part in parts], self.split_dim)

    def forward(
        self,
        x: Tensor,
        indices: Tensor | None = None,
        return_all_codes: bool = False,
        sample_codebook_temp: float | None = None,
        freeze_codebook: bool = False,
        mask: Tensor | None = None,
    ) -> Any:
        """Quantizes x; arguments and results as in `ResidualVQ.forward`, with an axis G in front. All groups drop the
        same levels."""
        if not torch.jit.is_tracing() and x.shape[self.split_dim] != self.dim:
            raise ValueError(f"x must have {self.dim} channels on axis {self.split_dim}, got {list(x.shape)}")
        seed = _dropout_seed(self._groups[0]._levels[0], x.device) if self.training else None
        given = [None] * self.groups if indices is None or len(indices) == 0 else list(indices)
        parts = zip(self._groups, x.chunk(self.groups, self.split_dim), given, strict=True)
        results = [
            group(
                part,
                mask=mask,
                indices=codes,
                return_all_codes=return_all_codes,
                sample_codebook_temp=sample_codebook_temp,
                freeze_codebook=freeze_codebook,
                rand_quantize_dropout_fixed_seed=seed,
            )
            for group, part, codes in parts
        ]
        parts_of_x, *others = zip(*results, strict=True)
        quantized = torch.cat(parts_of_x, self.split_dim)
        if given[0] is not None:
            return quantized, torch.stack(others[0]).sum()
        found, losses, *codes = others
        return quantized, torch.stack(found), torch.stack(losses), *codes
