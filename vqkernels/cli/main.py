"""`vqkernels COMMAND ...`: runs a command and prints a user's mistake as one message.

A command is imported only when it runs, so `info` works with torch alone.
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
    "compare": "train VQ-VAEs and a VAE on the same data, and write a report",
    "demo": "train on scanned digits and measure the result, in a few minutes; start here",
    "info": "show version, machine, and which backends work",
    "verify": "test the kernels on this machine's GPU; backend='auto' uses them after that",
    "bench": "measure speed, memory and errors beside other libraries, or of your model",
    "swap": "show what swapping the quantizers of your model changes and gains",
    "attack": "search for a wrong index in every backend, with hostile inputs",
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

    0: done. 1: the command was interrupted or failed: a training diverged, the disk is full, an index is wrong.
    2: a mistake in the arguments or the data.
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
    return "\n".join(
        ["usage: vqkernels COMMAND ... | --version", "", *lines, "", "'vqkernels COMMAND --help' shows its options."]
    )
