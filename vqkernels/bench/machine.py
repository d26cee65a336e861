"""The facts that a figure depends on: processor, versions, commit. No name of the machine or of its user."""

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch

from vqkernels.backends import registry
from vqkernels.version import __version__

PACKAGES = ("numpy", "scikit-learn", "faiss-cpu", "vector-quantize-pytorch", "diffusers")


def facts(threads: int) -> dict[str, str]:
    """Labels and values, in the order of the report."""
    known = dict(registry.report())
    found = {
        "processor": _processor(),
        "cores": str(os.cpu_count()),
        "threads": str(threads),
        "SIMD level": known.get("SIMD level", "none"),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "vqkernels": __version__,
        "commit": _commit(),
        "torch": torch.__version__,
    }
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _commit() -> str:
    """The checkout's commit, with a plus if files of the package differ from it. Without a checkout it says so."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return "installed package"
    try:
        commit = _git(root, "rev-parse", "--short=12", "HEAD").strip()
        changed = _git(root, "status", "--porcelain", "--untracked-files=no", "--", "vqkernels", "csrc").strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + ("+" if changed else "")


def _git(root: Path, *arguments: str) -> str:
    return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True).stdout
