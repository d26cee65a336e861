"""Several processes that train together, started by `torchrun`: who writes, what they agree on, whose rows are whose.

With one process nothing here does anything. The first process alone reads the run directory and writes to it. All get
its result or its error, so that none waits for one that has left.
"""

import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vqkernels.training.config import Parallel
from vqkernels.training.errors import ReportedElsewhere, UserError
from vqkernels.training.sharding import shard

T = TypeVar("T")


class Ranks:
    """The processes of a run.

    Args:
        rank: the number of this one.
        number: how many there are.
        device: what this one computes on.
    """

    def __init__(self, rank: int, number: int, device: torch.device) -> None:
        self.rank, self.number, self.device = rank, number, device
        # Flags and metrics are on the CPU: agreeing on them does not wait for the GPU's queue.
        self._group = dist.new_group(backend="gloo") if number > 1 and device.type != "cpu" else None

    @property
    def first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def share(self, indices: Tensor) -> Tensor:
        """This process's part of a batch; the parts are equally large.

        Raises:
            UserError: the batch cannot be divided equally.
        """
        if len(indices) % self.number:
            raise UserError(f"a batch of {len(indices)} images cannot be shared by {self.number} processes equally")
        return indices.chunk(self.number)[self.rank]

    def wrap(self, model: nn.Module, parallel: Parallel = "ddp") -> nn.Module:
        """The model with gradients averaged over the processes: itself wrapped, or a sharded copy.

        Codebooks sum their statistics themselves.
        """
        if self.number == 1:
            return model
        if parallel == "fsdp":
            return shard(model, self.device, self.number)
        with warnings.catch_warnings():  # torch 2.13 has another name for the argument, which 2.10 does not know
            warnings.simplefilter("ignore", FutureWarning)
            return DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)

    def on_first(self, action: Callable[[], T]) -> T | None:
        """Runs the action on the first process; the others get None, or its error."""
        result, problem = None, None
        if self.first:
            try:
                result = action()
            except UserError as error:
                if self.number == 1:
                    raise
                problem = error
        if self.number > 1:
            message = [None if problem is None else str(problem)]
            dist.broadcast_object_list(message, src=0, group=self._group)
            if problem is not None:
                raise problem
            if message[0] is not None:
                raise ReportedElsewhere(message[0])
        return result

    def any(self, flag: bool) -> bool:
        """Whether the flag is True on one of them."""
        if self.number == 1:
            return flag
        flags = torch.tensor([int(flag)])
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self._group)
        return bool(flags)

    def mean(self, values: Mapping[str, float]) -> dict[str, float]:
        """The mean of every value over the processes."""
        if self.number == 1:
            return dict(values)
        packed = torch.tensor(list(values.values()), dtype=torch.float64)
        dist.all_reduce(packed, group=self._group)
        return dict(zip(values, (packed / self.number).tolist(), strict=True))

    def gather(self, value: T) -> list[T]:
        """The value of every process, in their order."""
        if self.number == 1:
            return [value]
        gathered: list[Any] = [None] * self.number
        dist.all_gather_object(gathered, value, group=self._group)
        return gathered


@contextmanager
def joined(device: torch.device) -> Iterator[Ranks]:
    """The processes that `torchrun` started, in a new process group; this one alone without it.

    A group that exists already is used and stays.
    """
    number = int(os.environ.get("WORLD_SIZE", 1))
    if not dist.is_available() or (number == 1 and not dist.is_initialized()):
        yield Ranks(0, 1, device)
        return
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    begun = dist.is_initialized()
    if not begun:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), device)
    finally:
        if not begun:
            dist.destroy_process_group()
