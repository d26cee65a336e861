"""Peak memory of one training step of the layer, above its inputs: `python -m benchmarks.memory`.

Linux only: the peak resident set is reset through /proc/self/clear_refs and read back as VmHWM. The first, tiny step
    warms
up what is allocated once (threads, autograd).
"""

import argparse
from pathlib import Path

import torch

from vqkernels.nn import VectorQuantizer


def resident(field: str) -> float:
    """VmRSS (now) or VmHWM (peak) in MB."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) / 1000


def training_step(layer: VectorQuantizer, z: torch.Tensor) -> None:
    quantized, _, loss = layer(z)
    (quantized.sum() + loss).backward()


def peak_above_inputs(rows: int, codebook_size: int, dim: int, ema_decay: float | None) -> float:
    """MB at the peak of forward and backward, above the memory that holds z, the codebook and the layer's state."""
    layer = VectorQuantizer(dim, codebook_size, ema_decay=ema_decay)
    training_step(VectorQuantizer(dim, 16, ema_decay=ema_decay), torch.randn(1024, dim, requires_grad=True))
    z = torch.randn(rows, dim, requires_grad=True)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    training_step(layer, z)
    return resident("VmHWM") - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=65536)
    parser.add_argument("--codebook-size", type=int, default=16384)
    parser.add_argument("--dim", type=int, default=64)
    options = parser.parse_args()
    matrix = options.rows * options.codebook_size * 4 / 1e6
    print(f"N={options.rows} K={options.codebook_size} D={options.dim}: one N x K float32 matrix is {matrix:.0f} MB")
    for name, decay in (("codebook loss", None), ("EMA", 0.99)):
        peak = peak_above_inputs(options.rows, options.codebook_size, options.dim, decay)
        print(f"  training step, {name}: {peak:.0f} MB above its inputs")


if __name__ == "__main__":
    main()
