"""Instruction budget of the entropy kernels; part of the table of the Triton kernels.

One line per chip, operand type, D and sweep: what one score, a (row, code) pair, costs in that sweep. A forward pass is
`partition` and `mean`, a backward pass `shift`, `gradient of z` and `gradient of the codebook`. The gradients are made
in slices of D, each with the scores anew, which the cost includes.

Pipe model, that of machine_code.py with two more pipes:
    cycles per score = max(all, 2 · half-rate, 8 · special functions, float32 (2 · on sm_80)) / scores
with counts per warp over the loop around a tile: its body once, and the loop over slices of D inside it as often as
it runs. Special functions (the exponential) leave 16 lanes of a multiprocessor per cycle, hence the 8; sm_80 has 64
float32 lanes, hence the 2.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.budgets.launches import Launch, chip_name, compile_launch, described, products_of_a_tile, recorded
from benchmarks.budgets.machine_code import Counts, by_kind, cycles_per_score, loops, matrix_instructions, repeated

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


def fmas(counts: Counts) -> int:
    """float32 multiply-adds of a thread."""
    kinds = by_kind(counts)
    return sum(FLOAT_PIPE[name] * count for name, count in kinds.items() if name.startswith("FFMA"))


def tile_counts(sass: str, one: Launch, capability: tuple[int, int]) -> Counts:
    """How often each opcode runs per tile and warp."""
    names, spans = loops(sass)
    around = [(a, b) for a, b in spans if any(name.startswith("MUFU.EX2") for name in names[a : b + 1])]
    if not around:
        raise ValueError("no loop holds an exponential")
    first, last = around[0]
    inner = [(a, b) for a, b in spans if first <= a and b <= last and (a, b) != (first, last)]
    counts = Counts(names[first : last + 1])
    if inner:
        a, b = inner[-1]
        inside, outside = names[a : b + 1], names[first:a] + names[b + 1 : last + 1]
        if once := matrix_instructions(inside):
            times, rest = divmod(products(one, capability) - matrix_instructions(outside), once)
        else:  # slices of D that one pass multiplies, from its FFMAs
            slices = round(fmas(Counts(inside)) / (one.scores * one.constants["BD"]))
            times, rest = divmod(one.constants["PADDED"] // one.constants["BD"], max(1, slices))
        if rest or times < 1:
            raise ValueError("the slices of a tile do not add up")
        counts = repeated(outside, inside, times)
    check(counts, one, capability)
    return counts


def products(one: Launch, capability: tuple[int, int]) -> int:
    """Matrix instructions of a warp per tile: those of the logits, and twice those of the gradient."""
    constants, warps = one.constants, one.options["num_warps"]
    total = products_of_a_tile(capability, constants, warps)
    if "BO" in constants:
        second = {"BM": constants["BM"], "BK": constants["BO"], "PADDED": constants["BK"]}
        total += 2 * products_of_a_tile(capability, second, warps)
    return total


def check(counts: Counts, one: Launch, capability: tuple[int, int]) -> None:
    """Refuse a count without every product: one FFMA per score and channel, or as many matrix instructions."""
    if matrix := matrix_instructions(list(counts.elements())):
        if matrix != products(one, capability):
            raise ValueError(f"{matrix} matrix instructions in a tile that takes {products(one, capability)}")
        return
    channels = one.constants["PADDED"] + one.constants.get("BO", 0)
    if not channels <= fmas(counts) / one.scores <= channels + 12:
        raise ValueError(f"{fmas(counts) / one.scores} FFMAs per score of {channels} products")


def line(one: Launch, capability: tuple[int, int]) -> dict[str, Any]:
    """One line of the table."""
    program = compile_launch(one, capability)
    padded = one.constants["PADDED"]
    scores = one.scores / (padded // one.constants.get("BO", padded))  # so often is a score made
    counts = tile_counts(program.sass, one, capability)
    kinds, figures = by_kind(counts), cycles_per_score(counts, scores)
    special = kinds["MUFU"] / scores
    floats = sum(times * kinds[name] for name, times in FLOAT_PIPE.items()) / scores
    pipes = [figures.pop("cycles"), 8 * special, 2 * floats if capability == (8, 0) else floats]
    figures |= {"special": round(special, 3), "float32": round(floats, 3), "cycles": round(max(pipes), 3)}
    return described(one, program) | figures


def table(capabilities: list[tuple[int, int]], dims: tuple[int, ...] = DIMS) -> dict[str, Any]:
    """{"sm_90 bf16 D=64 partition": line}."""
    return {
        f"{chip_name(capability)} {kind} D={dim} {name}": line(one, capability)
        for capability in capabilities
        for kind, dtype in OPERANDS.items()
        for dim in dims
        for name, one in sweeps(capability, dtype, dim).items()
    }
