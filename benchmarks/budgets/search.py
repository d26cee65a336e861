"""Instruction budget of the Triton searches, plain and residual.

The pipe model is that of machine_code.py. Up to D = 128 a tile of codes is one pass of one loop. Beyond, the product
loops over slices of D inside the loop over tiles, with the reduction outside of it: the outer body is counted once and
the inner body as often as it runs, which the number of matrix instructions gives (what a tile needs, less those outside
of the inner loop, over those in it; a remainder is an error). The tensor core's own time, D/16 cycles per score for
16-bit operands on sm_90, overlaps with it when two programs share a multiprocessor.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import triton

from benchmarks.budgets.launches import Launch, chip_name, compile_launch, described, products_of_a_tile, recorded
from benchmarks.budgets.machine_code import Counts, cycles_per_score, loops, matrix_instructions, repeated


def tile_pass(sass: str, products: int) -> Counts:
    """How often each opcode runs per tile of codes, which takes `products` matrix instructions of one warp."""
    names, spans = loops(sass)
    bodies = [(begin, end) for begin, end in spans if matrix_instructions(names[begin : end + 1])]
    if not bodies:
        raise ValueError("no loop holds a matrix instruction")
    begin, end = bodies[0]
    inner = names[begin : end + 1]
    if matrix_instructions(inner) == products:
        return Counts(inner)
    around = [(first, last) for first, last in bodies[1:] if first <= begin and end <= last]
    if not around:
        raise ValueError(f"a loop of {matrix_instructions(inner)} matrix instructions cannot make a tile of {products}")
    outside = names[around[0][0] : begin] + names[end + 1 : around[0][1] + 1]
    trips, rest = divmod(products - matrix_instructions(outside), matrix_instructions(inner))
    if rest or trips < 1:
        raise ValueError(f"the slices of a tile of {products} matrix instructions do not add up")
    return repeated(outside, inner, trips)


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
    products = products_of_a_tile(capability, one.constants, one.options["num_warps"])
    return described(one, program) | cycles_per_score(tile_pass(program.sass, products), one.scores)


def table(capabilities: list[tuple[int, int]]) -> dict[str, Any]:
    """{"triton": version, kernel: {"sm_90 exact D=64": line}}."""
    kernels = {"search_kernel": search_launches, "residual_search_kernel": residual_launches}
    lines: dict[str, dict[str, Any]] = {kernel: {} for kernel in kernels}
    for (kernel, launches), capability in itertools.product(kernels.items(), capabilities):
        for name, one in launches(capability).items():
            lines[kernel][f"{chip_name(capability)} {name}"] = row(one, capability)
    return {"triton": triton.__version__} | lines
