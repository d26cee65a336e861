"""Registers, shared memory and instructions per score of the CUDA search, from machine code, without a GPU.

    python -m benchmarks.cuda_search_budget            print the table
    python -m benchmarks.cuda_search_budget --write    also write benchmarks/results/cuda_search_budget.json

Compiles csrc/cuda/search.cu and nearest.cu with nvcc, as setup.py does, for every chip of the table, and reads back
what ptxas used (with the cuobjdump and nvdisasm that Triton brings). The loop around the products is counted by the
pipe model of benchmarks/triton_budget.py: cycles per score = max(2 · half-rate instructions, all instructions) /
scores, over one pass of the loop, which for a lane is 64 scores. `epilogue` is the same without the products and
their operand loads, which the tensor core's own time (D / 8 cycles per score on sm_80, D / 16 at best on sm_90) can
hide behind. Beyond D = 128 one pass is a slice of 64 channels, and the reduction, once per tile, is counted in each:
an upper bound.
Nothing here is a time measured on a GPU.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.triton_budget import _BIN, cycles_per_score, instructions, loops, matrix_instructions

ROOT = Path(__file__).parents[1]
TABLE = Path(__file__).parent / "results" / "cuda_search_budget.json"
CHIPS = ("80", "90a", "100")
SOURCES = ("search", "nearest")
FLAGS = ["-std=c++17", "-O3", "-fmad=false"]  # those of cuda_toolkit.py, which a test compares
SCORES = 32 * 64 // 32  # 32 rows by 64 codes of a warp's pass, per lane


def nvcc() -> str | None:
    """The compiler that a build would use, or None."""
    home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    found = Path(home) / "bin" / "nvcc"
    return str(found) if found.exists() else shutil.which("nvcc")


def nvcc_version() -> str:
    """The release of nvcc, "13.0": counts are compared within one of them only."""
    told = subprocess.run([nvcc() or "nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release ([\d.]+)", told)
    return found[1] if found else "unknown"


def compile_cubin(source: str, chip: str, folder: Path, root: Path = ROOT) -> Path:
    """The machine code of csrc/cuda/`source`.cu for one chip."""
    out = folder / f"{source}_{chip}.cubin"
    path = root / "csrc" / "cuda" / f"{source}.cu"
    command = [nvcc() or "nvcc", *FLAGS, f"-arch=sm_{chip}", "-cubin", "-o", str(out), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return out


def kernel_name(mangled: str) -> str:
    """ "search D=64" or "rescore" from a mangled name."""
    if found := re.search(r"search_kernelILi(\d+)ELb([01])E", mangled):
        return "search D>128, a slice of 64" if found[2] == "1" else f"search D={found[1]}"
    found = re.search(r"\d+([a-z]+)_kernel", mangled)
    if found is None:
        raise ValueError(f"no kernel's name: {mangled}")
    return found[1]


def usage(cubin: Path) -> dict[str, dict[str, int]]:
    """Registers and stack (which is where spilled registers go) of every kernel."""
    done = subprocess.run([_BIN / "cuobjdump", "-res-usage", cubin], capture_output=True, text=True, check=True)
    found = re.findall(r"Function (\S+?):\s+REG:(\d+) STACK:(\d+)", done.stdout + done.stderr)
    if not found:
        raise RuntimeError(f"cuobjdump gave no resource usage: {done.stdout[:200]}")
    return {kernel_name(name): {"registers": int(regs), "stack": int(stack)} for name, regs, stack in found}


def bodies(cubin: Path) -> dict[str, collections.Counter[str]]:
    """How often each opcode stands in the smallest loop of products of every kernel that has one."""
    done = subprocess.run([_BIN / "nvdisasm", "-c", cubin], capture_output=True, text=True, check=True)
    result = {}
    for section in re.split(r"\n\s*\.section\s+\.text\.", done.stdout)[1:]:
        code, labels = instructions(section)
        names = [opcode for opcode, _ in code]
        spans = [(a, b) for a, b in loops(code, labels) if matrix_instructions(names[a : b + 1])]
        if spans:
            first, last = min(spans, key=lambda span: span[1] - span[0])
            result[kernel_name(section.split(",")[0])] = collections.Counter(names[first : last + 1])
    return result


def line(counts: collections.Counter[str]) -> dict[str, float]:
    """Of one search loop: the model's cycles per score, and those of the epilogue alone."""
    whole = cycles_per_score(counts, SCORES)
    operands = {name for name in counts if name.split(".")[0] in ("HMMA", "LDSM")}
    rest = collections.Counter({name: count for name, count in counts.items() if name not in operands})
    products = matrix_instructions(list(counts.elements()))
    return {"products": products, **whole, "epilogue": cycles_per_score(rest, SCORES)["cycles"]}


def shared_bytes(name: str) -> int:
    """Dynamic shared memory of a search: three stages of 64 codes and their half norms, and of 128 rows if streamed; at
    least the rows, which pass through it once."""
    streamed = ">" in name
    row = 2 * (64 if streamed else int(name.split("=")[1]))
    return max(3 * ((128 if streamed else 0) * row + 64 * row + 64 * 4), 128 * row)


def table(chips: tuple[str, ...] = CHIPS, root: Path = ROOT) -> dict[str, Any]:
    """The whole budget, ready to be written."""
    lines: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for chip in chips:
            for source in SOURCES:
                cubin = compile_cubin(source, chip, Path(folder), root)
                counted = bodies(cubin) if source == "search" else {}
                for name, used in sorted(usage(cubin).items()):
                    found: dict[str, Any] = dict(used)
                    if name in counted:
                        found |= {"shared": shared_bytes(name)} | line(counted[name])
                    lines[f"sm_{chip} {name}"] = found
    return {"nvcc": nvcc_version(), "kernels": lines}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.name}")
    arguments = parser.parse_args()
    if nvcc() is None:
        parser.error("nvcc is not found: set CUDA_HOME to the CUDA toolkit")
    result = table()
    for name, found in result["kernels"].items():
        print(f"{name:40s}", "  ".join(f"{key} {value}" for key, value in found.items()))
    if arguments.write:
        TABLE.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
