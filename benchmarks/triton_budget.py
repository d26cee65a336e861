"""Instruction budget of the Triton kernels, counted from machine code without a GPU.

    python -m benchmarks.triton_budget            print the table
    python -m benchmarks.triton_budget --write    also write benchmarks/results/instruction_budget.json

The launchers themselves are run on CPU tensors with the launch intercepted, so exactly what would be launched on a chip
is what is compiled (by Triton for that chip), disassembled and counted; no list of configurations is kept beside them.

Pipe model. A multiprocessor has four schedulers; each issues one warp instruction per cycle, and comparisons,
selections and integer logic run at half rate. A warp instruction makes 32 scores, so for the loop around the product
    cycles per score = max(2 · half-rate instructions, all instructions) / scores
with both counts per warp. The tensor core's own time, D/16 cycles per score for 16-bit operands on sm_90, overlaps with
it when two programs share a multiprocessor. Nothing here is a time measured on a GPU.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from vqkernels.backends.triton import launch

TABLE = Path(__file__).parent / "results" / "instruction_budget.json"
# compute capability -> (multiprocessors, shared memory a program may use)
CHIPS = {(8, 0): (108, 163 * 1024), (9, 0): (132, 227 * 1024), (10, 0): (148, 227 * 1024)}
HALF_RATE = {
    "FMNMX", "FMNMX3", "FSETP", "FSEL", "SEL", "ISETP", "LOP3", "PLOP3", "VIADD", "VIMNMX", "VIADDMNMX",
    "PRMT", "SHF", "LEA", "IADD3", "IMNMX", "I2FP", "F2FP",
}  # fmt: skip
MATRIX = {"HMMA": "mma.sync", "HGMMA": "wgmma", "UTCHMMA": "tcgen05", "UTCQMMA": "tcgen05"}
_BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_POINTERS = {
    torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.float64: "*fp64",
    torch.int16: "*i16", torch.int32: "*i32", torch.int64: "*i64", torch.uint8: "*u8", torch.bool: "*i1",
}  # fmt: skip


@dataclasses.dataclass
class Launch:
    """One intercepted kernel launch, as the compiler sees it."""

    kernel: JITFunction
    signature: dict[str, str]
    constants: dict[str, Any]
    attributes: dict[tuple[int], list[list[Any]]]
    options: dict[str, Any]
    grid: Any

    @property
    def key(self) -> str:
        return repr((self.kernel.__name__, self.signature, self.constants, self.attributes, self.options))


@dataclasses.dataclass
class Program:
    """What the compiler made of a launch."""

    name: str
    ptx: str
    sass: str
    registers: int
    stack: int
    shared: int


@contextlib.contextmanager
def recorded(capability: tuple[int, int]) -> Iterator[list[Launch]]:
    """Collect the launches that the enclosed calls would make on a chip of this capability, without making them."""
    launches: list[Launch] = []

    def record(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.append(_describe(kernel, args, kwargs, grid))

    original = JITFunction.run
    JITFunction.run = record
    try:
        with launch.assume(capability, CHIPS[capability][0]):
            yield launches
    finally:
        JITFunction.run = original


def _describe(kernel: JITFunction, args: tuple[Any, ...], kwargs: dict[str, Any], grid: Any) -> Launch:
    names = kernel.arg_names
    values = dict(zip(names, args, strict=False)) | {k: v for k, v in kwargs.items() if k in names}
    options = {k: v for k, v in kwargs.items() if k not in names}
    signature, constants, attributes = {}, {}, {}
    for position, parameter in enumerate(kernel.params):
        name = parameter.name
        value = values[name] if name in values else parameter.default
        kind = "constexpr"
        if isinstance(value, torch.Tensor):
            kind = _POINTERS[value.dtype]
            attributes[(position,)] = [["tt.divisibility", 16]]
        elif isinstance(value, TensorDescriptor):
            kind = f"tensordesc<{_POINTERS[value.base.dtype][1:]}{list(value.block_shape)}>".replace(" ", "")
        elif isinstance(value, float) and not parameter.is_constexpr:
            kind = "fp32"
        elif isinstance(value, int) and not parameter.is_constexpr and value != 1:
            kind = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(position,)] = [["tt.divisibility", 16]]
        if kind == "constexpr":
            constants[name] = value
        signature[name] = kind
    return Launch(kernel, signature, constants, attributes, options, grid)


def compile_launch(one: Launch, capability: tuple[int, int]) -> Program:
    """Compile for a chip (Triton's cache makes this quick the second time) and read registers, spills and code back."""
    source = ASTSource(one.kernel, one.signature, one.constants, one.attributes)
    target = GPUTarget("cuda", capability[0] * 10 + capability[1], 32)
    compiled = triton.compile(source, target=target, options=one.options)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        sass = subprocess.run([_BIN / "nvdisasm", "-c", path], capture_output=True, text=True, check=True).stdout
        usage = subprocess.run([_BIN / "cuobjdump", "-res-usage", path], capture_output=True, text=True, check=False)
    text = usage.stdout + usage.stderr
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump gave no resource usage: {text[:200]}")
    # cuobjdump's stack is the frame, which is where spilled registers go
    return Program(
        one.kernel.__name__, compiled.asm["ptx"], sass, int(found[1]), int(found[2]), int(compiled.metadata.shared)
    )


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


def product_loop(sass: str) -> list[str]:
    """Opcodes of the smallest loop that holds a matrix instruction."""
    code, labels = instructions(sass)
    bodies = []
    for end, (opcode, operands) in enumerate(code):
        if opcode.startswith("BRA"):
            target = re.search(r"\.L_\w+", operands)
            begin = labels.get(target[0], end + 1) if target else end + 1
            body = [name for name, _ in code[begin : end + 1]]
            if begin <= end and any(name.split(".")[0] in MATRIX for name in body):
                bodies.append(body)
    return min(bodies, key=len, default=[])


def cycles_per_score(body: list[str], scores_per_warp: float) -> dict[str, float]:
    """Issue slots, half-rate instructions and modelled cycles per score of one loop body."""
    counts = collections.Counter(name.split(".")[0] for name in body)
    half = sum(count for name, count in counts.items() if name in HALF_RATE)
    return {
        "issue": round(len(body) / scores_per_warp, 3),
        "half_rate": round(half / scores_per_warp, 3),
        "cycles": round(max(2 * half, len(body)) / scores_per_warp, 3),
    }


def search_launches(capability: tuple[int, int]) -> dict[str, Launch]:
    """The candidate passes that `auto` can launch for large N, by epilogue and padded D."""
    from vqkernels.backends.triton.nearest import nearest

    found = {}
    for precision in ("fast", "exact"):
        for dim in (8, 32, 64, 128, 256):
            with recorded(capability) as launches:
                nearest(torch.empty(1, 1, 65536, dim), torch.empty(1, 1024, dim), None, "euclidean", precision)
            (one,) = [entry for entry in launches if entry.kernel.__name__ == "search_kernel"]
            found[f"{precision} D={dim}"] = one
    return found


def row(one: Launch, capability: tuple[int, int]) -> dict[str, Any]:
    """One line of the table."""
    program = compile_launch(one, capability)
    constants, warps = one.constants, one.options["num_warps"]
    line: dict[str, Any] = {
        "tile": f"{constants['BM']}x{constants['BK']}",
        "warps": warps,
        "stages": one.options["num_stages"],
        "registers": program.registers,
        "stack": program.stack,
        "shared": program.shared,
    }
    if constants["BD"] == constants["PADDED"]:  # a sliced product has its reduction outside the inner loop
        scores = constants["BM"] * constants["BK"] / 32 / warps
        line |= cycles_per_score(product_loop(program.sass), scores)
    return line


def table(capabilities: list[tuple[int, int]]) -> dict[str, Any]:
    """The whole budget, ready to be written."""
    lines = {}
    for capability in capabilities:
        for name, one in search_launches(capability).items():
            lines[f"sm_{capability[0]}{capability[1]} {name}"] = row(one, capability)
    return {"triton": triton.__version__, "search_kernel": lines}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.name}")
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("the interpreter compiles nothing: unset TRITON_INTERPRET")
    result = table(list(CHIPS))
    for name, line in result["search_kernel"].items():
        print(f"{name:22s}", "  ".join(f"{key} {value}" for key, value in line.items()))
    if arguments.write:
        TABLE.parent.mkdir(exist_ok=True)
        TABLE.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
