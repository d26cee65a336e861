"""Several gloo processes for a test: a program of scenarios is started once per rank, and what each returns is read.

A program ends in `if __name__ == "__main__": ranks.main(run)`; `run` takes rank, world size and a
meeting, and is in a process group within `joined`.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import vqkernels

SECONDS = 300  # for a whole program: a hang is a failure, not a wait
PATIENCE = timedelta(seconds=60)  # for one collective


def start(program: str, world: int, folder: Path, *arguments: str) -> list[Any]:
    """What each rank's `run` returned for these arguments; a rank that fails or hangs fails the test."""
    paths = [str(Path(vqkernels.__file__).parents[1]), str(Path(__file__).parent)]
    environment = {"PYTHONPATH": os.pathsep.join(paths), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [
                sys.executable,
                program,
                str(rank),
                str(world),
                str(folder / "meeting"),
                str(folder / f"{rank}.pt"),
                *arguments,
            ],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        for process in processes:
            _, errors = process.communicate(timeout=SECONDS)
            assert process.returncode == 0, errors
    finally:
        for process in processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world)]


def main(run: Callable[..., Any]) -> None:
    """One rank: its arguments are rank, world size, meeting file, output, and those of `run`."""
    torch.set_num_threads(1)
    rank, world, meeting, output, *arguments = sys.argv[1:]
    torch.save(run(int(rank), int(world), meeting, *arguments), output)


@contextmanager
def joined(rank: int, world: int, meeting: str) -> Iterator[None]:
    """Within a process group of `world` ranks; there is none where the world is one process."""
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world, timeout=PATIENCE)
    try:
        yield
    finally:
        if world > 1:
            dist.destroy_process_group()
