"""Tile shapes of the entropy kernels, by architecture family and operand type: a table, as in configs.py.

16-bit operands go to the tensor core. float32 operands do not: TF32 would lose 13 bits, and logits are divided by the
temperature, so an error of 2^-11 of |z||e| is an error of the probabilities a hundred times that at a temperature of
1e-2. Splitting float32 into three tensor core products inside the loop costs ten and more instructions per score and
spills on sm_80, and with two 11-bit halves it still drops what an FMA keeps. So float32 is multiplied as it is
(input_precision "ieee"): one FFMA per channel, 24-bit products and sums. float64 likewise in float64.
Narrow slices keep the operands of the FMA tiles, which the compiler holds in registers, from spilling; so do two stages
for float64, whose slices would otherwise be unrolled.
"""

from __future__ import annotations

from dataclasses import dataclass

from vqkernels.backends.triton import configs


@dataclass(frozen=True)
class EntropyConfig:
    """One compiled shape: BM resident rows or codes by BK of the others, D in slices of BD for the logits and of BO for
    the gradient; a program of the gradient makes one slice of BO channels and repeats the logits for it."""

    resident: int
    passing: int
    slice_dim: int
    gradient_passing: int
    gradient_dim: int
    warps: int
    stages: int


# family -> operand type -> (BM, BK, BD, BK and BO of the gradient, warps, stages)
TABLE: dict[int, dict[str, tuple[int, int, int, int, int, int, int]]] = {
    80: {
        "half": (64, 64, 64, 32, 128, 4, 3),
        "single": (64, 64, 16, 32, 128, 4, 2),
        "double": (32, 32, 16, 16, 32, 4, 2),
    },
    90: {
        "half": (64, 128, 64, 64, 128, 4, 3),
        "single": (64, 64, 16, 32, 128, 4, 2),
        "double": (32, 32, 16, 16, 32, 4, 2),
    },
    100: {
        "half": (128, 64, 64, 64, 128, 8, 3),
        "single": (64, 64, 16, 32, 128, 4, 2),
        "double": (32, 32, 16, 16, 32, 4, 2),
    },
}


def entropy_config(capability: tuple[int, int] | str, operand_bytes: int, padded: int) -> EntropyConfig:
    """The shape for operands of 2, 4 or 8 bytes with `padded` channels."""
    kind = configs.family(capability)
    if isinstance(kind, str):
        return EntropyConfig(32, 32, min(64, padded), 32, min(64, padded), 4, 1)
    resident, passing, slice_dim, gradient_passing, gradient_dim, warps, stages = TABLE[kind][
        {2: "half", 4: "single", 8: "double"}[operand_bytes]
    ]
    gradient_dim = min(gradient_dim, padded)
    if padded % gradient_dim:
        gradient_dim = 64  # beyond 128, D' is a multiple of that
    return EntropyConfig(resident, passing, min(slice_dim, padded), gradient_passing, gradient_dim, warps, stages)
