"""The checks that every operation shares; bad input is one sentence: which argument, what was expected, what came.

While TorchScript traces, a size is a tensor, and comparing it would write this call's size into the graph: shapes are
not checked then.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..backends.options import QuantizeOptions, SearchOptions
from ..reference import METRICS as METRICS

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
GRADIENTS = ("straight_through", "rotation")
PRECISIONS = ("exact", "fast")


def check_rows(z: Tensor, codebook: Tensor, channel_dim: int) -> int:
    """Checks z against the codebook; returns `channel_dim` counted from the front."""
    if not isinstance(z, Tensor) or not isinstance(codebook, Tensor):
        raise TypeError(f"z and codebook must be tensors, got {type(z).__name__} and {type(codebook).__name__}")
    for name, x in (("z", z), ("codebook", codebook)):
        if x.dtype not in DTYPES:
            raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {x.dtype}")
        refuse_nested(name, x)
        if _in_forward_mode():
            _refuse_tangent(name, x)
    if codebook.device != z.device:
        raise ValueError(f"z and codebook must be on one device, got {z.device} and {codebook.device}")
    if codebook.dim() not in (2, 3):
        raise ValueError(f"codebook must be (K, D), or (H, K, D) for batched codebooks, got {_shape(codebook)}")
    batched = codebook.dim() == 3
    if z.dim() < 1 + batched:
        raise ValueError(f"z must have at least {1 + batched} dimensions for this codebook, got {_shape(z)}")
    if not -z.dim() <= channel_dim < z.dim():
        limits = f"[-{z.dim()}, {z.dim() - 1}]"
        raise ValueError(f"channel_dim must be in {limits} for z of shape {_shape(z)}, got {channel_dim}")
    channel_dim = channel_dim % z.dim()
    if batched and channel_dim == 0:
        raise ValueError("channel_dim must not be 0 with a batched codebook: axis 0 of z is the head")
    if torch.jit.is_tracing():
        return channel_dim
    if codebook.shape[-1] != z.shape[channel_dim]:
        raise ValueError(
            f"codebook of shape {_shape(codebook)} has {codebook.shape[-1]} channels, but z of shape {_shape(z)} has "
            f"{z.shape[channel_dim]} at channel_dim={channel_dim}"
        )
    if batched and codebook.shape[0] != z.shape[0]:
        raise ValueError(f"z must have {codebook.shape[0]} heads on axis 0 like the codebook, got {_shape(z)}")
    if codebook.shape[-2] == 0 or codebook.shape[-1] == 0:
        raise ValueError(f"codebook must hold at least one code of at least one channel, got {_shape(codebook)}")
    return channel_dim


def check_mask(mask: Tensor | None, z: Tensor, channel_dim: int) -> None:
    """A mask is bool, on z's device, and has z's shape without the channel axis; True means that the row counts."""
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"mask must be a bool tensor (True: the row counts), got {getattr(mask, 'dtype', type(mask))}")
    _check_per_row("mask", mask, z, channel_dim)


def check_indices(indices: Tensor | None, z: Tensor, channel_dim: int) -> None:
    """Indices are int64, on z's device, and have z's shape without the channel axis. Their range is not looked at."""
    if indices is None:
        return
    if not isinstance(indices, Tensor) or indices.dtype != torch.int64:
        raise TypeError(f"indices must be an int64 tensor, got {getattr(indices, 'dtype', type(indices))}")
    _check_per_row("indices", indices, z, channel_dim)


def check_levels(levels: Tensor | None, z: Tensor, channel_dim: int) -> None:
    """Numbers of levels are int64, on z's device, and have z's shape without the channel axis."""
    if levels is None:
        return
    if not isinstance(levels, Tensor) or levels.dtype != torch.int64:
        raise TypeError(f"levels must be an int64 tensor, got {getattr(levels, 'dtype', type(levels))}")
    _check_per_row("levels", levels, z, channel_dim)


def _check_per_row(name: str, x: Tensor, z: Tensor, channel_dim: int) -> None:
    if x.device != z.device:
        raise ValueError(f"{name} must be on z's device {z.device}, got {x.device}")
    if torch.jit.is_tracing():
        return
    expected = row_shape(z, channel_dim)
    if tuple(x.shape) != expected:
        raise ValueError(f"{name} must have z's shape without channels, {list(expected)}, got {_shape(x)}")


def refuse_nested(name: str, x: Tensor) -> None:
    """A nested tensor has no rows of one shape."""
    if x.is_nested:
        raise TypeError(
            f"{name} must be a dense tensor, got a nested one: pad it (torch.nested.to_padded_tensor(x, 0.0)), and "
            "give a layer the lengths, or a function a mask of the rows that count"
        )


def _refuse_tangent(name: str, x: Tensor) -> None:
    if forward_ad.unpack_dual(x).tangent is not None:
        raise RuntimeError(
            f"vqkernels does not support forward-mode derivatives, but {name} has a tangent: use torch.func.grad or "
            "torch.func.vjp instead of torch.func.jvp, jacfwd or hessian"
        )


def _in_forward_mode() -> bool:
    """Whether a tensor may have a tangent: asked first, because asking a tensor costs a microsecond."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    return getattr(forward_ad, "_current_level", 0) >= 0


def check_temperature(temperature: float | Tensor, zero: bool = False) -> Tensor:
    """A positive finite number, or where `zero` one of at least 0, as a 0-d float64 tensor on the CPU.

    Values are not looked at while compiling, so that one graph serves all of them.
    """
    compiling = torch.compiler.is_compiling()
    if isinstance(temperature, Tensor):
        if temperature.dtype != torch.float64 or temperature.dim() != 0 or temperature.device.type != "cpu":
            raise ValueError(
                "temperature must be a number or a 0-d float64 tensor on the CPU, got "
                f"{temperature.dtype} of shape {_shape(temperature)} on {temperature.device}"
            )
        if temperature.requires_grad:
            raise ValueError("temperature gets no gradient: give temperature.detach()")
    elif type(temperature) is bool or not isinstance(temperature, float | int | torch.SymFloat):
        raise ValueError(f"temperature must be {_TEMPERATURES[zero]}, got {temperature!r}")
    if not compiling:
        value: Any = temperature.tolist() if isinstance(temperature, Tensor) else temperature
        if not (0 <= value if zero else 0 < value) or value == math.inf:
            raise ValueError(f"temperature must be {_TEMPERATURES[zero]}, got {value!r}")
    if isinstance(temperature, Tensor):
        return temperature
    if compiling:  # the one form in which a number of changing value stays one graph
        return torch.ones((), dtype=torch.float64, device="cpu") * temperature
    return torch.full((), temperature, dtype=torch.float64, device="cpu")


_TEMPERATURES = {False: "a positive finite number", True: "a finite number of at least 0"}


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """One of a few names, or a sentence that lists them."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_options(options: QuantizeOptions | SearchOptions, gradient: str = GRADIENTS[0]) -> None:
    """The choices among names; `check_rows` looks at the axis of channels. One call where all are right."""
    if options.metric in METRICS and gradient in GRADIENTS and options.precision in PRECISIONS:
        return
    check_choice("metric", options.metric, METRICS)
    check_choice("gradient", gradient, GRADIENTS)
    check_choice("precision", options.precision, PRECISIONS)


def seed_tensor(seed: int | Tensor, device: torch.device) -> Tensor:
    """A seed as the operators want it: 0-d int64 on the device. An int is put there; a tensor is not read."""
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.dim() != 0 or seed.device != device:
            raise ValueError(
                f"seed must be an int, or a 0-d int64 tensor on z's device {device}, got {seed.dtype} of shape "
                f"{_shape(seed)} on {seed.device}"
            )
        return seed
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise TypeError(f"seed must be an int or a 0-d int64 tensor, got {type(seed).__name__}")
    return torch.full((), seed, dtype=torch.int64, device=device)


def row_shape(z: Tensor, channel_dim: int) -> tuple[int, ...]:
    """z's shape without the channel axis."""
    return (*z.shape[:channel_dim], *z.shape[channel_dim + 1 :])


def _shape(x: Tensor) -> list[int]:
    return list(x.shape)
