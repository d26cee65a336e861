"""The checks that every operation shares; bad input is one sentence: which argument, what was expected, what came."""

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
METRICS = ("euclidean", "dot", "cosine")
GRADIENTS = ("straight_through", "rotation")
PRECISIONS = ("exact", "fast")


def check_rows(z: Tensor, codebook: Tensor, channel_dim: int) -> int:
    """Checks z against the codebook; returns `channel_dim` counted from the front."""
    if not isinstance(z, Tensor) or not isinstance(codebook, Tensor):
        raise TypeError(f"z and codebook must be tensors, got {type(z).__name__} and {type(codebook).__name__}")
    for name, x in (("z", z), ("codebook", codebook)):
        if x.dtype not in DTYPES:
            raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {x.dtype}")
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
    expected = row_shape(z, channel_dim)
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"mask must be a bool tensor (True: the row counts), got {getattr(mask, 'dtype', type(mask))}")
    if tuple(mask.shape) != expected:
        raise ValueError(f"mask must have z's shape without channels, {list(expected)}, got {_shape(mask)}")
    if mask.device != z.device:
        raise ValueError(f"mask must be on z's device {z.device}, got {mask.device}")


def check_indices(indices: Tensor | None, z: Tensor, channel_dim: int) -> None:
    """Indices are int64, on z's device, and have z's shape without the channel axis. Their range is not looked at."""
    if indices is None:
        return
    expected = row_shape(z, channel_dim)
    if not isinstance(indices, Tensor) or indices.dtype != torch.int64:
        raise TypeError(f"indices must be an int64 tensor, got {getattr(indices, 'dtype', type(indices))}")
    if tuple(indices.shape) != expected:
        raise ValueError(f"indices must have z's shape without channels, {list(expected)}, got {_shape(indices)}")
    if indices.device != z.device:
        raise ValueError(f"indices must be on z's device {z.device}, got {indices.device}")


def check_levels(levels: Tensor | None, z: Tensor, channel_dim: int) -> None:
    """Numbers of levels are int64, on z's device, and have z's shape without the channel axis."""
    if levels is None:
        return
    expected = row_shape(z, channel_dim)
    if not isinstance(levels, Tensor) or levels.dtype != torch.int64:
        raise TypeError(f"levels must be an int64 tensor, got {getattr(levels, 'dtype', type(levels))}")
    if tuple(levels.shape) != expected:
        raise ValueError(f"levels must have z's shape without channels, {list(expected)}, got {_shape(levels)}")
    if levels.device != z.device:
        raise ValueError(f"levels must be on z's device {z.device}, got {levels.device}")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """One of a few names, or a sentence that lists them."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


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
