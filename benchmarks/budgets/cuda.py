"""Registers, spills and shared memory of the CUDA kernels, as ptxas gives them.

Compiles csrc/cuda/*.cu with nvcc and the flags of setup.py, once for every chip. What was compiled is kept in build/,
keyed by the sources, the flags and nvcc's release. The kernels of CUB are not ours and are left out. The search, whose
loop is counted too, has its own table (cuda_search.py).
"""

import ast
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.budgets import RESULTS

ROOT = Path(__file__).parents[2]
TABLE = RESULTS / "cuda_budget.json"
CACHE = ROOT / "build" / "cuda_budget.json"
CHIPS = ("sm_80", "sm_90a", "sm_100")
SEARCH = ("search", "nearest")  # the sources of the other table


def nvcc() -> str | None:
    """The compiler that a build of the package would use, or None."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("nvcc", path=f"{home}/bin{os.pathsep}{os.environ.get('PATH', '')}")


def run_nvcc(*arguments: str | Path) -> str:
    """What it prints. Raises: RuntimeError, with what nvcc said; it is not found, or a source does not compile."""
    program = nvcc()
    if program is None:
        raise RuntimeError("nvcc is not found: set CUDA_HOME to the CUDA toolkit")
    done = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"nvcc {' '.join(map(str, arguments))}: {done.stderr[-2000:]}")
    return done.stdout + done.stderr


def release() -> str:
    """nvcc's release, "13.0": numbers are compared within one of them only."""
    found = re.search(r"release ([\d.]+)", run_nvcc("--version"))
    return found[1] if found else "unknown"


def flags() -> list[str]:
    """CUDA_FLAGS of cuda_toolkit.py."""
    for node in ast.parse((ROOT / "cuda_toolkit.py").read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "CUDA_FLAGS":
            return ast.literal_eval(node.value)
    raise RuntimeError("cuda_toolkit.py has no CUDA_FLAGS")


def compile_source(source: Path, chip: str, cubin: Path) -> dict[str, dict[str, int]]:
    """Writes the machine code; {mangled name: {"registers", "spilled", "stack", "shared"}} of its kernels in bytes,
    where the shared memory is what is declared statically."""
    return parse(run_nvcc(*flags(), f"-arch={chip}", "-cubin", "-Xptxas", "-v", source, "-o", cubin))


def parse(told: str) -> dict[str, dict[str, int]]:
    """What `-Xptxas -v` printed, by mangled names, without the kernels of CUB."""
    found: dict[str, dict[str, int]] = {}
    patterns = {
        "registers": r"Used (\d+) registers",
        "spilled": r"(\d+) bytes spill stores",
        "stack": r"(\d+) bytes stack frame",
    }
    for part in told.split("Compiling entry function '")[1:]:
        mangled = part.partition("'")[0]
        if "vqkernels" not in mangled or "cub" in mangled:
            continue
        numbers = {name: re.search(pattern, part) for name, pattern in patterns.items()}
        if not all(numbers.values()):
            raise RuntimeError(f"ptxas gave no resource usage of {mangled}")
        shared = re.search(r"(\d+) bytes smem", part)
        found[mangled] = {name: int(number[1]) for name, number in numbers.items() if number}
        found[mangled]["shared"] = int(shared[1]) if shared else 0
    return found


def readable(kernels: dict[str, Any]) -> dict[str, Any]:
    """By the program of a kernel without its namespaces and arguments: SumChunks<float, 4>."""
    told = subprocess.run(["c++filt"], input="\n".join(kernels), capture_output=True, text=True, check=True).stdout
    names = []
    for line in told.splitlines():
        name = re.sub(r"\(anonymous namespace\)::|vqkernels::|cuda::|^void ", "", line)
        inner = re.match(r"program_kernel<(.*)>\(", name)
        names.append(inner[1].strip() if inner else name.partition("(")[0].removesuffix("_kernel"))
    return dict(sorted(zip(names, kernels.values(), strict=True)))


def _kernels(source: Path, chip: str) -> dict[str, dict[str, int]]:
    """Compiled, or from the cache."""
    digest = hashlib.sha256(repr((chip, flags(), release(), Path(__file__).read_text())).encode())
    for path in [source, *sorted((ROOT / "csrc").rglob("*.h")), *sorted((ROOT / "csrc").rglob("*.cuh"))]:
        digest.update(path.read_bytes())
    key = digest.hexdigest()[:24]
    if key not in _cached():
        with tempfile.TemporaryDirectory() as folder:
            _keep(key, readable(compile_source(source, chip, Path(folder) / "kernel.cubin")))
    return _cached()[key]


def _cached() -> dict[str, dict[str, dict[str, int]]]:
    return json.loads(CACHE.read_text()) if CACHE.exists() else {}


def _keep(key: str, found: dict[str, dict[str, int]]) -> None:
    """Add to the cache; others may be adding too."""
    CACHE.parent.mkdir(exist_ok=True)
    with CACHE.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        new = CACHE.with_suffix(".new")
        new.write_text(json.dumps(_cached() | {key: found}))
        new.replace(CACHE)


def table(chips: tuple[str, ...] = CHIPS) -> dict[str, Any]:
    """The whole budget: {"nvcc": release, chip: {kernel: numbers}}."""
    sources = [path for path in sorted((ROOT / "csrc" / "cuda").glob("*.cu")) if path.stem not in SEARCH]
    work = [(source, chip) for chip in chips for source in sources]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = list(pool.map(lambda one: _kernels(*one), work))
    result: dict[str, Any] = {"nvcc": release()}
    for (_, chip), kernels in zip(work, found, strict=True):
        result.setdefault(chip, {}).update(kernels)
    return result
