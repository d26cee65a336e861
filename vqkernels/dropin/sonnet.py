"""Checkpoints of Sonnet's `VectorQuantizer` and `VectorQuantizerEMA`, to and from `vqkernels.nn.VectorQuantizer`.

Our layer is Sonnet's with other names: the same losses (van den Oord et al. 2017), and the same unbiased moving
averages. Our buffers are Sonnet's hidden values; Sonnet also saves them divided by 1 - decay^t. Sonnet keeps codes in
columns, (D, K).
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..nn.vector_quantizer import VectorQuantizer


def from_sonnet(
    variables: Mapping[str, Any],
    *,
    commitment_cost: float,
    decay: float | None = None,
    channel_dim: int = -1,
) -> VectorQuantizer:
    """A layer with the state of a Sonnet quantizer.

    Args:
        variables: arrays or tensors by Sonnet's names, without the name of the module: `embeddings (D, K)`; of a
            `VectorQuantizerEMA` also `ema_cluster_size/hidden (K,)`, `ema_dw/hidden (D, K)` and
            `ema_cluster_size/counter ()`. Suffixes like `:0` and other names (`.../average`, `.../counter`) are
            ignored.
        commitment_cost: of the module; our beta.
        decay: of a `VectorQuantizerEMA`; None for a `VectorQuantizer`.
        channel_dim: of the layer; Sonnet's channels are last.

    Raises:
        ValueError: a variable is missing or of another shape, or `decay` does not fit the variables.
    """
    named = {name.partition(":")[0]: torch.as_tensor(value) for name, value in variables.items()}
    codes = _take(named, "embeddings", 2)
    dim, size = codes.shape
    averaged = "ema_dw/hidden" in named
    if averaged != (decay is not None):
        kind = "VectorQuantizerEMA: give its decay" if averaged else "VectorQuantizer without averages: decay is None"
        raise ValueError(f"the variables are of a {kind}, got decay={decay}")
    layer = VectorQuantizer(dim, size, beta=commitment_cost, ema_decay=decay, channel_dim=channel_dim)
    with torch.no_grad():
        layer.codebook.copy_(codes.t())
        if averaged:
            layer.ema_counts.copy_(_take(named, "ema_cluster_size/hidden", 1))
            layer.ema_sums.copy_(_take(named, "ema_dw/hidden", 2).t())
            layer.ema_steps.copy_(_take(named, "ema_cluster_size/counter", 0))
    return layer


def to_sonnet(layer: VectorQuantizer) -> dict[str, Tensor]:
    """The variables of the Sonnet quantizer with the layer's state; float32, counters int64.

    Raises:
        ValueError: the layer has heads, projections or another metric, which Sonnet's does not have.
    """
    for name, fits in (
        ("heads", layer.heads == 1),
        ("codebook_dim", layer.project_in is None),
        ("metric", layer.metric == "euclidean"),
    ):
        if not fits:
            raise ValueError(f"Sonnet's quantizer has no {name}={getattr(layer, name)!r}")
    variables = {"embeddings": layer.codebook.detach().t().clone()}
    if layer.ema_decay is None:
        return variables
    unbiased = 1 - layer.ema_decay ** layer.ema_steps.to(torch.float64)
    for name, hidden in (("ema_cluster_size", layer.ema_counts), ("ema_dw", layer.ema_sums.t())):
        variables[f"{name}/hidden"] = hidden.clone()
        average = torch.where(unbiased > 0, hidden / unbiased, 0.0)
        variables[f"{name}/average"] = average.to(hidden.dtype)
        variables[f"{name}/counter"] = layer.ema_steps.clone()
    return variables


def _take(named: Mapping[str, Tensor], name: str, axes: int) -> Tensor:
    value = named.get(name)
    if value is None or value.dim() != axes:
        came = "no such variable" if value is None else f"shape {list(value.shape)}"
        raise ValueError(f"variables must hold '{name}' with {axes} axes, got {came}")
    return value
