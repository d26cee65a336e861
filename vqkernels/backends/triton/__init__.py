"""Triton kernels for sm_80 and newer. Importing this package needs no Triton; importing its kernels does.

nearest.nearest          statistics.statistics          quantize.quantize, .lookup, .quantize_backward
entropy.entropy, .entropy_backward
residual.residual_quantize, .residual_quantize_backward
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
from pathlib import Path


def problem() -> str | None:
    """Why the kernels cannot be used here at all, or None. Says nothing about a particular GPU."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    return None


def supports(capability: tuple[int, int]) -> bool:
    """Whether the kernels are built for a GPU of this compute capability."""
    return capability >= (8, 0)


def needs() -> str:
    """Which GPUs the kernels serve, as the start of a refusal."""
    return "the kernels need sm_80 or newer"


def compiler() -> str:
    """The compiler, as a verification names it: the minor version of the installed Triton, "3.6".

    Found without importing Triton where its metadata says it.
    """
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:  # a build of Triton under another name
        import triton as package

        version = package.__version__
    return ".".join(version.split(".")[:2])


def built_by() -> str:
    """The compiler with its name: "Triton 3.6"."""
    return f"Triton {compiler()}"


@functools.lru_cache(maxsize=1)
def source_hash() -> str:
    """Hash of every kernel source of this backend: what a verification vouches for."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]
