"""What two ranks do in test_ranks.py: every layer in every mode under DDP, FSDP2 and distributed checkpoints.

Each scenario has a process group of its own, so that one that fails takes no other with it: its error is its result.
"""

import sys
import tempfile
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import ranks
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from wrappers.cells import CELLS, Model, build
from wrappers.steps import STEPS, evaluate, plain, snapshot, train

Outcome = dict[str, Tensor]


def share(rank: int, world: int, x: Tensor) -> Tensor:
    return x.chunk(world)[rank]


def outcome(model: nn.Module, call: nn.Module) -> Outcome:
    """State and eval outputs."""
    state = {name: value.full_tensor() if hasattr(value, "full_tensor") else value for name, value in snapshot(model).items()}
    return state | {f"eval {number}": value for number, value in enumerate(evaluate(model, call))}


def replicated(cell: str, rank: int, world: int) -> Outcome:
    """DDP with default arguments; rank 1 starts with other numbers, which DDP replaces by those of rank 0."""
    model = build(cell, seed=11 + rank)
    wrapped = DistributedDataParallel(model)
    train(cell, model, wrapped, share=partial(share, rank, world))
    return outcome(model, wrapped)


def loaded_by_one(cell: str, rank: int, world: int) -> Outcome:
    """Rank 0 alone loads a checkpoint, and DDP brings it to the other."""
    model = build(cell, seed=5 + rank)
    if rank == 0:
        model.load_state_dict(plain(cell).state)
    wrapped = DistributedDataParallel(model)
    train(cell, model, wrapped, steps=[STEPS], share=partial(share, rank, world))
    return outcome(model, wrapped)


def sharded(cell: str, rank: int, world: int) -> Outcome:
    from torch.distributed.fsdp import fully_shard

    model = build(cell)
    mesh = dist.init_device_mesh("cpu", (world,))
    fully_shard(model.encoder, mesh=mesh)
    fully_shard(model, mesh=mesh)
    train(cell, model, share=partial(share, rank, world))
    return outcome(model, model)


def checkpointed(cell: str, rank: int, world: int) -> Outcome:
    """All ranks save together, and load in place."""
    before: Model = build(cell)
    train(cell, before, steps=[0], share=partial(share, rank, world))
    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder)
    # Parameters of an unwrapped model are those of its rank; rank 0 writes what both have.
    for parameter in before.parameters():
        dist.broadcast(parameter.data, 0)
    dcp.save(before.state_dict(), checkpoint_id=Path(folder[0]))
    model = build(cell, seed=5 + rank)
    if model.mode == "fixed":
        evaluate(model)
    dcp.load(model.train().state_dict(), checkpoint_id=Path(folder[0]))
    same = all(torch.equal(value, before.state_dict()[name]) for name, value in model.state_dict().items())
    train(cell, before, steps=[1], share=partial(share, rank, world))
    train(cell, model, steps=[1], share=partial(share, rank, world))
    after = before.state_dict()
    return {
        "loaded": torch.tensor(same),
        **{f"{name} as without": torch.tensor(torch.equal(value, after[name])) for name, value in model.state_dict().items()},
    }


SCENARIOS: dict[str, Callable[[str, int, int], Outcome]] = {
    "DDP": replicated,
    "DDP after rank 0 loads": loaded_by_one,
    "FSDP2": sharded,
    "distributed checkpoint, 2 ranks": checkpointed,
}


def run(rank: int, world: int, meeting: str) -> dict[str, Any]:
    torch.use_deterministic_algorithms(True)
    results: dict[str, Any] = {}
    for name, scenario in SCENARIOS.items():
        for cell in CELLS:
            key = f"{name}: {cell}"
            try:
                with ranks.joined(rank, world, f"{meeting} {len(results)}"):
                    results[key] = scenario(cell, rank, world)
            except Exception:
                results[key] = traceback.format_exc()
                print(key, traceback.format_exc(), file=sys.stderr)
    return results


if __name__ == "__main__":
    ranks.main(run)
