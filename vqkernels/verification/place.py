"""The backend, device and sizes of a verification, and when two tensors are close."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# (rows, codes, channels) by device: rows and codes that no tile divides, one row, one code, channels below and between
# powers of two, and more channels than one tile has. The reference needs seconds for these.
REGIMES = ("common sizes", "three channels", "few rows", "one code", "257 channels")
SIZES = {
    "cuda": ((2048, 1024, 64), (1001, 333, 3), (5, 4099, 64), (300, 1, 64), (500, 700, 257)),
    "cpu": ((130, 170, 64), (101, 33, 3), (1, 300, 64), (30, 1, 64), (40, 50, 257)),
}


class Place(NamedTuple):
    """The backend to verify, and the device."""

    backend: str
    device: torch.device

    @property
    def sizes(self) -> tuple[tuple[int, int, int], ...]:
        """(rows, codes, channels). The first is the common size, at which every dtype is tested."""
        return SIZES["cuda" if self.device.type == "cuda" else "cpu"]


Case = tuple[str, Callable[[], bool]]  # a name, and a function that says whether the backend fulfils the contract


def close(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Within `tolerance` of the largest expected magnitude, and NaN exactly where expected."""
    expected = expected.to(found.dtype).double()  # rounded to the type of `found`
    found = found.double()
    if not found.isnan().equal(expected.isnan()):
        return False
    scale = expected.nan_to_num(0).abs().max().clamp_min(1e-300) if expected.numel() else 1.0
    return bool(((found - expected).nan_to_num(0).abs() <= tolerance * scale).all())
