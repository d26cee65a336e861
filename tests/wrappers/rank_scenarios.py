"""What two ranks do in test_ranks.py: every layer in every mode under DDP, FSDP1, FSDP2 and distributed checkpoints.

Each cell has a process group of its own, so that one that fails takes no other with it: its error is its result.
"""

import tempfile
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import ranks
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from wrappers.cells import CELLS, build
from wrappers.differences import known
from wrappers.loaders import fresh
from wrappers.steps import STEPS, evaluate, plain, snapshot, train

Outcome = dict[str, Tensor]
MOST_FAILURES = 8  # each may be a hang that waits for its timeout


def share(rank: int, world: int, x: Tensor) -> Tensor:
    return x.chunk(world)[rank]


def outcome(model: nn.Module, call: nn.Module) -> Outcome:
    """State and eval outputs."""
    whole = {
        name: value.full_tensor() if hasattr(value, "full_tensor") else value for name, value in snapshot(model).items()
    }
    return whole | {f"eval {number}": value for number, value in enumerate(evaluate(model, call))}


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


def flattened(cell: str, rank: int, world: int) -> Outcome:
    """FSDP1."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = build(cell)
    wrapped = FullyShardedDataParallel(model, device_id=torch.device("cpu"))
    train(cell, wrapped, share=partial(share, rank, world))
    with FullyShardedDataParallel.summon_full_params(wrapped, writeback=False):
        return outcome(model, model)


def checkpointed(cell: str, rank: int, world: int) -> Outcome:
    """All ranks save together and load in place; both models then train on. Whether each tensor is the same."""
    share_of_rank = partial(share, rank, world)
    before, model = build(cell), fresh(cell, seed=5 + rank)
    wrapped = DistributedDataParallel(before)
    train(cell, before, wrapped, steps=[0], share=share_of_rank)
    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder)
    dcp.save(before.state_dict(), checkpoint_id=Path(folder[0]))
    dcp.load(model.state_dict(), checkpoint_id=Path(folder[0]))
    loaded = compared(model, before)
    train(cell, before, wrapped, steps=[1], share=share_of_rank)
    train(cell, model, DistributedDataParallel(model), steps=[1], share=share_of_rank)
    trained = compared(model, before)
    return {f"{name}, loaded": same for name, same in loaded.items()} | trained


def compared(model: nn.Module, other: nn.Module) -> Outcome:
    theirs = other.state_dict()
    return {name: torch.tensor(torch.equal(value, theirs[name])) for name, value in model.state_dict().items()}


SCENARIOS: dict[str, Callable[[str, int, int], Outcome]] = {
    "DDP": replicated,
    "DDP after rank 0 loads": loaded_by_one,
    "FSDP1": flattened,
    "FSDP2": sharded,
    "distributed checkpoint": checkpointed,
}


def run(rank: int, world: int, meeting: str, scenario: str) -> dict[str, Outcome | str]:
    """By cell, the outcome or the error."""
    torch.use_deterministic_algorithms(True)
    for cell in CELLS:
        plain(cell)  # before there is a group
    results: dict[str, Outcome | str] = {}
    failures = 0
    for cell in CELLS:
        try:
            if failures == MOST_FAILURES:
                raise RuntimeError("not run: too many failed before")
            with ranks.joined(rank, world, f"{meeting} {len(results)}"):
                results[cell] = SCENARIOS[scenario](cell, rank, world)
        except Exception:
            results[cell] = traceback.format_exc()
            failures += failures < MOST_FAILURES and known(scenario, cell) is None
    return results


if __name__ == "__main__":
    ranks.main(run)
