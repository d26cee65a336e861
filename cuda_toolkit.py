"""The CUDA toolkit that setup.py compiles with: where it is, for which GPUs, or why the build does without one.

FORCE_CUDA=1 insists on the CUDA kernels, FORCE_CUDA=0 leaves them out. TORCH_CUDA_ARCH_LIST="8.0;9.0a" names the GPUs.
"""

import hashlib
import os
import re
import shutil
import subprocess
from glob import glob
from pathlib import Path

# No contraction on the GPU either: where a kernel may round once, it says fma.
CUDA_FLAGS = ["-std=c++17", "-O3", "-fmad=false"]
ARCHITECTURES = "8.0;9.0a;10.0+PTX"  # the last one's PTX serves what comes after it
NAMED_ARCHITECTURES = {
    **dict.fromkeys(("Kepler+Tegra", "Kepler", "Maxwell+Tegra", "Maxwell", "Pascal", "Volta", "Turing"), "7.5"),
    "Ampere": "8.0;8.6", "Ada": "8.9", "Hopper": "9.0a", "Blackwell+Tegra": "11.0", "Blackwell": "10.0;12.0",
}  # fmt: skip


def sources() -> list[str]:
    return sorted([*glob("csrc/cuda/*.cu"), *glob("csrc/bindings/cuda_*.cpp")])


def included(paths: list[str]) -> set[Path]:
    """These files of csrc and every other that they include, directly or not."""
    found: set[Path] = set()
    left = [Path(path) for path in paths]
    while left:
        path = Path(os.path.normpath(left.pop()))
        if path not in found:
            found.add(path)
            left += [path.parent / name for name in re.findall(r'^#include "([^"]+)"', path.read_text(), re.MULTILINE)]
    return found


def source_hash() -> str:
    """Of everything that can change what the CUDA kernels do: a verification vouches for it."""
    digest = hashlib.sha256(repr(CUDA_FLAGS).encode())
    for path in sorted(included(sources())):
        digest.update(str(path).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


class Toolkit:
    """Attributes: `absent`, why the build does without CUDA, or ""; `insisted`; `home`; `architectures`.

    Raises:
        SystemExit: FORCE_CUDA insists on what is absent.
    """

    def __init__(self) -> None:
        wanted = os.environ.get("FORCE_CUDA", "")
        self.insisted = wanted not in ("", "0")
        self.home = self._home()
        self.architectures, misread = self._architectures(os.environ.get("TORCH_CUDA_ARCH_LIST") or ARCHITECTURES)
        self.absent = self._absence(wanted, misread)
        if self.absent and self.insisted:
            raise SystemExit(f"FORCE_CUDA is set, but {self.absent}")

    @property
    def nvcc(self) -> str:
        return str(self.home / "bin" / "nvcc")

    def libraries(self) -> list[str]:
        """The linker's flags for the runtime."""
        folders = [f"-L{path}" for name in ("lib64", "lib") if (path := self.home / name).is_dir()]
        return [*folders, "-lcudart_static", "-ldl", "-lrt", "-lpthread"]

    def command(self) -> list[str]:
        """nvcc, for the GPUs."""
        found = [self.nvcc, *CUDA_FLAGS, "-Xcompiler", "-fPIC,-fvisibility=hidden"]
        found += [f"-gencode=arch=compute_{chip},code=sm_{chip}" for chip, _ in self.architectures]
        return found + [f"-gencode=arch=compute_{chip},code=compute_{chip}" for chip, ptx in self.architectures if ptx]

    def facts(self) -> dict[str, object]:
        """What `vqkernels info` shows."""
        if self.absent:
            return {"absent": self.absent}
        said = subprocess.run([self.nvcc, "--version"], capture_output=True, text=True, check=True).stdout
        version = re.search(r"release ([\d.]+)", said)
        chips = [f"sm_{chip}" + " and its PTX" * ptx for chip, ptx in self.architectures]
        return {"nvcc": version[1] if version else "unknown", "architectures": chips, "source": source_hash()}

    @staticmethod
    def _home() -> Path | None:
        found = shutil.which("nvcc")
        places = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
        places.append(str(Path(found).resolve().parents[1]) if found else None)
        return next((Path(place) for place in places if place and (Path(place) / "bin" / "nvcc").exists()), None)

    @staticmethod
    def _architectures(listed: str) -> tuple[list[tuple[str, bool]], str]:
        """("90a", with its PTX) of each entry of TORCH_CUDA_ARCH_LIST, and what is wrong with it, or "".

        The kernels need 8.0 or newer: what is older is passed over.
        """
        for name, numbers in NAMED_ARCHITECTURES.items():
            listed = listed.replace(name, numbers)
        found = []
        for entry in re.findall(r"[^;,\s]+", listed):
            number = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry)
            if number is None:
                return [], f"TORCH_CUDA_ARCH_LIST must hold entries like 8.0, 9.0a or 10.0+PTX, got {entry!r}"
            if int(number[1]) >= 8:
                found.append((number[1] + number[2] + number[3], number[4] is not None))
        return found, ""

    def _absence(self, wanted: str, misread: str) -> str:
        if wanted == "0":
            return "FORCE_CUDA=0 leaves the CUDA kernels out"
        if self.home is None:
            return "nvcc is not found: set CUDA_HOME to the CUDA toolkit"
        if misread:
            return misread
        if not self.architectures:
            return "TORCH_CUDA_ARCH_LIST names no GPU of compute capability 8.0 or newer"
        if not self.insisted:
            try:
                import torch
            except ImportError:
                return "torch is not installed"
            if torch.version.cuda is None:
                return "the torch of the build is without CUDA: FORCE_CUDA=1 builds the CUDA kernels all the same"
        return ""
