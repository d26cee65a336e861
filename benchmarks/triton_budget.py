"""Instruction budget of the Triton kernels, counted from machine code without a GPU.

    python -m benchmarks.triton_budget            print the table
    python -m benchmarks.triton_budget --write    also write benchmarks/results/instruction_budget.json

The launchers themselves are run on CPU tensors with the launch intercepted, so exactly what would be launched on a chip
is what is compiled (by Triton for that chip), disassembled and counted; no list of configurations is kept beside them.

Pipe model. A multiprocessor has four schedulers; each issues one warp instruction per cycle, and comparisons,
selections and integer logic run at half rate. A warp instruction makes 32 scores, so for the loop around the product
    cycles per score = max(2 · half-rate instructions, all instructions) / scores
with both counts per warp, over everything that one tile of codes costs. Up to D = 128 that is one pass of one loop.
Beyond, the product loops over slices of D inside the loop over tiles, with the reduction outside of it: the outer body
is counted once and the inner body as often as it runs, which the number of matrix instructions tells (what a tile
needs, less those outside of the inner loop, over those in it; a remainder is an error). Waits that stand out of line
count nothing. The tensor core's own time, D/16 cycles per score for 16-bit operands on sm_90, overlaps with it when two
programs share a multiprocessor. Nothing here is a time measured on a GPU. entropy_budget.py counts the entropy kernels
for the same table.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import itertools
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
            if value.storage_offset() * value.element_size() % 16 == 0:  # storage itself is aligned
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


def compile_launch(one: Launch, capability: tuple[int, int], disassemble: bool = True) -> Program:
    """Compile for a chip (Triton's cache makes this quick the second time) and read registers, spills and code back.
    Disassembling takes as long as compiling: without it `sass` is empty."""
    source = ASTSource(one.kernel, one.signature, one.constants, one.attributes)
    target = GPUTarget("cuda", capability[0] * 10 + capability[1], 32)
    compiled = triton.compile(source, target=target, options=one.options)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        sass = ""
        if disassemble:
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


def loops(code: list[tuple[str, str]], labels: dict[str, int]) -> list[tuple[int, int]]:
    """(first, last) instruction of every loop. Behind the last EXIT stand waits, which jump back but are no loops."""
    last = max((at for at, (opcode, _) in enumerate(code) if opcode == "EXIT"), default=len(code))
    found = []
    for end, (opcode, operands) in enumerate(code[:last]):
        target = re.search(r"\.L_\w+", operands) if opcode.startswith("BRA") else None
        if target and labels.get(target[0], end + 1) <= end:
            found.append((labels[target[0]], end))
    return found


def matrix_instructions(opcodes: list[str]) -> int:
    return sum(name.split(".")[0] in MATRIX for name in opcodes)


def tile_pass(sass: str, products: int) -> collections.Counter[str]:
    """How often each opcode runs per tile of codes, which takes `products` matrix instructions of one warp."""
    code, labels = instructions(sass)
    bodies = sorted(loops(code, labels), key=lambda span: span[1] - span[0])
    names = [opcode for opcode, _ in code]
    bodies = [(begin, end) for begin, end in bodies if matrix_instructions(names[begin : end + 1])]
    if not bodies:
        raise ValueError("no loop holds a matrix instruction")
    begin, end = bodies[0]
    inner = names[begin : end + 1]
    if matrix_instructions(inner) == products:
        return collections.Counter(inner)
    outside = [
        names[first:begin] + names[end + 1 : last + 1]
        for first, last in bodies[1:]
        if first <= begin and end <= last
    ]  # fmt: skip
    if not outside:
        raise ValueError(f"a loop of {matrix_instructions(inner)} matrix instructions cannot make a tile of {products}")
    trips, rest = divmod(products - matrix_instructions(outside[0]), matrix_instructions(inner))
    if rest or trips < 1:
        raise ValueError(f"the slices of a tile of {products} matrix instructions do not add up")
    times = {opcode: trips * count for opcode, count in collections.Counter(inner).items()}
    return collections.Counter(outside[0]) + collections.Counter(times)


def products_of_a_tile(capability: tuple[int, int], constants: dict[str, Any], warps: int) -> int:
    """Matrix instructions that a warp issues for one [BM, PADDED] x [PADDED, BK] product of 16-bit numbers."""
    rows, codes, depth = constants["BM"], constants["BK"], constants["PADDED"] // 16
    if capability[0] == 8:  # 16 x 8 x 16 per warp
        return rows // 16 * (codes // 8) * depth // warps
    if capability[0] == 9:  # 64 x BK x 16 per four warps
        return rows // 64 * depth * 4 // warps
    return depth  # BM x BK x 16 per program


def cycles_per_score(counts: collections.Counter[str], scores_per_warp: float) -> dict[str, float]:
    """Issue slots, half-rate instructions and modelled cycles per score."""
    half = sum(count for name, count in counts.items() if name.split(".")[0] in HALF_RATE)
    return {
        "issue": round(counts.total() / scores_per_warp, 3),
        "half_rate": round(half / scores_per_warp, 3),
        "cycles": round(max(2 * half, counts.total()) / scores_per_warp, 3),
    }


def search_launches(capability: tuple[int, int]) -> dict[str, Launch]:
    """The candidate pass of every entry of the table of tiles, by epilogue, D and number of rows."""
    from vqkernels.backends.triton import configs
    from vqkernels.backends.triton.nearest import nearest

    found = {}
    entries = [(b, size) for b, sizes in configs.TABLE[configs.family(capability)].items() for size in sizes]
    for precision, (bucket, size) in itertools.product(("fast", "exact"), entries):
        dim = 8 if bucket == 16 else bucket
        rows, name = {"few": (configs.FEW_ROWS, f" N<={configs.FEW_ROWS}"), "many": (65536, "")}[size]
        with recorded(capability) as launches:
            z, codebook = torch.empty(1, 1, rows, dim, device="meta"), torch.empty(1, 16384, dim, device="meta")
            nearest(z, codebook, None, "euclidean", precision)
        (one,) = [entry for entry in launches if entry.kernel.__name__ == "search_kernel"]
        found[f"{precision} D={dim}{name}"] = one
    return found


def residual_launches(capability: tuple[int, int]) -> dict[str, Launch]:
    """The chained search of residual quantization by D. Counted is its pass over the codes, which every row pays; not
    rounding, certificate and lookup, once a level, nor the float64 contract, whose share depends on the data."""
    from vqkernels.backends.triton import configs
    from vqkernels.backends.triton.residual import residual_quantize

    found = {}
    for dim in configs.CHAINED[configs.family(capability)]:
        with recorded(capability) as launches:
            z, codebooks = torch.empty(1, 1, 65536, dim, device="meta"), torch.empty(1, 8, 1024, dim, device="meta")
            residual_quantize(z, codebooks, None, "euclidean", "exact", False)
        (one,) = [entry for entry in launches if entry.kernel.__name__ == "residual_search_kernel"]
        found[f"exact D={dim}"] = one
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
    scores = constants["BM"] * constants["BK"] / 32 / warps
    products = products_of_a_tile(capability, constants, warps)
    return line | cycles_per_score(tile_pass(program.sass, products), scores)


def table(capabilities: list[tuple[int, int]]) -> dict[str, Any]:
    """The whole budget, ready to be written."""
    kernels = {"search_kernel": search_launches, "residual_search_kernel": residual_launches}
    lines: dict[str, dict[str, Any]] = {kernel: {} for kernel in kernels}
    for (kernel, launches), capability in itertools.product(kernels.items(), capabilities):
        for name, one in launches(capability).items():
            lines[kernel][f"sm_{capability[0]}{capability[1]} {name}"] = row(one, capability)
    return {"triton": triton.__version__} | lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.name}")
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("the interpreter compiles nothing: unset TRITON_INTERPRET")
    from benchmarks import entropy_budget

    result = table(list(CHIPS)) | {"entropy": entropy_budget.table(list(CHIPS))}
    for kernel in ("search_kernel", "residual_search_kernel", "entropy"):
        for name, line in result[kernel].items():
            print(f"{kernel} {name:44s}", "  ".join(f"{key} {value}" for key, value in line.items()))
    if arguments.write:
        TABLE.parent.mkdir(exist_ok=True)
        TABLE.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
