"""Entropies of soft assignments with Triton, and their gradients.

    entropy_pack.py      z and codebook to contiguous operands, centred and without NaN, infinities and masked rows
    entropy_forward.py   log partition and entropy of every row; then the mean assignment
    entropy_backward.py  the gradients, by recomputing the probabilities
    entropy_finish.py    partial sums to the tensors asked for

Accuracy. Products, logits and probabilities are float32 (never TF32; sums across programs float64), float64 where z or
the codebook is. Inputs that are both bf16 or both fp16 have exact products and the tensor core's float32 sums. A logit
then carries an absolute error of about 2^-23 |z||e|/τ after centring, and a probability the same relative one.
Scratch is O((N + K)·D): the packed operands, and partial results of at most 1 + N/K splits of the rows or 1 + K/N of
the codes. No step waits for the device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton

from vqkernels.backends.triton import configs
from vqkernels.backends.triton.entropy_backward import gradient_kernel, lift_kernel, shift_kernel
from vqkernels.backends.triton.entropy_configs import EntropyConfig, entropy_config
from vqkernels.backends.triton.entropy_finish import code_finish_kernel, row_finish_kernel
from vqkernels.backends.triton.entropy_forward import mean_kernel, partition_kernel, partition_merge_kernel
from vqkernels.backends.triton.entropy_pack import entropy_codes_kernel, entropy_rows_kernel
from vqkernels.backends.triton.launch import (
    FUSED_ROUNDING,
    capability,
    interpreted,
    multiprocessors,
    on_device,
    registers,
)
from vqkernels.backends.triton.nearest import CENTRE_SAMPLE
from vqkernels.backends.triton.pack import centre_kernel
from vqkernels.backends.triton.rows import STATE
from vqkernels.backends.triton.views import KEY_ROWS, bytes_of, mask_strides, slab, wide

MERGE_ROWS = 128
SPLIT_ROWS = 1 << 16  # float32 sums over rows are no longer than this where scratch allows


@dataclass
class Operands:
    """What the sweeps multiply; see entropy_pack.py."""

    rows: torch.Tensor  # (H·R', D')
    status: torch.Tensor  # (H, R') int32
    codes: torch.Tensor  # (H·K', D')
    bias: torch.Tensor  # (H, K'), of the type of sums
    scale: torch.Tensor  # (1,) float64: logit in binary units per dot product
    config: EntropyConfig
    padded: int  # D'
    padded_rows: int
    padded_codes: int

    @property
    def counted(self) -> torch.Tensor:
        """Rows that count (H,), at least 1, float64."""
        return torch.count_nonzero(self.status == 1, dim=1).clamp_min(1).to(torch.float64)

    def options(self) -> dict[str, Any]:
        """How every sweep is compiled."""
        return {
            "INTERPRETED": interpreted(),
            "num_warps": self.config.warps,
            "num_stages": self.config.stages,
            **registers(True),
            **FUSED_ROUNDING,
        }


def entropy(
    z: torch.Tensor, codebook: torch.Tensor, mask: torch.Tensor | None, metric: str, temperature: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(sample entropy (H,) float64, codebook entropy (H,) float64, row entropy (H, R), log partition (H, R), mean
    assignment (H, K)), the last three float32, or float64 where z or the codebook is; entropies in nats.

    z (B, H, P, D) with any strides, R = B·P; codebook (H, K, D); mask (B, H, P) bool or None, True where a row counts.
    """
    batch, heads, positions, _ = z.shape
    rows, codes = batch * positions, codebook.shape[1]
    real = torch.float64 if wide(z) or wide(codebook) else torch.float32
    row_entropy = torch.empty(heads, rows, dtype=real, device=z.device)
    log_partition = torch.empty_like(row_entropy)
    if rows == 0 or heads == 0 or codes == 0:
        none = torch.zeros(2, heads, dtype=torch.float64, device=z.device)
        mean = torch.zeros(heads, codes, dtype=real, device=z.device)
        return none[0], none[1], row_entropy.zero_(), log_partition.zero_(), mean
    with on_device(z):
        packed = pack(z, codebook, mask, metric, temperature)
        partial = partition(packed, rows, row_entropy, log_partition)
        sample = partial.sum(1) / packed.counted
        mean = mean_assignment(packed, rows, log_partition)[:, :codes] / packed.counted[:, None]
        usage = torch.where(sample.isnan(), torch.nan, torch.special.entr(mean).sum(1))
    return sample, usage, row_entropy, log_partition, mean.to(real)


def entropy_backward(
    grad_sample: torch.Tensor,
    grad_codebook_entropy: torch.Tensor,
    z: torch.Tensor,
    codebook: torch.Tensor,
    mask: torch.Tensor | None,
    row_entropy: torch.Tensor,
    log_partition: torch.Tensor,
    mean_assignment: torch.Tensor,
    metric: str,
    temperature: float,
    codebook_gradient: bool,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(grad_z like z, or `out` filled; contiguous grad_codebook, or empty if not wanted). Incoming gradients are (H,),
    the rest what entropy() was given and returned."""
    batch, heads, positions, dim = z.shape
    rows, codes = batch * positions, codebook.shape[1]
    grad_z = torch.empty_like(z) if out is None else out
    grad_codebook = torch.empty(codebook.shape if codebook_gradient else 0, dtype=codebook.dtype, device=z.device)
    if rows == 0 or heads == 0 or codes == 0:
        return grad_z.zero_(), grad_codebook.zero_()
    with on_device(z):
        packed = pack(z, codebook, mask, metric, temperature)
        grads = torch.stack([grad_sample, grad_codebook_entropy]).to(torch.float64)
        largest = grads.abs().amax(0)
        grads = grads / torch.where(largest > 0, largest, 1.0)
        unit = (2.0 if metric == "euclidean" else 1.0) / temperature
        factor = largest * unit / packed.counted
        alpha = grads[0] * -math.log(2.0)
        log_mean = torch.where(mean_assignment > 0, mean_assignment, 1.0).to(torch.float64).log()
        log_mean = torch.nn.functional.pad(log_mean, (0, packed.padded_codes - codes))
        sink = (-grads[1][:, None] * log_mean).to(packed.bias.dtype)
        lift, logit = row_lifts(packed, rows, row_entropy, log_partition, log_mean.to(packed.bias.dtype), grads)
        partial, _, splits = gradient(packed, alpha, logit, lift, sink, of_codes=False)
        row_finish_kernel[(triton.cdiv(rows, KEY_ROWS), heads)](
            partial, factor, packed.status, row_entropy, grad_z,
            rows, packed.padded_rows, positions, splits, *grad_z.stride(),
            DIM=dim, PADDED=packed.padded, BM=KEY_ROWS, BD=slab(dim), INTERPRETED=interpreted(),
            **registers(True), **FUSED_ROUNDING,
        )  # fmt: skip
        del partial
        if codebook_gradient:
            partial, sums, splits = gradient(packed, alpha, logit, lift, sink, of_codes=True)
            code_finish_kernel[(triton.cdiv(codes, KEY_ROWS), heads)](
                partial, sums, factor, packed.codes, packed.bias, grad_codebook,
                codes, packed.padded_codes, splits,
                DIM=dim, PADDED=packed.padded, BM=KEY_ROWS, BD=slab(dim), SQUARED=metric == "euclidean",
                INTERPRETED=interpreted(), **registers(True), **FUSED_ROUNDING,
            )  # fmt: skip
    return grad_z, grad_codebook


def pack(
    z: torch.Tensor, codebook: torch.Tensor, mask: torch.Tensor | None, metric: str, temperature: float
) -> Operands:
    """Operands of the sweeps from z (B, H, P, D) and codebook (H, K, D)."""
    batch, heads, positions, dim = z.shape
    rows, codes = batch * positions, codebook.shape[1]
    double = wide(z) or wide(codebook)
    exact = z.dtype == codebook.dtype and z.element_size() == 2  # the tensor core multiplies them exactly
    real = torch.float64 if double else torch.float32
    padded = configs.padded_dim(dim)
    config = entropy_config(capability(z.device), 2 if exact else real.itemsize, padded)
    block = max(config.resident, config.passing, config.gradient_passing, configs.PACK_ROWS)
    padded_rows, padded_codes = (triton.cdiv(size, block) * block for size in (rows, codes))
    device, squared = z.device, metric == "euclidean"
    binary = (2.0 if squared else 1.0) / temperature / math.log(2.0)
    result = Operands(
        rows=torch.empty(heads * padded_rows, padded, dtype=z.dtype if exact else real, device=device),
        status=torch.empty(heads, padded_rows, dtype=torch.int32, device=device),
        codes=torch.empty(heads * padded_codes, padded, dtype=z.dtype if exact else real, device=device),
        bias=torch.empty(heads, padded_codes, dtype=real, device=device),
        scale=torch.full((1,), binary, dtype=torch.float64, device=device),
        config=config,
        padded=padded,
        padded_rows=padded_rows,
        padded_codes=padded_codes,
    )
    centre = torch.empty(heads, padded, dtype=torch.float32, device=device)
    state = torch.empty(heads, STATE.value, dtype=torch.int32, device=device)
    centre_kernel[(triton.cdiv(padded, 16), heads)](
        codebook, centre, state, codes, *codebook.stride(),
        DIM=dim, PADDED=padded, BD=16, SAMPLE=CENTRE_SAMPLE, CENTRED=not exact, METRIC=metric,
        **registers(True), **FUSED_ROUNDING,
    )  # fmt: skip
    slab = min(padded, 32)
    entropy_rows_kernel[(padded_rows // configs.PACK_ROWS, heads)](
        z, centre, bytes_of(mask), result.rows, result.status,
        rows, padded_rows, positions, *z.stride(), *mask_strides(mask),
        DIM=dim, PADDED=padded, BM=configs.PACK_ROWS, BD=slab, WIDE=double, CENTRED=squared and not exact,
        MASKED=mask is not None, **registers(double), **FUSED_ROUNDING,
    )  # fmt: skip
    entropy_codes_kernel[(padded_codes // configs.PACK_ROWS, heads)](
        codebook, centre, result.scale, result.codes, result.bias, codes, padded_codes, *codebook.stride(),
        DIM=dim, PADDED=padded, BM=configs.PACK_ROWS, BD=slab, WIDE=double, CENTRED=not exact,
        SQUARED=squared, **registers(True), **FUSED_ROUNDING,
    )  # fmt: skip
    return result


def shared_out(packed: Operands, passing_codes: bool, block: int, passing: int, slices: int = 1) -> tuple[int, int]:
    """(tiles of the passing side per split, splits): two programs per multiprocessor, scratch within O((N + K)·D)."""
    codes, rows = packed.padded_codes, packed.padded_rows
    resident, moving = (rows, codes) if passing_codes else (codes, rows)
    tiles = moving // passing
    wanted = triton.cdiv(2 * multiprocessors(packed.rows.device), resident // block * slices * len(packed.bias))
    wanted = wanted if passing_codes else max(wanted, triton.cdiv(rows, SPLIT_ROWS))
    per_split = triton.cdiv(tiles, min(tiles, wanted, 1 + moving // resident))
    return per_split, triton.cdiv(tiles, per_split)


def partition(packed: Operands, rows: int, row_entropy: torch.Tensor, log_partition: torch.Tensor) -> torch.Tensor:
    """Fill both (H, R); returns the sums of row entropies by block (H, blocks) float64."""
    config, heads = packed.config, len(packed.bias)
    per_split, splits = shared_out(packed, True, config.resident, config.passing)
    top, total, tilt = packed.bias.new_empty(3, splits, heads, packed.padded_rows)
    partition_kernel[(packed.padded_rows // config.resident, splits, heads)](
        packed.rows, packed.codes, packed.bias, packed.scale, top, total, tilt,
        packed.padded_rows, packed.padded_codes, per_split,
        PADDED=packed.padded, BM=config.resident, BK=config.passing, BD=config.slice_dim, **packed.options(),
    )  # fmt: skip
    blocks = triton.cdiv(rows, MERGE_ROWS)
    partial = torch.empty(heads, blocks, dtype=torch.float64, device=row_entropy.device)
    partition_merge_kernel[(blocks, heads)](
        top, total, tilt, packed.status, row_entropy, log_partition, partial, rows, packed.padded_rows, splits,
        BM=MERGE_ROWS, **registers(wide(packed.bias)), **FUSED_ROUNDING,
    )  # fmt: skip
    return partial


def mean_assignment(packed: Operands, rows: int, log_partition: torch.Tensor) -> torch.Tensor:
    """Sums of the probabilities over rows (H, K') float64."""
    config, heads = packed.config, len(packed.bias)
    per_split, splits = shared_out(packed, False, config.resident, config.passing)
    partial = torch.empty(splits, heads, packed.padded_codes, dtype=torch.float64, device=packed.bias.device)
    mean_kernel[(packed.padded_codes // config.resident, splits, heads)](
        packed.rows, packed.codes, packed.bias, packed.scale, log_partition, partial,
        rows, packed.padded_rows, packed.padded_codes, per_split,
        PADDED=packed.padded, BM=config.resident, BK=config.passing, BD=config.slice_dim, **packed.options(),
    )  # fmt: skip
    return partial.sum(0)


def row_lifts(
    packed: Operands,
    rows: int,
    row_entropy: torch.Tensor,
    log_partition: torch.Tensor,
    log_mean: torch.Tensor,
    grads: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """lift and minus the log partition, both (H, R'); see entropy_backward.py."""
    config, heads = packed.config, len(packed.bias)
    per_split, splits = shared_out(packed, True, config.resident, config.passing)
    partial = packed.bias.new_empty(splits, heads, packed.padded_rows)
    shift_kernel[(packed.padded_rows // config.resident, splits, heads)](
        packed.rows, packed.codes, packed.bias, packed.scale, log_partition, log_mean, partial,
        rows, packed.padded_rows, packed.padded_codes, per_split,
        PADDED=packed.padded, BM=config.resident, BK=config.passing, BD=config.slice_dim, **packed.options(),
    )  # fmt: skip
    lift, logit = packed.bias.new_empty(2, heads, packed.padded_rows)
    lift_kernel[(triton.cdiv(packed.padded_rows, MERGE_ROWS), heads)](
        partial, row_entropy, log_partition, grads, lift, logit, rows, packed.padded_rows, splits,
        BM=MERGE_ROWS, **registers(wide(packed.bias)), **FUSED_ROUNDING,
    )  # fmt: skip
    return lift, logit


def gradient(
    packed: Operands,
    alpha: torch.Tensor,
    logit: torch.Tensor,
    lift: torch.Tensor,
    sink: torch.Tensor,
    *,
    of_codes: bool,
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Σ G times the other side (splits, H, R' or K', D'), Σ G over rows (splits, H, K') if `of_codes`, and splits."""
    config, heads = packed.config, len(packed.bias)
    slices = packed.padded // config.gradient_dim
    per_split, splits = shared_out(packed, not of_codes, config.resident, config.gradient_passing, slices)
    of_rows, codes = (
        (packed.rows, logit, lift, packed.padded_rows),
        (packed.codes, packed.bias, sink, packed.padded_codes),
    )
    left, right = (codes, of_rows) if of_codes else (of_rows, codes)
    partial = packed.bias.new_empty(splits, heads, left[3], packed.padded)
    sums = packed.bias.new_empty((splits, heads, left[3]) if of_codes else 0)
    gradient_kernel[(left[3] // config.resident, splits * slices, heads)](
        left[0], right[0], packed.scale, alpha, left[1], right[1], left[2], right[2], partial, sums,
        left[3], right[3], per_split,
        PADDED=packed.padded, BM=config.resident, BK=config.gradient_passing, BD=config.slice_dim,
        BO=config.gradient_dim, CODES=of_codes, **packed.options(),
    )  # fmt: skip
    return partial, sums, splits
