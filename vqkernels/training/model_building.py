"""Models from a configuration and the format of the images, in the memory format in which they are trained."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from vqkernels.backends import registry
from vqkernels.models import VAE, VQVAE, PixelCNN, Prior, TransformerPrior
from vqkernels.models.likelihoods import Likelihood
from vqkernels.training.acceleration import place
from vqkernels.training.checkpoint import Export, ImageFormat, read_export
from vqkernels.training.config import RunConfig
from vqkernels.training.errors import UserError

M = TypeVar("M", bound=nn.Module)


def pick_device(name: str) -> torch.device:
    """`auto`, or a device of torch.

    Raises:
        UserError: there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"the device {name} is not available: {str(error).splitlines()[0]}") from error
    return device


def check_backend(name: str, device: torch.device) -> None:
    """Raise UserError unless this backend can compute on the device."""
    try:
        registry.resolve(name, device)
    except (RuntimeError, ValueError) as error:
        raise UserError(str(error)) from error


def build_vqvae(
    config: RunConfig, images: ImageFormat, device: torch.device, likelihood: Likelihood | None = None
) -> VQVAE:
    """The VQ-VAE, on the device; a likelihood that is given goes before that of the configuration."""
    chosen = config.vqvae
    model = VQVAE(
        images.channels,
        hidden_channels=chosen.hidden_channels,
        code_dim=chosen.code_dim,
        codebook_size=chosen.codebook_size,
        downsamplings=chosen.downsamplings,
        residual_blocks=chosen.residual_blocks,
        residual_channels=chosen.residual_channels,
        beta=chosen.beta,
        ema_decay=chosen.ema_decay,
        init=chosen.init,
        revive=chosen.revive,
        likelihood=chosen.likelihood if likelihood is None else likelihood,
        backend=config.backend,
    )
    return place(model, config.speed, device)


def build_vae(
    config: RunConfig, images: ImageFormat, device: torch.device, likelihood: Likelihood | None = None
) -> VAE:
    """The VAE with the sizes that the configuration gives the VQ-VAE; likelihood as in `build_vqvae`.

    Raises:
        UserError: there is no likelihood.
    """
    chosen = config.vqvae
    distribution = chosen.likelihood if likelihood is None else likelihood
    if distribution is None:
        raise UserError("a VAE needs vqvae.likelihood, but it is not set")
    model = VAE(
        images.channels,
        hidden_channels=chosen.hidden_channels,
        code_dim=chosen.code_dim,
        downsamplings=chosen.downsamplings,
        residual_blocks=chosen.residual_blocks,
        residual_channels=chosen.residual_channels,
        likelihood=distribution,
    )
    return place(model, config.speed, device)


def build_prior(config: RunConfig, images: ImageFormat, vqvae: VQVAE, device: torch.device) -> Prior:
    """The prior of the codes of a VQ-VAE, on the device; a transformer has positions for grids up to one image's."""
    chosen = config.prior
    num_classes = len(images.class_names) or None
    label_dropout = chosen.label_dropout if images.class_names else 0.0
    if chosen.model == "transformer":
        return TransformerPrior(
            config.vqvae.codebook_size,
            hidden_channels=chosen.hidden_channels,
            num_layers=chosen.num_layers,
            num_heads=chosen.num_heads,
            num_classes=num_classes,
            max_grid=vqvae.latent_size((images.height, images.width)),
            dropout=chosen.dropout,
            label_dropout=label_dropout,
        ).to(device)
    return PixelCNN(
        config.vqvae.codebook_size,
        hidden_channels=chosen.hidden_channels,
        num_layers=chosen.num_layers,
        num_classes=num_classes,
        head_channels=chosen.head_channels,
        dropout=chosen.dropout,
        label_dropout=label_dropout,
    ).to(device)


def load_vqvae(path: Path, device: torch.device) -> tuple[VQVAE, Export]:
    """The trained VQ-VAE of a run directory, in eval mode.

    Raises:
        UserError: there is no run, or it has no checkpoint yet.
    """
    export = read_export(path)
    state = _state(export, "vqvae")
    if not state:
        raise UserError(f"the run {path} holds no VQ-VAE, but the weights of another model at stage '{export.stage}'")
    layers = max(export.config.vqvae.downsamplings, export.config.vqvae.residual_blocks)
    vqvae = _filled(lambda where: build_vqvae(export.config, export.images, where), device, state, layers, path)
    return vqvae.eval(), export


def load_models(path: Path, device: torch.device) -> tuple[VQVAE, Prior, Export]:
    """The trained models of a run directory, in eval mode.

    Raises:
        UserError: there is no run, or it has no prior yet.
    """
    vqvae, export = load_vqvae(path, device)
    state = _state(export, "prior")
    if not state:
        raise UserError(
            f"the run {path} has no prior yet (its VQ-VAE is at step {export.step}); "
            f"train it with 'vqkernels train --out {path} --resume'"
        )
    layers = export.config.prior.num_layers
    prior = _filled(lambda where: build_prior(export.config, export.images, vqvae, where), device, state, layers, path)
    return vqvae, prior.eval(), export


def _filled(
    build: Callable[[torch.device], M], device: torch.device, state: dict[str, torch.Tensor], layers: int, path: Path
) -> M:
    """The model with these weights, built on the device.

    It is first built without memory: a file whose configuration promises more than its tensors costs nothing.
    """
    try:
        if layers > len(state):
            raise ValueError(f"its configuration has {layers} layers, but there are {len(state)} tensors")
        with (nowhere := torch.device("meta")):
            shapes = {name: x.shape for name, x in build(nowhere).state_dict().items()}
        for name in shapes.keys() - state.keys():
            if name.endswith(".seed"):  # the quantizer's, which older runs do not have
                del shapes[name]
        if shapes != {name: x.shape for name, x in state.items()}:
            raise ValueError("its tensors are not those of its configuration")
        model = build(device)
        model.load_state_dict(state)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"{path / 'model.safetensors'} is damaged: {str(error).splitlines()[0]}") from error
    return model


def _state(export: Export, model: str) -> dict[str, torch.Tensor]:
    prefix = f"{model}."
    return {name.removeprefix(prefix): x for name, x in export.tensors.items() if name.startswith(prefix)}
