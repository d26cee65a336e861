"""The temperature operand of an operator: a 0-d tensor, so that one compiled graph serves all values."""

from typing import Any

import torch
from torch import Tensor


def host_temperature(temperature: Tensor) -> float:
    """Its value, read from the host's memory without an operator."""
    if temperature.dtype != torch.float64 or temperature.dim() != 0 or temperature.device.type != "cpu":
        raise RuntimeError("temperature must be a 0-d float64 tensor on the CPU")
    value: Any = temperature.tolist()
    if not value > 0:
        raise RuntimeError("temperature must be positive")
    return value
