"""Sums and samples over the ranks of a process group: packed, of fixed shape, and the same bits everywhere.

Whether a group exists is checked when a function is called, never at construction. Nothing here depends on data: every
rank joins every collective with the same shapes, whatever rows it has.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Ranks:
    """The ranks that learn together: of the default process group, of a given one, or this one alone.

    Args:
        group: None for the default group wherever there is one, a `torch.distributed.ProcessGroup`, or False for no
            group. A rank that is not in the group learns alone.

    Copies share the group. Pickles hold its name; where no group has that name, the default group takes its place.
    """

    def __init__(self, group: Any = None) -> None:
        if dist.is_available() and group is dist.GroupMember.NON_GROUP_MEMBER:
            group = False
        if not (group is None or group is False or (dist.is_available() and isinstance(group, dist.ProcessGroup))):
            raise TypeError(
                "process_group must be None (the default group), False (no group) or a "
                f"torch.distributed.ProcessGroup, got {type(group).__name__}"
            )
        self.group: Any = group

    @property
    def size(self) -> int:
        """How many ranks learn together; 1 where there is no group."""
        if self.group is False or not (dist.is_available() and dist.is_initialized()):
            return 1
        return max(1, dist.get_world_size(self.group))

    @property
    def rank(self) -> int:
        """This process's number among them."""
        return dist.get_rank(self.group) if self.size > 1 else 0

    def sum(self, *parts: Tensor) -> list[Tensor]:
        """Every tensor summed over all ranks, in its own dtype, by one all-reduce of one packed float tensor.

        Packed in float32, or in float64 where a part is: an integer is exact up to 2^24 then.
        """
        if self.size == 1:
            return list(parts)
        dtype = torch.float64 if any(part.dtype == torch.float64 for part in parts) else torch.float32
        packed = torch.cat([part.detach().reshape(-1).to(dtype) for part in parts])
        dist.all_reduce(packed, group=self.group)
        unpacked = packed.split([part.numel() for part in parts])
        return [flat.view(part.shape).to(part.dtype) for flat, part in zip(unpacked, parts, strict=True)]

    def one_hot(self, value: Tensor) -> Tensor:
        """`(size,)` with `value` (0-d) at this rank's place: summed over ranks, the values of all of them."""
        mine = torch.arange(self.size, device=value.device) == self.rank
        return torch.where(mine, value, 0)

    def gather(self, part: Tensor, dim: int) -> Tensor:
        """Every rank's tensor, all of one shape and finite, side by side along `dim` in the order of the ranks."""
        if self.size == 1:
            return part
        gathered = part.new_zeros(self.size, *part.shape)
        gathered[self.rank] = part
        dist.all_reduce(gathered, group=self.group)  # adding zeros: exact
        return torch.cat(gathered.unbind(0), dim)

    def __deepcopy__(self, memo: dict) -> "Ranks":
        return self

    def __reduce__(self) -> tuple:
        named = self.group is not None and self.group is not False
        return _unpickled, (self.group.group_name if named else self.group,)

    def __repr__(self) -> str:
        return f"Ranks({self.group!r})"


def _unpickled(group: Any) -> Ranks:
    if isinstance(group, str):
        try:
            group = dist.distributed_c10d._resolve_process_group(group)  # type: ignore[arg-type]
        except (AttributeError, LookupError, RuntimeError, ValueError):
            group = None
    return Ranks(group)


DEFAULT = Ranks()


def global_rank() -> int:
    """This process's number in the default group; 0 where there is none."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """Ranks of the default process group; 1 where there is none."""
    return DEFAULT.size


def sum_over_ranks(*parts: Tensor) -> list[Tensor]:
    """`Ranks.sum` over the default process group."""
    return DEFAULT.sum(*parts)


def one_hot_rank(value: Tensor) -> Tensor:
    """`Ranks.one_hot` in the default process group."""
    return DEFAULT.one_hot(value)
