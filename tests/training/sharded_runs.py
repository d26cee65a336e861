"""What every process of test_sharding.py trains, and the run of one process that it is held to."""

import dataclasses
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from vqkernels.training.config import PriorConfig, RunConfig, VQVAEConfig
from vqkernels.training.loop import train

STEPS, HALF = 100, 30
CODEBOOKS = {"gradient": {}, "averages": {"ema_decay": 0.9, "init": "kmeans", "revive": "rows"}}


def config(codebook: str, steps: int = STEPS) -> RunConfig:
    sizes = {"hidden_channels": 16, "code_dim": 4, "codebook_size": 16, "downsamplings": 1}
    return RunConfig(
        data="digits",
        parallel="fsdp",  # of one process: nothing is shared
        log_every=1,
        checkpoint_every=50,
        picture_every=1000,
        vqvae=VQVAEConfig(**sizes, **CODEBOOKS[codebook], batch_size=64, steps=steps),
        prior=PriorConfig(hidden_channels=8, num_layers=2, head_channels=16, batch_size=64, steps=20),
    )


def run(folder: Path) -> None:
    torch.set_num_threads(1)
    for codebook in CODEBOOKS:
        train(config(codebook), folder / codebook)
    train(config("averages", HALF), folder / "halves", stage="vqvae")
    trained = train(config("averages"), folder / "halves", resume=True)
    # What `train` leaves in every process is the whole model.
    torch.save(trained.vqvae.state_dict(), folder / f"left_{dist.get_rank()}.pt")


def changed(codebook: str) -> RunConfig:
    """The same run, to go on in one process."""
    before = config(codebook)
    return dataclasses.replace(before, parallel="ddp", prior=dataclasses.replace(before.prior, steps=22))


if __name__ == "__main__":
    rank, world, meeting, folder = sys.argv[1:]
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=int(rank), world_size=int(world))
    run(Path(folder))
    dist.destroy_process_group()
