"""The launches of the Triton kernels, recorded instead of made, and compiled for a chip that need not be there.

The launchers themselves are run on meta tensors with the launch intercepted, so exactly what would be launched on a
chip is what is compiled, disassembled and counted; no list of configurations is kept beside them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
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

from benchmarks.budgets.machine_code import run_tool
from vqkernels.backends.triton import launch

# compute capability -> (multiprocessors, shared memory a program may use)
CHIPS = {(8, 0): (108, 163 * 1024), (9, 0): (132, 227 * 1024), (10, 0): (148, 227 * 1024)}
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

    @property
    def scores(self) -> float:
        """What a lane makes of a tile of rows and codes."""
        return self.constants["BM"] * self.constants["BK"] / 32 / self.options["num_warps"]


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
        sass = run_tool("nvdisasm", "-c", path) if disassemble else ""
        usage = run_tool("cuobjdump", "-res-usage", path)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump gave no resource usage: {usage[:200]}")
    # cuobjdump's stack is the frame, which is where spilled registers go
    return Program(
        one.kernel.__name__, compiled.asm["ptx"], sass, int(found[1]), int(found[2]), int(compiled.metadata.shared)
    )


def described(one: Launch, program: Program) -> dict[str, Any]:
    """The first entries of a line of the table."""
    return {
        "tile": f"{one.constants['BM']}x{one.constants['BK']}",
        "warps": one.options["num_warps"],
        "stages": one.options["num_stages"],
        "registers": program.registers,
        "stack": program.stack,
        "shared": program.shared,
    }


def chip_name(capability: tuple[int, int]) -> str:
    return f"sm_{capability[0]}{capability[1]}"


def products_of_a_tile(capability: tuple[int, int], constants: dict[str, Any], warps: int) -> int:
    """Matrix instructions that a warp issues for one [BM, PADDED] x [PADDED, BK] product of 16-bit numbers."""
    rows, codes, depth = constants["BM"], constants["BK"], constants["PADDED"] // 16
    if capability[0] == 8:  # 16 x 8 x 16 per warp
        return rows // 16 * (codes // 8) * depth // warps
    if capability[0] == 9:  # 64 x BK x 16 per four warps
        return rows // 64 * depth * 4 // warps
    return depth  # BM x BK x 16 per program
