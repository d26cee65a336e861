"""`vqkernels info`: prints version, machine and backends. Needs torch alone."""

import argparse
import platform
from collections.abc import Sequence

from vqkernels.backends import registry
from vqkernels.version import __version__

_DESCRIPTION = """
Show the version, the machine, which backends work, and which one backend='auto' takes on a CPU and on each GPU. A bug
report needs this output.
"""


def run(arguments: Sequence[str]) -> int:
    """Print one fact per line; returns 0."""
    parser = argparse.ArgumentParser(prog="vqkernels info", description=_DESCRIPTION)
    parser.parse_args(arguments)
    lines = [
        ("vqkernels", __version__),
        ("python", platform.python_version()),
        ("platform", platform.platform()),
        *registry.report(),
    ]
    width = max(len(label) for label, _ in lines)
    for label, text in lines:
        print(f"{label:<{width}}  {text}")
    return 0
