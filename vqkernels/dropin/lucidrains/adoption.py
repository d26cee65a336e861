"""Turns an instance of lucidrains' layers into ours and back, with the same tensors.

Our layer takes the peer's Parameters, buffers and projections, the same objects, so an optimizer continues. On the way
back the peer gets the objects of our layer, which may be others after a move of the model. Checkpoints need neither:
the state dicts are the same.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..adoption import check_unhooked, share_attributes
from .layer import VectorQuantize
from .options import refuse
from .residual import GroupedResidualVQ, ResidualVQ
from .simvq import SimVQ

# Attributes of the peer's VectorQuantize that are arguments of the same name.
_SAME_NAME = (
    "dim",
    "codebook_size",
    "heads",
    "separate_codebook_per_head",
    "freeze_codebook",
    "use_cosine_sim",
    "channel_last",
    "accept_image_fmap",
    "accept_3d_fmap",
    "commitment_weight",
    "commitment_use_cross_entropy_loss",
    "orthogonal_reg_weight",
    "orthogonal_reg_active_codes_only",
    "orthogonal_reg_max_codes",
    "codebook_diversity_loss_weight",
    "in_place_codebook_optimizer",
    "rotation_trick",
    "directional_reparam",
    "directional_reparam_variance",
    "ema_update",
    "learnable_codebook",
    "sync_update_v",
    "return_zeros_for_masked_padding",
    "route_gradients_to_input",
)
_OF_CODEBOOK = (
    "decay",
    "eps",
    "kmeans_iters",
    "threshold_ema_dead_code",
    "manual_ema_update",
    "vq_bridge",
    "affine_param",
    "sample_codebook_temp",
)
# What a user may set on a codebook while it trains.
_SETTINGS = ("decay", "eps", "threshold_ema_dead_code", "reset_cluster_size")


def _options(peer: Any) -> dict[str, Any]:
    """Arguments with which our layer is built as `peer` was."""
    codebook = peer._codebook
    options = {name: getattr(peer, name) for name in _SAME_NAME}
    options |= {name: getattr(codebook, name) for name in _OF_CODEBOOK}
    sampling = getattr(codebook.gumbel_sample, "keywords", None)
    if sampling is None or set(sampling) != {"stochastic", "straight_through"}:
        raise ValueError("a gumbel_sample function that you defined is not supported: keep the peer's layer")
    if codebook.reset_cluster_size != codebook.threshold_ema_dead_code:
        refuse(reset_cluster_size=codebook.reset_cluster_size)
    # The peer decides at construction. A layer built before the process group has False; ours then asks each time.
    synced = True if codebook.use_ddp else None
    return options | {
        "codebook_dim": codebook.embed.shape[-1],
        "layernorm_after_project_in": isinstance(peer.project_in, nn.Sequential),
        "stochastic_sample_codes": sampling["stochastic"],
        "straight_through": sampling["straight_through"],
        "sync_codebook": synced,
        "sync_kmeans": synced is None or codebook.sample_fn.__name__ == "sample_vectors_distributed",
    }


def _share(source: nn.Module, target: nn.Module) -> None:
    """Gives `target` the Parameters and buffers of `source`, the same objects."""
    for name, parameter in source._parameters.items():
        if name in target._parameters:
            target._parameters[name] = parameter
    for name, buffer in source._buffers.items():
        if name in target._buffers and name not in target._non_persistent_buffers_set:
            target._buffers[name] = buffer


def adopt_vector_quantize(peer: Any) -> VectorQuantize:
    """Our layer over the tensors of a `vector_quantize_pytorch.VectorQuantize`.

    Raises:
        ValueError: names the option that has no counterpart.
    """
    projections = () if peer.has_projections else ("project_in", "project_out")
    _check_unchanged(peer, "_codebook")
    check_unhooked(peer, "_codebook", *projections)
    if peer._codebook.training != peer.training:
        raise ValueError("its module '_codebook' is in another training mode than the layer")
    options = _options(peer)
    with torch.device("meta"):  # neither memory nor random numbers
        ours = VectorQuantize(**options)
    ours.project_in, ours.project_out = peer.project_in, peer.project_out
    _share(peer._codebook, ours._codebook)
    ours._codebook._look()
    share_attributes(peer, ours)
    ours.training = ours._codebook.training = peer.training
    return ours


def adopt_residual_vq(peer: Any) -> ResidualVQ:
    """Our layer over the tensors of a `vector_quantize_pytorch.ResidualVQ`; errors as in `adopt_vector_quantize`."""
    levels_of_peer = [f"layers.{number}" for number in range(len(peer.layers))]
    _check_unchanged(peer, *levels_of_peer)
    check_unhooked(peer, *levels_of_peer, *(() if peer.has_projections else ("project_in", "project_out")))
    beams = {"beam_size": peer.beam_size, "eval_beam_size": peer.eval_beam_size}
    levels = [adopt_vector_quantize(layer) for layer in peer.layers]
    with torch.device("meta"):
        ours = ResidualVQ(
            dim=peer.project_in.in_features if peer.has_projections else peer.codebook_dim,
            codebook_size=tuple(peer.codebook_sizes),
            codebook_dim=peer.codebook_dim,
            shared_codebook=peer.shared_codebook,
            diveq=peer.diveq,
            quantize_dropout=peer.quantize_dropout,
            quantize_dropout_cutoff_index=peer.quantize_dropout_cutoff_index,
            quantize_dropout_multiple_of=peer.quantize_dropout_multiple_of,
            accept_image_fmap=peer.accept_image_fmap,
            implicit_neural_codebook=peer.implicit_neural_codebook,
            quant_grad_frac=peer.quant_grad_frac,
            return_zeros_for_masked_padding=peer.return_zeros_for_masked_padding,
            **beams,
        )
    ours.layers = nn.ModuleList(levels)
    if peer.shared_codebook:
        for level in levels[1:]:
            level._codebook = levels[0]._codebook
    ours.project_in, ours.project_out = peer.project_in, peer.project_out
    share_attributes(peer, ours)
    ours.training, ours.layers.training = peer.training, peer.layers.training
    return ours


def adopt_grouped_residual_vq(peer: Any) -> GroupedResidualVQ:
    """Our layer over the tensors of a `vector_quantize_pytorch.GroupedResidualVQ`; errors as in
    `adopt_vector_quantize`."""
    names = [f"rvqs.{number}" for number in range(len(peer.rvqs))]
    _check_unchanged(peer, *names)
    check_unhooked(peer, *names)
    groups = [adopt_residual_vq(rvq) for rvq in peer.rvqs]
    shape = {"dim": peer.dim, "groups": peer.groups, "accept_image_fmap": peer.accept_image_fmap}
    with torch.device("meta"):
        ours = GroupedResidualVQ(**shape, num_quantizers=1, codebook_size=1)
    ours.rvqs = nn.ModuleList(groups)
    share_attributes(peer, ours)
    ours.training, ours.rvqs.training = peer.training, peer.rvqs.training
    return ours


def adopt_sim_vq(peer: Any) -> SimVQ:
    """Our layer over the tensors of a `vector_quantize_pytorch.SimVQ`."""
    with torch.device("meta"):
        ours = SimVQ(
            1,
            peer.codebook_size,
            codebook_transform=peer.code_transform,
            channel_first=peer.channel_first,
            rotation_trick=peer.rotation_trick,
            input_to_quantize_commit_loss_weight=peer.input_to_quantize_commit_loss_weight,
            commitment_weight=peer.commitment_weight,
        )
    _share(peer, ours)
    share_attributes(peer, ours)
    ours.training = peer.training
    return ours


def release_vector_quantize(ours: Any, peer: Any) -> None:
    """Gives the peer the state, the settings and the training mode of our layer."""
    _share(ours._codebook, peer._codebook)
    for name in _SETTINGS:
        setattr(peer._codebook, name, getattr(ours._codebook, name))
    share_attributes(ours, peer)
    peer.training = peer._codebook.training = ours.training


def release_residual_vq(ours: Any, peer: Any) -> None:
    """As `release_vector_quantize`, for every level."""
    for level, layer in zip(ours.layers, peer.layers, strict=True):
        release_vector_quantize(level, layer)
    share_attributes(ours, peer)
    peer.training, peer.layers.training = ours.training, ours.layers.training


def release_grouped_residual_vq(ours: Any, peer: Any) -> None:
    """As `release_vector_quantize`, for every level of every group."""
    for group, rvq in zip(ours.rvqs, peer.rvqs, strict=True):
        release_residual_vq(group, rvq)
    share_attributes(ours, peer)
    peer.training, peer.rvqs.training = ours.training, ours.rvqs.training


def release_sim_vq(ours: Any, peer: Any) -> None:
    """Gives the peer the frozen codebook of our layer, its settings and its training mode."""
    _share(ours, peer)
    share_attributes(ours, peer)
    peer.training = ours.training


def _check_unchanged(peer: nn.Module, *names: str) -> None:
    """Refuses a peer with a part in `names`, which ours replaces, of a class that a user defined or with a new forward.

    Raises:
        ValueError: names the part.
    """
    for name in names:
        part = peer.get_submodule(name)
        if not type(part).__module__.startswith(f"{_PACKAGE}."):
            raise ValueError(f"its module '{name}' is a {type(part).__qualname__}, a class of another package")
        if part.__dict__.get("forward") is not None or part.__dict__.get("_compiled_call_impl") is not None:
            raise ValueError(f"the forward of its module '{name}' is replaced or compiled")


def _check_tensors(peer: nn.Module, ours: nn.Module) -> None:
    """Refuses a peer that saves a tensor which ours does not save: one that a user added would be lost."""
    mine = ours.state_dict(keep_vars=True)
    for name, tensor in peer.state_dict(keep_vars=True).items():
        if mine.get(name) is not tensor:
            raise ValueError(f"its tensor '{name}' was added: the class does not have it")


def _of_known_version(adopt: Callable[[nn.Module], nn.Module]) -> Callable[[nn.Module], nn.Module]:
    """Also refuses a layer of a version without an option of 1.32, and a layer to which a tensor was added."""

    def adopt_known(peer: nn.Module) -> nn.Module:
        try:
            ours = adopt(peer)
        except AttributeError as error:
            raise ValueError(f"this version of vector-quantize-pytorch is not known here: {error}") from error
        _check_tensors(peer, ours)
        return ours

    return adopt_known


_PACKAGE = "vector_quantize_pytorch"
ADAPTERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    f"{_PACKAGE}.vector_quantize_pytorch.VectorQuantize": _of_known_version(adopt_vector_quantize),
    f"{_PACKAGE}.residual_vq.ResidualVQ": _of_known_version(adopt_residual_vq),
    f"{_PACKAGE}.residual_vq.GroupedResidualVQ": _of_known_version(adopt_grouped_residual_vq),
    f"{_PACKAGE}.sim_vq.SimVQ": _of_known_version(adopt_sim_vq),
}
RELEASERS: dict[str, Callable[[nn.Module, nn.Module], None]] = {
    f"{_PACKAGE}.vector_quantize_pytorch.VectorQuantize": release_vector_quantize,
    f"{_PACKAGE}.residual_vq.ResidualVQ": release_residual_vq,
    f"{_PACKAGE}.residual_vq.GroupedResidualVQ": release_grouped_residual_vq,
    f"{_PACKAGE}.sim_vq.SimVQ": release_sim_vq,
}
