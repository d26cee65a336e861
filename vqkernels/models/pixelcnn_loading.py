"""Checkpoints of the GatedPixelCNN that PyTorch VQ-VAE repositories share, as a `PixelCNN`."""

from collections.abc import Mapping

import torch
from torch import Tensor

from vqkernels.models.pixelcnn import PixelCNN


def from_gated_pixelcnn(state: Mapping[str, Tensor], *, dropout: float = 0.0, label_dropout: float = 0.0) -> PixelCNN:
    """A prior with the weights, and so the logits, of a GatedPixelCNN.

    Its sizes are read off the weights. The taps that its first layer sets to zero in every forward do not exist here;
    its one class bias becomes that of both stacks.

    Args:
        state: the state_dict, with keys `embedding.weight`, `layers.{i}.vert_stack.weight`, `output_conv.2.bias`, ...;
            a prefix such as `module.` before all of them is taken off.
        dropout, label_dropout: of the prior that is returned, for training on.

    Raises:
        ValueError: a key is missing or not known, or a weight has an unexpected shape.
    """
    prefix = next((key.removesuffix("embedding.weight") for key in state if _is_embedding(key)), None)
    if prefix is None:
        raise ValueError("the checkpoint is of no GatedPixelCNN: it has no embedding.weight")
    outside = [key for key in state if not key.startswith(prefix)]
    if outside:
        raise ValueError(f"the checkpoint has a key that no GatedPixelCNN has: {outside[0]}")
    theirs = {key.removeprefix(prefix): value for key, value in state.items()}
    count = len({key.split(".")[1] for key in theirs if key.startswith("layers.")})
    missing = [key for key in _keys(count) if key not in theirs]
    if missing or count == 0:
        raise ValueError(f"the checkpoint is of no GatedPixelCNN: it has no {(missing or ['layers.0'])[0]}")
    unknown = sorted(set(theirs) - set(_keys(count)))
    if unknown:
        raise ValueError(f"the checkpoint has a key that no GatedPixelCNN has: {unknown[0]}")
    num_codes, channels = theirs["embedding.weight"].shape
    model = PixelCNN(
        num_codes,
        hidden_channels=channels,
        num_layers=count,
        num_classes=len(theirs["layers.0.class_cond_embedding.weight"]),
        kernel_size=theirs["layers.1.vert_stack.weight"].shape[3] if count > 1 else 3,
        first_kernel_size=theirs["layers.0.vert_stack.weight"].shape[3],
        head_channels=len(theirs["output_conv.0.bias"]),
        head_activation=False,
        dropout=dropout,
        label_dropout=label_dropout,
    )
    ours = {"embedding.weight": theirs["embedding.weight"]}
    for layer in range(count):
        old = new = f"layers.{layer}."
        bias = theirs[f"{old}class_cond_embedding.weight"]
        ours[f"{new}class_bias.weight"] = torch.cat([bias, bias], dim=1)
        taps = theirs[f"{old}vert_stack.weight"].shape[2] - (layer == 0)  # mask A has one row and one column less
        ours[f"{new}vertical.weight"] = theirs[f"{old}vert_stack.weight"][:, :, :taps]
        ours[f"{new}horizontal.weight"] = theirs[f"{old}horiz_stack.weight"][:, :, :, :taps]
        ours[f"{new}vertical.bias"] = theirs[f"{old}vert_stack.bias"]
        ours[f"{new}horizontal.bias"] = theirs[f"{old}horiz_stack.bias"]
        for name, source in (("vertical_to_horizontal", "vert_to_horiz"), ("output", "horiz_resid")):
            ours[f"{new}{name}.weight"] = theirs[f"{old}{source}.weight"]
            ours[f"{new}{name}.bias"] = theirs[f"{old}{source}.bias"]
    for kind in ("weight", "bias"):
        ours[f"head.1.{kind}"], ours[f"head.3.{kind}"] = (theirs[f"output_conv.{number}.{kind}"] for number in (0, 2))
    for key, value in model.state_dict().items():
        if ours[key].shape != value.shape:
            raise ValueError(
                f"{key} must have shape {tuple(value.shape)}, but the checkpoint gives {tuple(ours[key].shape)}"
            )
    model.load_state_dict(ours)
    return model.to(theirs["embedding.weight"].dtype)


def _is_embedding(key: str) -> bool:
    return key == "embedding.weight" or (key.endswith(".embedding.weight") and "layers." not in key)


def _keys(layers: int) -> list[str]:
    keys = ["embedding.weight"]
    for layer in range(layers):
        keys.append(f"layers.{layer}.class_cond_embedding.weight")
        for name in ("vert_stack", "vert_to_horiz", "horiz_stack", "horiz_resid"):
            keys += [f"layers.{layer}.{name}.weight", f"layers.{layer}.{name}.bias"]
    return keys + [f"output_conv.{number}.{kind}" for number in (0, 2) for kind in ("weight", "bias")]
