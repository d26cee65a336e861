"""Compiles what the launchers would launch and prints what came out, one JSON object per program.

    python tests/backends/triton/ahead_of_time.py [--all]

A process of its own: the tests' process runs Triton's interpreter, in which nothing can be compiled.
"""

import argparse
import itertools
import json
import os
import re
import sys
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)
sys.path.insert(0, str(Path(__file__).parents[3]))

import torch

from benchmarks.triton_budget import CHIPS, MATRIX, compile_launch, instructions, recorded
from vqkernels.backends.triton.nearest import nearest
from vqkernels.backends.triton.quantize import quantize, quantize_backward
from vqkernels.backends.triton.statistics import statistics

ROWS = 4096
QUICK = [(64, 1024, torch.float32, torch.float32, "euclidean", False)]
DTYPES = [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float16, torch.float16)]
EVERY = [
    *((dim, 1024, *DTYPES[0], "euclidean", False) for dim in (3, 16, 32, 64, 128, 257, 512)),
    *((64, codes, *DTYPES[0], "euclidean", False) for codes in (5, 16384)),
    *((dim, 1000, *types, metric, True) for dim, types, metric in itertools.product((64, 256), DTYPES, ("dot", "cosine"))),
    *((dim, 1024, torch.float64, torch.float64, metric, False) for dim, metric in ((64, "euclidean"), (256, "cosine"))),
]  # fmt: skip


def exercise(dim, codes, z_type, code_type, metric, masked):
    """Call every entry point once, on memory that nothing reads."""
    z = torch.empty(ROWS, dim, dtype=z_type)[None, None]
    codebook = torch.empty(1, codes, dim, dtype=code_type)
    mask = torch.ones(1, 1, ROWS, dtype=torch.bool) if masked else None
    nearest(z, codebook, mask, metric, "fast")
    *_, indices = quantize(z, codebook, mask, metric, "exact", True)[:2]
    indices.zero_()
    statistics(z, indices, codes, mask)
    one = torch.ones(())
    quantize_backward(z, one, one, z, codebook, indices, True)


def describe(launch, capability):
    """What the tests want to know of one program."""
    program = compile_launch(launch, capability)
    names = {opcode.split(".")[0] for opcode, _ in instructions(program.sass)[0]}
    return {
        "kernel": program.name,
        "chip": list(capability),
        "constants": {name: value for name, value in launch.constants.items() if isinstance(value, int | str)},
        "registers": program.registers,
        "stack": program.stack,
        "shared": program.shared,
        "limit": CHIPS[capability][1],
        "matrix": sorted({MATRIX[name] for name in names & MATRIX.keys()}),
        "tf32": "TF32" in program.sass or "tf32" in program.ptx,
        "double_fma": len(re.findall(r"\bfma\.rn\.f64", program.ptx)),
        "machine_double_fma": program.sass.count("DFMA"),
        "float_atomics": len(re.findall(r"(?:atom|red)\.[a-z.]*\.(?:add|max|min)[a-z.]*\.f(?:16|32|64)", program.ptx)),
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--all", action="store_true")
    seen = set()
    everything = parser.parse_args().all
    for capability in CHIPS:
        for regime in EVERY if everything else QUICK:
            with recorded(capability) as launches:
                exercise(*regime)
            for launch in launches:
                if (capability, launch.key) not in seen:
                    seen.add((capability, launch.key))
                    print(json.dumps(describe(launch, capability)), flush=True)


if __name__ == "__main__":
    main()
