"""`vqkernels info`: version, machine and backends. Needs torch alone."""

import argparse
import platform
from collections.abc import Sequence

from vqkernels.backends import registry
from vqkernels.version import __version__


def run(arguments: Sequence[str]) -> int:
    """Print what there is."""
    parser = argparse.ArgumentParser(prog="vqkernels info", description="Show version, machine and backends.")
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
