"""FSDP2: every process holds a part of the weights, their gradients and the optimizer's state.

What is trained is a sharded copy. The whole model stays beside it on the CPU, and is updated when it is
needed: for evaluations, pictures, checkpoints and at the end. Checkpoints are those of one process, weights and
optimizer alike, so a run may change its number of processes and its way to use them.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn


def shard(model: nn.Module, device: torch.device, number: int) -> nn.Module:
    """A copy whose parameters are shared by `number` processes; the model itself goes to the CPU.

    The blocks of its lists are gathered one at a time, the rest together. All must call it, with equal weights.
    """
    from torch.distributed.device_mesh import init_device_mesh  # a second; most runs shard nothing
    from torch.distributed.fsdp import fully_shard

    sharded = copy.deepcopy(model)
    model.cpu()
    for parameter in sharded.parameters():
        parameter.data = parameter.data.contiguous()  # FSDP2 takes contiguous ones only
    mesh = init_device_mesh(device.type, (number,))
    for part in sharded.modules():
        if isinstance(part, (nn.ModuleList, nn.Sequential)):
            for block in part:
                if next(block.children(), None) is not None and next(block.parameters(), None) is not None:
                    fully_shard(block, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    return sharded


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` made this model."""
    return hasattr(model, "set_requires_gradient_sync")  # a method of FSDPModule


def whole_weights(sharded: nn.Module) -> dict[str, Tensor]:
    """The state dict of the whole model, on the CPU of every process; all must call it."""
    return {name: _whole(x) for name, x in sharded.state_dict().items()}


def whole_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer's state dict as one process has it; all must call it."""
    state = optimizer.state_dict()
    parts = {key: {name: _whole(x) for name, x in part.items()} for key, part in state["state"].items()}
    return {**state, "state": parts}


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load the state dict of one process; of a sharded parameter every process takes its part. All must call it."""
    parameters = [x for group in optimizer.param_groups for x in group["params"]]
    parts = {key: {name: _part(x, parameters[key]) for name, x in part.items()} for key, part in state["state"].items()}
    optimizer.load_state_dict({**state, "state": parts})


def _whole(x: Any) -> Any:
    if hasattr(x, "full_tensor"):  # a DTensor
        x = x.full_tensor()
    return x.detach().cpu() if isinstance(x, Tensor) else x


def _part(x: Any, parameter: Any) -> Any:
    if not hasattr(parameter, "placements") or not isinstance(x, Tensor) or x.shape != parameter.shape:
        return x
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(x.to(parameter.device), parameter.device_mesh, parameter.placements)
