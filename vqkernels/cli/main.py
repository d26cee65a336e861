"""`vqkernels COMMAND ...`: finds the command and turns mistakes into one sentence.

A command is imported only when it is asked for, so that `info` runs with nothing but torch installed.
"""

import importlib
import sys
from collections.abc import Sequence
from typing import Any

COMMANDS = {
    "train": "train a VQ-VAE, then a prior on its codes",
    "sample": "draw images from a trained prior",
    "encode": "turn images into codes on disk, with a trained VQ-VAE",
    "decode": "turn codes back into images",
    "compare": "train VQ-VAE and VAE side by side, and write a report",
    "demo": "train on scanned digits and measure the result, in a few minutes",
    "info": "show version, machine and backends",
    "verify": "prove the kernels on this machine's GPU, so that they are used",
    "bench": "measure speed, memory and error beside every peer",
    "swap": "swap the quantizers of your model, compare and measure",
    "attack": "search for a wrong index in every backend",
}
CORE = frozenset({"info", "verify", "attack", "bench", "swap"})  # commands that need torch alone
EXTRA = frozenset(
    {
        "PIL",
        "filelock",
        "matplotlib",
        "numpy",
        "safetensors",
        "sklearn",
        "tensorboard",
        "tomli",
        "tomli_w",
        "tqdm",
        "tyro",
    }
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status.

    0: done; 1: it was interrupted, a training diverged, or the disk is full; 2: a mistake in what was asked.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] in (["-h"], ["--help"]):
        print(_usage())
        return 0
    if given == ["--version"]:
        from vqkernels.version import __version__

        print(__version__)
        return 0
    if not given or given[0] not in COMMANDS:
        problem = f"there is no command '{given[0]}'" if given else "a command is needed"
        print(f"vqkernels: {problem}\n\n{_usage()}", file=sys.stderr)
        return 2
    name = given[0]
    try:
        command = importlib.import_module(f"vqkernels.cli.{name}")
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRA:
            raise
        message = f"'vqkernels {name}' needs the package {package}: pip install 'vqkernels[train]'"
        print(f"vqkernels: {message}", file=sys.stderr)
        return 2
    try:
        return _run(name, command, given[1:])
    except KeyboardInterrupt:
        print(f"vqkernels {name}: interrupted", file=sys.stderr)
        return 1


def _run(name: str, command: Any, arguments: list[str]) -> int:
    if name in CORE:
        return command.run(arguments)

    from vqkernels.training.errors import ReportedElsewhere, UserError

    try:
        return command.run(arguments)
    except ReportedElsewhere:
        return 2
    except UserError as error:
        print(f"vqkernels {name}: {error}", file=sys.stderr)
        return error.status


def _usage() -> str:
    lines = [f"  {name:<8} {description}" for name, description in COMMANDS.items()]
    return "\n".join(["usage: vqkernels COMMAND ...", "", *lines, "", "'vqkernels COMMAND --help' shows its options."])
