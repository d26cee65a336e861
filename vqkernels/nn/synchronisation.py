"""Sums and samples over the ranks of the default process group: packed, of fixed shape, and the same bits everywhere.

Whether a group exists is asked when a function is called, never at construction. Nothing here depends on data: every
rank joins every collective with the same shapes, whatever rows it has.
"""

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Ranks of the default process group; 1 where there is none."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number in the default group; 0 where there is none."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def sum_over_ranks(*parts: Tensor) -> list[Tensor]:
    """Every tensor summed over all ranks, in its own dtype, by one all-reduce of one packed float tensor.

    Packed in float32, or in float64 where a part is: an integer is exact up to 2^24 then.
    """
    if world_size() == 1:
        return list(parts)
    dtype = torch.float64 if any(part.dtype == torch.float64 for part in parts) else torch.float32
    packed = torch.cat([part.detach().reshape(-1).to(dtype) for part in parts])
    dist.all_reduce(packed)
    unpacked = packed.split([part.numel() for part in parts])
    return [flat.view(part.shape).to(part.dtype) for flat, part in zip(unpacked, parts, strict=True)]


def one_hot_rank(value: Tensor) -> Tensor:
    """`(world size,)` with `value` (0-d) at this rank's place: summed over ranks, the values of all of them."""
    mine = torch.arange(world_size(), device=value.device) == rank()
    return torch.where(mine, value, 0)


def gather_over_ranks(part: Tensor, dim: int) -> Tensor:
    """Every rank's tensor, all of one shape and finite, side by side along `dim` in the order of the ranks."""
    if world_size() == 1:
        return part
    gathered = part.new_zeros(world_size(), *part.shape)
    gathered[rank()] = part
    dist.all_reduce(gathered)  # adding zeros: exact
    return torch.cat(gathered.unbind(0), dim)
