"""CUDA C++ kernels (csrc/cuda) for sm_80 and newer, part of the operator library where the build found nvcc.

nearest.nearest, .quantize          statistics.statistics, .codebook_gradient

Unlike the Triton kernels they need no compiler at run time. Importing this package needs neither a GPU nor that build.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

from vqkernels.backends import cpu


def build() -> dict[str, object]:
    """What the build recorded of its CUDA kernels: "nvcc", "architectures" and "source", or "absent" and why."""
    return cpu.build_facts().get("cuda") or {"absent": "the package was built without its CUDA kernels"}


def problem() -> str | None:
    """Why the kernels cannot be used here at all, or None. Says nothing about a particular GPU."""
    absent = build().get("absent")
    return str(absent) if absent else cpu.load()


def architectures() -> list[str]:
    """What the kernels were compiled for: "sm_90a", "sm_100 and its PTX"."""
    listed = build().get("architectures")
    return [str(one) for one in listed] if isinstance(listed, list) else []


def supports(capability: tuple[int, int]) -> bool:
    """Whether this build holds code for a GPU of this compute capability.

    Machine code serves its own major version from its own minor version on (of "a" and "f" targets: itself alone), PTX
    every newer GPU.
    """
    for one in architectures():
        name, _, ptx = one.removeprefix("sm_").partition(" ")
        digits = name.rstrip("af")
        built = int(digits[:-1]), int(digits[-1])
        if capability == built or (name == digits and (ptx or capability[0] == built[0]) and capability >= built):
            return True
    return False


def needs() -> str:
    """Which GPUs the kernels serve, as the start of a refusal."""
    return f"the CUDA kernels were built for {', '.join(architectures())}"


def compiler() -> str:
    """The compiler of the kernels, as a verification names it: "nvcc 13.0"."""
    return f"nvcc {build().get('nvcc', 'absent')}"


def built_by() -> str:
    """The compiler with its name, which `compiler` has already."""
    return compiler()


@functools.lru_cache(maxsize=1)
def source_hash() -> str:
    """Hash of the kernels' source, as it was built, and of their launchers here: what a verification vouches for."""
    digest = hashlib.sha256(str(build().get("source")).encode())
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]
