"""Machine code of NVIDIA's chips: the tools that read it, its loops, and the pipe model.

Pipe model. A multiprocessor has four schedulers; each issues one warp instruction per cycle, and comparisons,
selections and integer logic run at half rate. A warp instruction makes 32 scores, so for the loop around the product
    cycles per score = max(2 · half-rate instructions, all instructions) / scores
with both counts per warp, over everything that one tile of codes costs. The tensor core's own time overlaps with it.
"""

import collections
import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

Counts = collections.Counter[str]  # how often each opcode runs
HALF_RATE = {
    "FMNMX", "FMNMX3", "FSETP", "FSEL", "SEL", "ISETP", "LOP3", "PLOP3", "VIADD", "VIMNMX", "VIADDMNMX",
    "PRMT", "SHF", "LEA", "IADD3", "IMNMX", "I2FP", "F2FP",
}  # fmt: skip
MATRIX = {"HMMA": "mma.sync", "HGMMA": "wgmma", "UTCHMMA": "tcgen05", "UTCQMMA": "tcgen05"}


def run_tool(name: str, *arguments: str | Path) -> str:
    """What cuobjdump or nvdisasm prints: those that Triton brings, or the toolkit's."""
    spec = importlib.util.find_spec("triton")
    folders = [f"{folder}/backends/nvidia/bin" for folder in (spec and spec.submodule_search_locations) or ()]
    found = shutil.which(name, path=os.pathsep.join([*folders, os.environ.get("PATH", "")]))
    if found is None:
        raise RuntimeError(f"{name} is not found: pip install triton, which brings it")
    done = subprocess.run([found, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr[:200]}")
    return done.stdout + done.stderr


def instructions(sass: str) -> tuple[list[tuple[str, str]], dict[str, int]]:
    """(opcode, operands) of every instruction, and where each label points."""
    code: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(code)
        elif found := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*?);", line):
            code.append((found[1], found[2]))
    return code, labels


def loops(sass: str) -> tuple[list[str], list[tuple[int, int]]]:
    """Every opcode, and (first, last) instruction of every loop, the shortest first.

    Behind the last EXIT there are waits, which jump back but are no loops.
    """
    code, labels = instructions(sass)
    last = max((at for at, (opcode, _) in enumerate(code) if opcode == "EXIT"), default=len(code))
    found = []
    for end, (opcode, operands) in enumerate(code[:last]):
        target = re.search(r"\.L_\w+", operands) if opcode.startswith("BRA") else None
        if target and labels.get(target[0], end + 1) <= end:
            found.append((labels[target[0]], end))
    return [opcode for opcode, _ in code], sorted(found, key=lambda span: span[1] - span[0])


def matrix_instructions(opcodes: list[str]) -> int:
    return sum(name.split(".")[0] in MATRIX for name in opcodes)


def by_kind(counts: Counts) -> Counts:
    """The counts without what follows the opcodes' first dot."""
    found = Counts()
    for name, count in counts.items():
        found[name.split(".")[0]] += count
    return found


def repeated(outside: list[str], inside: list[str], times: int) -> Counts:
    """The counts of a loop's body, in which another loop runs so many times."""
    counts = Counts(outside)
    for name, count in Counts(inside).items():
        counts[name] += times * count
    return counts


def cycles_per_score(counts: Counts, scores: float) -> dict[str, float]:
    """Issue slots, half-rate instructions and modelled cycles; `scores` are those of a lane."""
    half = sum(by_kind(counts)[name] for name in HALF_RATE)
    figures = {"issue": counts.total(), "half_rate": half, "cycles": max(2 * half, counts.total())}
    return {name: round(figure / scores, 3) for name, figure in figures.items()}
