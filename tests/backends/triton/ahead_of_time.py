"""Compiles what the launchers would launch and prints what came out, one JSON object per program.

    python tests/backends/triton/ahead_of_time.py [--all]

Results are kept in build/, keyed by kernel source, arguments, chip, Triton version and this file.

A process of its own: the tests' process runs Triton's interpreter, in which nothing can be compiled.
"""

import argparse
import hashlib
import json
import os
import re
import sys
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)
sys.path.insert(0, str(Path(__file__).parents[3]))

import torch
import triton

from benchmarks import triton_budget
from benchmarks.triton_budget import CHIPS, MATRIX, compile_launch, instructions, recorded
from vqkernels.backends.triton.nearest import nearest
from vqkernels.backends.triton.quantize import lookup, quantize, quantize_backward
from vqkernels.backends.triton.statistics import statistics

CACHE = Path(__file__).parents[3] / "build" / "ahead_of_time.json"
ROWS = 4096
QUICK = [(64, 1024, torch.float32, torch.float32, "euclidean", False)]
DTYPES = [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float16, torch.float16)]
EVERY = [
    *((dim, 1024, *DTYPES[0], "euclidean", False) for dim in (3, 32, 64, 128, 257, 512)),
    *((64, 1000, *types, "dot", True) for types in DTYPES),
    *((256, 16384, *types, "cosine", True) for types in DTYPES[:2]),
    *((dim, 1024, *DTYPES[0], "euclidean", False, 40) for dim in (32, 64, 128, 256)),
    (64, 1024, torch.float64, torch.float64, "euclidean", False),
    (256, 1024, torch.float64, torch.float64, "cosine", False),
]  # fmt: skip


def exercise(dim, codes, z_type, code_type, metric, masked, rows=ROWS):
    """Call every entry point once, on memory that nothing reads."""
    z = torch.empty(rows, dim, dtype=z_type)[None, None]
    codebook = torch.empty(1, codes, dim, dtype=code_type)
    mask = torch.ones(1, 1, rows, dtype=torch.bool) if masked else None
    nearest(z, codebook, mask, metric, "fast")
    *_, indices = quantize(z, codebook, mask, metric, "exact", True)[:2]
    indices.zero_()
    statistics(z, indices, codes, mask)
    lookup(z, codebook, indices, True)
    one = torch.ones(())
    for gradient in ("straight_through", "rotation"):
        quantize_backward(z, one, one, z, codebook, indices, gradient, True)


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


def cache_key(launch, capability):
    """Everything that can change what `describe` says."""
    tools = Path(__file__).read_text() + Path(triton_budget.__file__).read_text()
    parts = (launch.kernel.cache_key, launch.key, capability, triton.__version__, tools)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:24]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--all", action="store_true")
    everything = parser.parse_args().all
    known = json.loads(CACHE.read_text()) if CACHE.exists() else {}
    seen = set()
    for capability in CHIPS:
        for regime in EVERY if everything else QUICK:
            with recorded(capability) as launches:
                exercise(*regime)
            for launch in launches:
                key = cache_key(launch, capability)
                if key in seen:
                    continue
                seen.add(key)
                if key not in known:
                    known[key] = describe(launch, capability)
                    CACHE.parent.mkdir(exist_ok=True)
                    CACHE.write_text(json.dumps(known))
                print(json.dumps(known[key]), flush=True)


if __name__ == "__main__":
    main()
