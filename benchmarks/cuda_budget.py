"""Registers, spills and shared memory of the CUDA kernels, as ptxas tells them: no GPU is needed.

    python -m benchmarks.cuda_budget            print the table
    python -m benchmarks.cuda_budget --write    also write benchmarks/results/cuda_budget.json

Compiles every csrc/cuda/*.cu with nvcc and the flags of cuda_toolkit.py, once for every chip. What was compiled is kept
in build/, keyed by the sources, the flags and nvcc's release. The kernels of CUB are not ours and are left out. The
search, whose loop is counted too, has a table of its own (benchmarks/cuda_search_budget.py).
"""

import argparse
import ast
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
TABLE = Path(__file__).parent / "results" / "cuda_budget.json"
CACHE = ROOT / "build" / "cuda_budget.json"
CHIPS = ("sm_80", "sm_90a", "sm_100")
OTHERS = ("search", "nearest")  # counted by benchmarks/cuda_search_budget.py


def nvcc() -> str | None:
    """The compiler that a build of the package would use, or None."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("nvcc", path=f"{home}/bin{os.pathsep}{os.environ.get('PATH', '')}")


def release() -> str:
    """nvcc's release, "13.0": numbers are compared within one of them only."""
    told = subprocess.run([nvcc() or "nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release ([\d.]+)", told)
    return found[1] if found else "unknown"


def flags() -> list[str]:
    """CUDA_FLAGS of cuda_toolkit.py."""
    for node in ast.parse((ROOT / "cuda_toolkit.py").read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "CUDA_FLAGS":
            return ast.literal_eval(node.value)
    raise RuntimeError("cuda_toolkit.py has no CUDA_FLAGS")


def sources() -> list[Path]:
    return [path for path in sorted((ROOT / "csrc" / "cuda").glob("*.cu")) if path.stem not in OTHERS]


def compile_kernels(source: Path, chip: str) -> dict[str, dict[str, int]]:
    """{kernel: {"registers", "spilled", "stack", "shared"}}, bytes; the shared memory is what is declared statically.

    Raises:
        RuntimeError: it does not compile, with what nvcc said.
    """
    key = _key(source, chip)
    if (known := _cached().get(key)) is not None:
        return known
    with tempfile.TemporaryDirectory() as folder:
        command = [nvcc() or "nvcc", *flags(), f"-arch={chip}", "-cubin", "-Xptxas", "-v"]
        done = subprocess.run(
            [*command, str(source), "-o", f"{folder}/kernel.cubin"], capture_output=True, text=True, check=False
        )
    if done.returncode:
        raise RuntimeError(f"{source.name} for {chip}: {done.stderr[-2000:]}")
    found = parse(done.stderr)
    _keep(key, found)
    return found


def parse(told: str) -> dict[str, dict[str, int]]:
    """What `-Xptxas -v` printed, by readable kernel names, without those of CUB."""
    found: dict[str, dict[str, int]] = {}
    for part in told.split("Compiling entry function '")[1:]:
        mangled = part.partition("'")[0]
        if "vqkernels" not in mangled or "cub" in mangled:
            continue
        used, spilled = re.search(r"Used (\d+) registers", part), re.search(r"(\d+) bytes spill stores", part)
        stack, shared = re.search(r"(\d+) bytes stack frame", part), re.search(r"(\d+) bytes smem", part)
        if used is None or spilled is None or stack is None:
            raise RuntimeError(f"ptxas gave no resource usage of {mangled}")
        found[mangled] = {
            "registers": int(used[1]),
            "spilled": int(spilled[1]),
            "stack": int(stack[1]),
            "shared": int(shared[1]) if shared else 0,
        }
    readable = subprocess.run(["c++filt"], input="\n".join(found), capture_output=True, text=True, check=True).stdout
    return dict(zip(map(short, readable.splitlines()), found.values(), strict=True))


def short(name: str) -> str:
    """The program of a kernel without its namespaces and arguments: SumChunks<float, 4>."""
    name = re.sub(r"\(anonymous namespace\)::|vqkernels::|cuda::|^void ", "", name)
    inner = re.match(r"program_kernel<(.*)>\(", name)
    return inner[1].strip() if inner else name.partition("(")[0].removesuffix("_kernel")


def _key(source: Path, chip: str) -> str:
    digest = hashlib.sha256(repr((chip, flags(), release(), Path(__file__).read_text())).encode())
    for path in [source, *sorted((ROOT / "csrc").rglob("*.h")), *sorted((ROOT / "csrc").rglob("*.cuh"))]:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:24]


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
    work = [(source, chip) for chip in chips for source in sources()]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = list(pool.map(lambda one: compile_kernels(*one), work))
    result: dict[str, Any] = {"nvcc": release()}
    for (_, chip), kernels in zip(work, found, strict=True):
        result.setdefault(chip, {}).update(dict(sorted(kernels.items())))
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.name}")
    options = parser.parse_args()
    if nvcc() is None:
        print("benchmarks.cuda_budget: nvcc is not found: set CUDA_HOME to the CUDA toolkit", file=sys.stderr)
        return 2
    result = table()
    for chip in CHIPS:
        for name, numbers in result[chip].items():
            print(f"{chip:7s} {name:34s}", "  ".join(f"{key} {value}" for key, value in numbers.items()))
    if options.write:
        TABLE.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
