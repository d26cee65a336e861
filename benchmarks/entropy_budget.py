"""Instruction budget of the entropy kernels, counted from machine code without a GPU; part of triton_budget.py's table.

    python -m benchmarks.entropy_budget           print the table

One line per chip, operand type, D and sweep: what one score, a (row, code) pair, costs in that sweep. A forward pass is
`partition` and `mean`, a backward pass `shift`, `gradient of z` and `gradient of the codebook`. The gradients are made
in slices of D, each with the scores anew, which the cost includes.

Pipe model, as in triton_budget.py, with two more pipes. A warp instruction makes 32 scores, so
    cycles per score = max(all, 2 · half-rate, 8 · special functions, float32 (2 · on sm_80)) / scores
with counts per warp over the loop around a tile: its body once, and the loop over slices of D inside it as often as
it runs. Special functions (the exponential) leave 16 lanes of a multiprocessor per cycle, hence the 8; sm_80 has 64
float32 lanes, hence the 2. The tensor core's own time overlaps. Nothing here is a time measured on a GPU.
"""

from __future__ import annotations

import collections
from typing import Any

import torch

from benchmarks.triton_budget import (
    CHIPS,
    HALF_RATE,
    Launch,
    compile_launch,
    instructions,
    loops,
    matrix_instructions,
    products_of_a_tile,
    recorded,
)

FLOAT_PIPE = {"FFMA": 1, "FADD": 1, "FMUL": 1, "FFMA2": 2, "FADD2": 2, "FMUL2": 2}  # sm_100 has pairs
OPERANDS = {"fp32": torch.float32, "bf16": torch.bfloat16}
DIMS = (32, 64, 256)
ROWS, CODES = 65536, 16384


def sweeps(capability: tuple[int, int], kind: torch.dtype, dim: int) -> dict[str, Launch]:
    """The launches of one forward and backward pass that see every score."""
    from vqkernels.backends.triton.entropy import entropy, entropy_backward

    with recorded(capability) as launches, torch.device("meta"):
        z, codebook = torch.empty(1, 1, ROWS, dim, dtype=kind), torch.empty(1, CODES, dim, dtype=kind)
        _, _, *kept = entropy(z, codebook, None, "euclidean", 1.0)
        grads = torch.empty(1)
        entropy_backward(grads, grads, z, codebook, None, *kept, "euclidean", 1.0, True)
    found = {}
    for one in launches:
        name = one.kernel.__name__.removesuffix("_kernel")
        if name == "gradient":
            name = "gradient of the codebook" if one.constants["CODES"] else "gradient of z"
        if name in ("partition", "mean", "shift") or name.startswith("gradient"):
            found[name] = one
    return found


def slices_per_pass(opcodes: list[str], scores: float, depth: int) -> int:
    """How many slices of D one pass of a loop multiplies, from its FFMAs per thread: `depth` channels per slice."""
    return round(fmas(collections.Counter(opcodes)) / (scores * depth))


def fmas(counts: collections.Counter[str]) -> int:
    """float32 multiply-adds of a thread."""
    return sum(FLOAT_PIPE[name.split(".")[0]] * count for name, count in counts.items() if name.startswith("FFMA"))


def tile_counts(sass: str, one: Launch, capability: tuple[int, int]) -> collections.Counter[str]:
    """How often each opcode runs per tile and warp."""
    code, labels = instructions(sass)
    names = [opcode for opcode, _ in code]
    bodies = sorted(loops(code, labels), key=lambda span: span[1] - span[0])
    around = [(a, b) for a, b in bodies if any(name.startswith("MUFU.EX2") for name in names[a : b + 1])]
    if not around:
        raise ValueError("no loop holds an exponential")
    first, last = around[0]
    inner = [(a, b) for a, b in bodies if first <= a and b <= last and (a, b) != (first, last)]
    constants, warps = one.constants, one.options["num_warps"]
    scores = constants["BM"] * constants["BK"] / 32 / warps
    times = 1
    if inner:
        (a, b) = inner[-1]
        inside, outside = names[a : b + 1], names[first:a] + names[b + 1 : last + 1]
        if matrix_instructions(inside):
            times, rest = divmod(
                products(one, capability) - matrix_instructions(outside), matrix_instructions(inside)
            )  # fmt: skip
        else:
            at_once = slices_per_pass(inside, scores, constants["BD"])
            times, rest = divmod(constants["PADDED"] // constants["BD"], max(1, at_once))
        if rest or times < 1:
            raise ValueError("the slices of a tile do not add up")
        counts = collections.Counter(outside)
        for name, count in collections.Counter(inside).items():
            counts[name] += times * count
    else:
        counts = collections.Counter(names[first : last + 1])
    check(counts, one, capability, scores)
    return counts


def products(one: Launch, capability: tuple[int, int]) -> int:
    """Matrix instructions of a warp per tile: those of the logits, and twice those of the gradient."""
    constants, warps = one.constants, one.options["num_warps"]
    total = products_of_a_tile(capability, constants, warps)
    if "BO" in constants:
        second = {"BM": constants["BM"], "BK": constants["BO"], "PADDED": constants["BK"]}
        total += 2 * products_of_a_tile(capability, second, warps)
    return total


def check(
    counts: collections.Counter[str], one: Launch, capability: tuple[int, int], scores: float
) -> None:  # fmt: skip
    """Refuse a count without every product: one FFMA per score and channel, or as many matrix instructions."""
    constants = one.constants
    matrix = sum(count for name, count in counts.items() if matrix_instructions([name]))
    if matrix:
        if matrix != products(one, capability):
            raise ValueError(f"{matrix} matrix instructions in a tile that takes {products(one, capability)}")
        return
    channels = constants["PADDED"] + constants.get("BO", 0)
    if not channels <= fmas(counts) / scores <= channels + 12:
        raise ValueError(f"{fmas(counts) / scores} FFMAs per score of {channels} products")


def line(one: Launch, capability: tuple[int, int]) -> dict[str, Any]:
    """One line of the table."""
    program = compile_launch(one, capability)
    constants, warps = one.constants, one.options["num_warps"]
    scores = constants["BM"] * constants["BK"] / 32 / warps
    scores /= constants["PADDED"] // constants.get("BO", constants["PADDED"])  # so often is a score made
    counts = tile_counts(program.sass, one, capability)
    short = collections.Counter[str]()
    for name, count in counts.items():
        short[name.split(".")[0]] += count
    half = sum(short[name] for name in HALF_RATE)
    floats = sum(times * short[name] for name, times in FLOAT_PIPE.items())
    pipes = [counts.total(), 2 * half, 8 * short["MUFU"], 2 * floats if capability == (8, 0) else floats]
    return {
        "tile": f"{constants['BM']}x{constants['BK']}",
        "warps": warps,
        "stages": one.options["num_stages"],
        "registers": program.registers,
        "stack": program.stack,
        "shared": program.shared,
        "issue": round(counts.total() / scores, 3),
        "half_rate": round(half / scores, 3),
        "special": round(short["MUFU"] / scores, 3),
        "float32": round(floats / scores, 3),
        "cycles": round(max(pipes) / scores, 3),
    }


def table(capabilities: list[tuple[int, int]], dims: tuple[int, ...] = DIMS) -> dict[str, Any]:
    """{"sm_90 bf16 D=64 partition": line}."""
    return {
        f"sm_{capability[0]}{capability[1]} {kind} D={dim} {name}": line(one, capability)
        for capability in capabilities
        for kind, dtype in OPERANDS.items()
        for dim in dims
        for name, one in sweeps(capability, dtype, dim).items()
    }


def main() -> None:
    for name, entry in table(list(CHIPS)).items():
        print(f"{name:44s}", "  ".join(f"{key} {value}" for key, value in entry.items()))


if __name__ == "__main__":
    main()
