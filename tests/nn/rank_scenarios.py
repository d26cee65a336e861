"""What every rank of a process group does in test_ranks.py; run as a program: rank, world size, meeting file, output.

Each scenario is a function of (rank, world size) that returns tensors; in a world of one it computes the joined batch.
"""

from functools import partial

import ranks
import torch
import torch.distributed as dist
from torch import nn

from vqkernels.nn import GroupedResidualVectorQuantizer, ResidualVectorQuantizer, VectorQuantizer

DIM, CODES, STEPS, ROWS = 4, 12, 6, 48
# Shares of the rows in each step: uneven, and now and then a rank has none.
SHARES = {1: [[48]] * 6, 2: [[24, 24], [40, 8], [48, 0], [0, 48], [17, 31], [1, 47]]}
SHARES[3] = [[16, 16, 16], [40, 8, 0], [0, 0, 48], [5, 0, 43], [17, 30, 1], [1, 46, 1]]

LAYERS = {
    "ema": dict(ema_decay=0.8),
    "revived": dict(ema_decay=0.8, revive="rows", revive_threshold=0.4),
    "initialised": dict(init="kmeans", ema_decay=0.8, revive="rows", revive_threshold=0.4),
    "cosine heads": dict(
        init="kmeans",
        ema_decay=0.8,
        revive="rows",
        revive_threshold=0.4,
        metric="cosine",
        heads=2,
        separate_codebooks=True,
    ),
    "shared heads": dict(ema_decay=0.8, revive="rows", revive_threshold=0.4, heads=2, codebook_dim=3),
}
STACKS = {
    "residual": partial(ResidualVectorQuantizer, levels=3),
    "shared residual": partial(ResidualVectorQuantizer, levels=3, shared_codebook=True),
    "grouped residual": partial(GroupedResidualVectorQuantizer, levels=2, groups=2),
}
LAYERS |= dict.fromkeys(STACKS, LAYERS["initialised"])
BUILT_EARLY: dict[str, nn.Module] = {}


def build(name: str) -> nn.Module:
    torch.manual_seed(11)
    return STACKS.get(name, VectorQuantizer)(DIM, CODES, **LAYERS[name])


def share(x: torch.Tensor, step: int, rank: int, world: int) -> torch.Tensor:
    return x.split(SHARES[world][step])[rank]


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows with a NaN among them, and a mask; the same on every rank."""
    generator = torch.Generator().manual_seed(step)
    z = torch.randn(ROWS, DIM, generator=generator) * 2
    z[5] = torch.nan
    return z, torch.rand(ROWS, generator=generator) < 0.8


def layer(name: str, rank: int, world: int) -> dict[str, torch.Tensor]:
    quantizer = BUILT_EARLY[name]
    for step in range(STEPS):
        z, mask = batch(step)
        quantizer(share(z, step, rank, world), mask=share(mask, step, rank, world))
    return quantizer.state_dict()


def compiled(rank: int, world: int) -> dict[str, torch.Tensor]:
    """The collectives stand in the graph."""
    quantizer = build("initialised")
    whole = torch.compile(quantizer, fullgraph=True, backend="aot_eager")
    for step in range(STEPS):
        z, mask = batch(step)
        # Equal shares: a graph is compiled for a size, and ranks may compile at their own pace.
        whole(z.chunk(world)[rank], mask=mask.chunk(world)[rank])
    return quantizer.state_dict()


def manual(rank: int, world: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(11)
    quantizer = VectorQuantizer(DIM, CODES, ema_decay=0.8, ema_update="manual")
    for step in range(STEPS):
        z, mask = batch(step)
        mine, kept = share(z, step, rank, world), share(mask, step, rank, world)
        for part in range(1 + rank):  # ranks need not even have equally many micro-batches
            quantizer(mine[part :: 1 + rank], mask=kept[part :: 1 + rank])
        quantizer.update_codebook()
    return quantizer.state_dict()


def manual_revived(rank: int, world: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(11)
    quantizer = VectorQuantizer(DIM, CODES, ema_decay=0.8, ema_update="manual", revive="rows", revive_threshold=0.4)
    for step in range(STEPS):
        z, mask = batch(step)
        quantizer(share(z, step, rank, world), mask=share(mask, step, rank, world))
        quantizer.update_codebook()
    return quantizer.state_dict()


def dropped(rank: int, world: int) -> dict[str, torch.Tensor]:
    """Every rank draws the same numbers of levels for its elements; on the joined batch they are other elements."""
    torch.manual_seed(11)
    quantizer = ResidualVectorQuantizer(DIM, CODES, 3, dropout=0.6, ema_decay=0.8)
    passed = []
    for step in range(STEPS):
        z = torch.randn(20, DIM, generator=torch.Generator().manual_seed(STEPS * rank + step))
        passed.append((quantizer(z)[1] >= 0).sum(-1))
    return {**quantizer.state_dict(), "passed": torch.stack(passed)}


class Model(nn.Module):
    def __init__(self, **arguments: object) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(6, DIM), nn.Linear(DIM, 6)
        self.quantizer = VectorQuantizer(DIM, CODES, **arguments)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        quantized, _, loss = self.quantizer(self.encoder(x))
        return (self.decoder(quantized) - x).square().mean() + loss


def train(wrap, arguments: dict, rank: int, world: int) -> dict[str, torch.Tensor]:
    """A few steps on equal shares: averaged gradients are then those of the joined batch."""
    torch.manual_seed(11)
    model = Model(**arguments)
    wrapped = wrap(model) if world > 1 else model
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.05)
    for step in range(STEPS):
        x = torch.randn(ROWS, 6, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        wrapped(x.chunk(world)[rank]).backward()
        optimizer.step()
    state = model.state_dict()
    return {name: value.full_tensor() if hasattr(value, "full_tensor") else value for name, value in state.items()}


def sharded(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model.encoder, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


EMA = dict(init="kmeans", ema_decay=0.8, revive="rows", revive_threshold=0.4)
GRADIENT = dict(init="kmeans", revive="rows", revive_threshold=0.4)
SCENARIOS = {
    **{name: partial(layer, name) for name in LAYERS},
    "compiled": compiled,
    "manual": manual,
    "manual revived": manual_revived,
    "dropped": dropped,
    "DDP, EMA": partial(train, nn.parallel.DistributedDataParallel, EMA),
    "DDP, gradient": partial(train, nn.parallel.DistributedDataParallel, GRADIENT),
    "FSDP2, EMA": partial(train, sharded, EMA),
    "FSDP2, gradient": partial(train, sharded, {}),
}
NAMES = list(SCENARIOS)
# A codebook trained by gradient without revival needs no statistics of other ranks: its metrics are of its own rows.
LOCAL = {"FSDP2, gradient": {"quantizer.counts"}}


def run(rank: int, world: int, meeting: str = "") -> dict[str, dict[str, torch.Tensor]]:
    torch.set_num_threads(1)
    BUILT_EARLY.update({name: build(name) for name in LAYERS})
    with ranks.joined(rank, world, meeting):
        return {name: scenario(rank, world) for name, scenario in SCENARIOS.items()}


if __name__ == "__main__":
    ranks.main(run)
