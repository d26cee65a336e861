"""The run that test_kills.py kills: what it trains, and the process that does it."""

from multiprocessing.connection import Connection
from pathlib import Path

import torch

from vqkernels.training.checkpoint import holds_run
from vqkernels.training.config import PriorConfig, RunConfig, VQVAEConfig
from vqkernels.training.loop import train


def config() -> RunConfig:
    return RunConfig(
        data="digits",
        log_every=1,
        checkpoint_every=4,
        picture_every=40,
        vqvae=VQVAEConfig(
            hidden_channels=16, code_dim=4, codebook_size=16, downsamplings=1, steps=150, batch_size=64, ema_decay=0.9
        ),
        prior=PriorConfig(hidden_channels=16, num_layers=3, head_channels=16, dropout=0.2, steps=150, batch_size=64),
    )


def straight(path: Path) -> None:
    torch.set_num_threads(1)
    train(config(), path)


def go_on(path: Path, begun: Connection) -> None:
    """Trains, or continues, and says when the first step is done."""
    told = False

    def tell() -> bool:
        nonlocal told
        if not told:
            begun.send(True)
            told = True
        return False

    torch.set_num_threads(1)
    train(config(), path, resume=holds_run(path), should_stop=tell)
