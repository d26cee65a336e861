"""The arguments of lucidrains' `VectorQuantize`: defaults, conflicts, and options that are refused by name."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .codebook import Codebook


def refuse(**options: Any) -> None:
    """Raises for the first option that is set, since it has no counterpart here and must not be ignored."""
    for name, value in options.items():
        if value is not None and value is not False and value != 0:
            shown = value if isinstance(value, int | float | str) else type(value).__name__
            raise ValueError(f"{name}={shown} is not supported by vqkernels.dropin.lucidrains: keep the peer's layer")


class ConfiguredQuantizer(nn.Module):
    """The arguments, submodules and state of `VectorQuantize`, which documents them."""

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        codebook_dim: int | None = None,
        heads: int = 1,
        separate_codebook_per_head: bool = False,
        decay: float = 0.8,
        eps: float = 1e-5,
        freeze_codebook: bool = False,
        kmeans_init: bool = False,
        kmeans_iters: int = 10,
        sync_kmeans: bool = True,
        use_cosine_sim: bool = False,
        layernorm_after_project_in: bool = False,
        threshold_ema_dead_code: float = 0,
        channel_last: bool = True,
        accept_image_fmap: bool = False,
        accept_3d_fmap: bool = False,
        commitment_weight: float = 1.0,
        commitment_use_cross_entropy_loss: bool = False,
        orthogonal_reg_weight: float = 0.0,
        orthogonal_reg_active_codes_only: bool = False,
        orthogonal_reg_max_codes: int | None = None,
        codebook_diversity_loss_weight: float = 0.0,
        codebook_diversity_temperature: float = 100.0,
        stochastic_sample_codes: bool = False,
        sample_codebook_temp: float = 1.0,
        straight_through: bool = False,
        rotation_trick: bool | None = None,
        directional_reparam: bool = False,
        directional_reparam_variance: float = 5e-3,
        sync_codebook: bool | None = None,
        sync_affine_param: bool = False,
        ema_update: bool | None = None,
        vq_bridge: nn.Module | None = None,
        manual_ema_update: bool = False,
        learnable_codebook: bool | None = None,
        in_place_codebook_optimizer: Callable[..., Any] | None = None,
        manual_in_place_optimizer_update: bool = False,
        affine_param: bool = False,
        affine_param_batch_decay: float = 0.99,
        affine_param_codebook_decay: float = 0.9,
        sync_update_v: float = 0.0,
        return_zeros_for_masked_padding: bool = True,
        route_gradients_to_input: bool = True,
    ) -> None:
        refuse(
            straight_through=straight_through,
            codebook_diversity_loss_weight=codebook_diversity_loss_weight,
            vq_bridge=vq_bridge,
            in_place_codebook_optimizer=in_place_codebook_optimizer,
            affine_param=affine_param,
        )
        ema_update = not directional_reparam if ema_update is None else ema_update
        learnable_codebook = directional_reparam if learnable_codebook is None else learnable_codebook
        rotation_trick = not directional_reparam and dim > 1 if rotation_trick is None else rotation_trick
        for conflict, sentence in (
            (use_cosine_sim and learnable_codebook, "use_cosine_sim and learnable_codebook do not go together"),
            (ema_update and learnable_codebook, "learnable_codebook needs ema_update=False"),
            (rotation_trick and directional_reparam, "rotation_trick and directional_reparam are one or the other"),
            (not 0 <= sync_update_v <= 1, f"sync_update_v must be in [0, 1], got {sync_update_v!r}"),
            (sync_update_v > 0 and not learnable_codebook, "sync_update_v needs learnable_codebook=True"),
        ):
            if conflict:
                raise ValueError(sentence)
        super().__init__()
        codebook_dim = dim if codebook_dim is None else codebook_dim
        inner = codebook_dim * heads
        self.dim, self.codebook_size, self.heads = dim, codebook_size, heads
        self.separate_codebook_per_head = separate_codebook_per_head
        self.has_projections = inner != dim
        self.project_in: nn.Module = nn.Identity()
        self.project_out: nn.Module = nn.Identity()
        if self.has_projections:
            linear = nn.Linear(dim, inner)
            self.project_in = nn.Sequential(linear, nn.LayerNorm(inner)) if layernorm_after_project_in else linear
            self.project_out = nn.Linear(inner, dim)
        self.eps, self.freeze_codebook, self.use_cosine_sim = eps, freeze_codebook, use_cosine_sim
        self.learnable_codebook, self.rotation_trick = learnable_codebook, rotation_trick
        self.directional_reparam = directional_reparam
        self.directional_reparam_variance = directional_reparam_variance
        self.route_gradients_to_input, self.sync_update_v = route_gradients_to_input, sync_update_v
        self.commitment_weight = commitment_weight
        self.has_commitment_loss = commitment_weight > 0 and not directional_reparam
        self.commitment_use_cross_entropy_loss = commitment_use_cross_entropy_loss
        self.orthogonal_reg_weight = orthogonal_reg_weight
        self.has_codebook_orthogonal_loss = orthogonal_reg_weight > 0
        self.orthogonal_reg_active_codes_only = orthogonal_reg_active_codes_only
        self.orthogonal_reg_max_codes = orthogonal_reg_max_codes
        self.stochastic_sample_codes, self.sample_codebook_temp = stochastic_sample_codes, sample_codebook_temp
        self.accept_image_fmap, self.accept_3d_fmap = accept_image_fmap, accept_3d_fmap
        self.channel_last = channel_last
        self.return_zeros_for_masked_padding = return_zeros_for_masked_padding
        self._codebook = Codebook(
            codebook_dim,
            codebook_size,
            heads if separate_codebook_per_head else 1,
            kmeans_init=kmeans_init,
            kmeans_iters=kmeans_iters,
            sync_kmeans=sync_kmeans,
            decay=decay,
            eps=eps,
            threshold_ema_dead_code=threshold_ema_dead_code,
            learnable=learnable_codebook or self.has_codebook_orthogonal_loss,
            ema_update=ema_update,
            manual_ema_update=manual_ema_update,
            use_cosine_sim=use_cosine_sim,
            sync_codebook=sync_codebook,
        )

    @property
    def ema_update(self) -> bool:
        return self._codebook.ema_update

    @property
    def codebook(self) -> Tensor:
        """`(K, D)`; `(H, K, D)` with `separate_codebook_per_head`. Assigning copies into it, not into the averages."""
        return self._codebook.embed if self.separate_codebook_per_head else self._codebook.embed[0]

    @codebook.setter
    def codebook(self, codes: Tensor) -> None:
        with torch.no_grad():
            self._codebook.embed.copy_(codes if self.separate_codebook_per_head else codes.unsqueeze(0))

    @property
    def _channels_first(self) -> bool:
        return not self.channel_last or self.accept_image_fmap or self.accept_3d_fmap
