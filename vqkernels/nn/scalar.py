"""Numbers of a layer that may change while it trains."""

from collections.abc import Callable
from typing import Any

import torch


class Scalar:
    """An attribute that reads as a float and is kept as a 0-d float64 tensor on the CPU, or None.

    Operators take the tensor, `layer._name` for the attribute `name`: one compiled graph serves every value, and
    nothing waits for a device.

    Args:
        check: called with the name and a new value; raises where the layer does not take it.
    """

    def __init__(self, check: Callable[[str, Any], None]) -> None:
        self._check = check

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, layer: Any, owner: type | None = None) -> Any:
        if layer is None:
            return self
        kept = layer.__dict__[f"_{self._name}"]
        return None if kept is None else kept.item()

    def __set__(self, layer: Any, value: Any) -> None:
        self._check(self._name, value)
        kept = layer.__dict__.get(f"_{self._name}")
        if kept is None and value is not None and f"_{self._name}" in layer.__dict__:
            raise ValueError(f"{self._name} was None when the layer was built, got {value!r}: build the layer with it")
        if value is None or kept is None:
            kept = None if value is None else torch.full((), value, dtype=torch.float64, device="cpu")
            layer.__dict__[f"_{self._name}"] = kept
        else:
            kept.fill_(value)
