"""Checks of a layer's arguments. An error names the argument, what was expected and what came."""

import math
from typing import Any

from torch import Tensor


def check_size(name: str, value: Any) -> None:
    """A positive int; True is not one."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a positive int, got {value!r}")


def check_int(name: str, value: Any) -> None:
    """An int; True is not one."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{name} must be an int, got {value!r}")


def check_seed(value: Any) -> None:
    """None or an int that fits into int64."""
    if value is None:
        return
    check_int("seed", value)
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"seed must be None or an int of 64 bits, got {value!r}")


def is_number(value: Any) -> bool:
    """A finite int or float; True is not one."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def check_number(name: str, value: Any, least: float) -> None:
    """A finite number that is not below `least`."""
    if not is_number(value) or value < least:
        raise ValueError(f"{name} must be a finite number, at least {least}, got {value!r}")


def check_decay(name: str, value: Any) -> None:
    """None or a number in [0, 1)."""
    if value is not None and not (is_number(value) and 0 <= value < 1):
        raise ValueError(f"{name} must be None or in [0, 1), got {value!r}")


def check_positive(name: str, value: Any, below: float = math.inf, none: bool = False) -> None:
    """A positive number below a bound; or None where that is allowed."""
    if value is None and none:
        return
    if not is_number(value) or not 0 < value < below:
        bound = "" if below == math.inf else f" below {below}"
        raise ValueError(f"{name} must be {'None or ' if none else ''}a positive number{bound}, got {value!r}")


def check_flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")


def check_codes(codes: Any, **options: tuple[Any, int]) -> None:
    """Codes are a tensor, and options agree with their shape: each name maps to (given value, size in the shape)."""
    if not isinstance(codes, Tensor):
        raise TypeError(f"codes must be a tensor, got {type(codes).__name__}")
    for name, (given, size) in options.items():
        if given != size:
            raise ValueError(
                f"{name} must be {size} for codes of shape {list(codes.shape)}, got {given!r}: leave it out"
            )
