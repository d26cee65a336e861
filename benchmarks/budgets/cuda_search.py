"""Registers, shared memory and instructions per score of the CUDA search.

Compiles csrc/cuda/search.cu and nearest.cu as cuda.py does. The loop around the products is counted by the pipe model
of machine_code.py, over one pass of the loop, which for a lane is 64 scores. `epilogue` is the same without the
products and their operand loads, which the tensor core's own time (D / 8 cycles per score on sm_80, D / 16 at best on
sm_90) can hide behind. Beyond D = 128 one pass is a slice of 64 channels, and the reduction, once per tile, is counted
in each: an upper bound.
"""

import re
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.budgets import RESULTS
from benchmarks.budgets.cuda import CHIPS, ROOT, SEARCH, compile_source, release
from benchmarks.budgets.machine_code import Counts, by_kind, cycles_per_score, loops, matrix_instructions, run_tool

TABLE = RESULTS / "cuda_search_budget.json"
SCORES = 32 * 64 // 32  # 32 rows by 64 codes of a warp's pass, per lane


def kernel_name(mangled: str) -> str:
    """ "search D=64" or "rescore" from a mangled name."""
    if found := re.search(r"search_kernelILi(\d+)ELb([01])E", mangled):
        return "search D>128, a slice of 64" if found[2] == "1" else f"search D={found[1]}"
    found = re.search(r"\d+([a-z]+)_kernel", mangled)
    if found is None:
        raise ValueError(f"no kernel's name: {mangled}")
    return found[1]


def bodies(cubin: Path) -> dict[str, Counts]:
    """How often each opcode is in the smallest loop of products of every kernel that has one."""
    result = {}
    for section in re.split(r"\n\s*\.section\s+\.text\.", run_tool("nvdisasm", "-c", cubin))[1:]:
        names, spans = loops(section)
        holding = [names[a : b + 1] for a, b in spans if matrix_instructions(names[a : b + 1])]
        if holding:
            result[kernel_name(section.split(",")[0])] = Counts(holding[0])
    return result


def line(counts: Counts) -> dict[str, float]:
    """Of one search loop: the model's cycles per score, and those of the epilogue alone."""
    rest = Counts({name: count for name, count in counts.items() if name.split(".")[0] not in ("HMMA", "LDSM")})
    epilogue = cycles_per_score(rest, SCORES)["cycles"]
    return {"products": by_kind(counts)["HMMA"], **cycles_per_score(counts, SCORES), "epilogue": epilogue}


def shared_bytes(name: str) -> int:
    """Dynamic shared memory of a search: three stages of 64 codes and their half norms, and of 128 rows if streamed; at
    least the rows, which pass through it once."""
    streamed = ">" in name
    row = 2 * (64 if streamed else int(name.split("=")[1]))
    return max(3 * ((128 if streamed else 0) * row + 64 * row + 64 * 4), 128 * row)


def table(
    chips: tuple[str, ...] = CHIPS, root: Path = ROOT, sources: tuple[str, ...] = SEARCH
) -> dict[str, Any]:  # fmt: skip
    """The whole budget: {"nvcc": release, "kernels": {"sm_80 search D=64": line}}."""
    lines: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for chip in chips:
            for source in sources:
                cubin = Path(folder) / f"{source}_{chip}.cubin"
                kernels = compile_source(root / "csrc" / "cuda" / f"{source}.cu", chip, cubin)
                counted = bodies(cubin) if source == "search" else {}
                used = {kernel_name(mangled): numbers for mangled, numbers in kernels.items()}
                for name, numbers in sorted(used.items()):
                    found: dict[str, Any] = {key: numbers[key] for key in ("registers", "stack")}
                    if name in counted:
                        found |= {"shared": shared_bytes(name)} | line(counted[name])
                    lines[f"{chip} {name}"] = found
    return {"nvcc": release(), "kernels": lines}
