"""Nearest codes with Triton: pack, candidate pass, certificate, float64 for what is left.

    pack.py     codes to fp16 with a centre, a scale and measured rounding errors
    rows.py     rows likewise, one scale per row
    search.py   the N×K candidate pass on the tensor cores, reduced in registers
    margin.py   the certificate
    resolve.py  decides rows, lists the undecided ones
    rescore.py  the float64 contract for those

No step waits for the device: the number of undecided rows stays there. Scratch is O((N + K)·D) bytes.
`precision="fast"` stops after the candidate pass, whose scores carry the rounding of fp16 operands (10 bits after
centring and scaling; none for bf16 and fp16 inputs within 2^-24 of their row's largest element).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from vqkernels.backends.triton import configs
from vqkernels.backends.triton.launch import (
    FUSED_ROUNDING,
    SEPARATE_ROUNDING,
    capability,
    multiprocessors,
    on_device,
    registers,
    tile_operand,
)
from vqkernels.backends.triton.pack import centre_kernel, extent_kernel, pack_codes_kernel
from vqkernels.backends.triton.rescore import rescore_kernel
from vqkernels.backends.triton.resolve import merge_kernel, resolve_kernel
from vqkernels.backends.triton.rows import STATE, pack_rows_kernel
from vqkernels.backends.triton.search import search_kernel
from vqkernels.backends.triton.views import bytes_of, mask_strides, wide

CENTRE_SAMPLE = 512
MOST_SPLITS = 64
HASH_SLOTS = 16  # at least, per code


@dataclass
class PackedCodes:
    """Operands of the candidate pass made from a codebook (H, K, D); see pack.py."""

    packed: torch.Tensor  # (H·K', D') fp16
    half_norms: torch.Tensor  # (H·K',) fp32
    centre: torch.Tensor  # (H, D') fp32
    state: torch.Tensor  # (H, STATE) int32
    padded_codes: int


@dataclass
class PackedRows:
    """Operands of the candidate pass made from rows (B, H, P, D); see rows.py."""

    packed: torch.Tensor  # (H·R', D') fp16
    beta: torch.Tensor  # (H·R',) fp32
    norm: torch.Tensor
    error: torch.Tensor
    padded_rows: int


def nearest(
    z: torch.Tensor,
    codebook: torch.Tensor,
    mask: torch.Tensor | None,
    metric: str,
    precision: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices (B, H, P) int64 and the number of unmasked rows decided without float64 (0-d int64; "fast": all).

    z (B, H, P, D) with any strides; codebook (H, K, D); mask (B, H, P) bool or None, True where a row counts.
    """
    batch, heads, positions, dim = z.shape
    rows = batch * positions
    counters = torch.zeros(1 + heads, dtype=torch.int64, device=z.device)
    by_head = torch.empty(heads, rows, dtype=torch.int64, device=z.device)
    if rows > 0 and heads > 0:
        with on_device(z):
            epilogue = "index" if precision == "fast" else "group"
            config = configs.search_config(capability(z.device), configs.padded_dim(dim), rows)
            codes = pack_codes(z, mask, codebook, metric, config, certified=precision == "exact")
            packed = pack_rows(z, mask, codes, config)
            best, second, winner, splits = search(packed, codes, config, rows, heads, epilogue)
            if precision == "fast":
                grid = (triton.cdiv(rows, 256), heads)
                merge_kernel[grid](
                    packed.norm, best, winner, by_head, counters, rows, packed.padded_rows, splits,
                    BM=256, **FUSED_ROUNDING,
                )  # fmt: skip
            else:
                _certify(z, codebook, packed, codes, best, second, winner, splits, by_head, counters, metric)
    indices = by_head.view(heads, batch, positions).transpose(0, 1).contiguous()
    return indices, counters[0]


def pack_codes(
    z: torch.Tensor,
    mask: torch.Tensor | None,
    codebook: torch.Tensor,
    metric: str,
    config: configs.SearchConfig | configs.ResidualConfig,
    *,
    certified: bool,
) -> PackedCodes:
    """Round a codebook (H, K, D) to fp16 operands, for the sake of rows z (B, H, P, D), of which some are looked at."""
    heads, codes, dim = codebook.shape
    padded = configs.padded_dim(dim)
    block = max(config.block_codes, configs.RESCORE_CODES, configs.PACK_CODES)
    padded_codes = triton.cdiv(codes, block) * block
    device = codebook.device
    result = PackedCodes(
        packed=torch.empty(heads * padded_codes, padded, dtype=torch.float16, device=device),
        half_norms=torch.empty(heads * padded_codes, dtype=torch.float32, device=device),
        centre=torch.empty(heads, padded, dtype=torch.float32, device=device),
        state=torch.empty(heads, STATE.value, dtype=torch.int32, device=device),
        padded_codes=padded_codes,
    )
    slots = 1 << (HASH_SLOTS * codes - 1).bit_length()
    table = torch.full((heads, slots), 2**31 - 1, dtype=torch.int32, device=device)
    strides = codebook.stride()
    slab = min(padded, 32)
    centre_kernel[(triton.cdiv(padded, 16), heads)](
        codebook, result.centre, result.state, codes, *strides,
        DIM=dim, PADDED=padded, BD=16, SAMPLE=CENTRE_SAMPLE, CENTRED=_centred(z, codebook, metric), METRIC=metric,
        **registers(True), **FUSED_ROUNDING,
    )  # fmt: skip
    extent_kernel[(triton.cdiv(codes, configs.PACK_CODES), heads)](
        z, codebook, result.centre, bytes_of(mask), result.state, table, codes, slots, *strides,
        z.shape[0] * z.shape[2], z.shape[2], *z.stride(), *mask_strides(mask),
        DIM=dim, PADDED=padded, BK=configs.PACK_CODES, BD=slab, METRIC=metric, MASKED=mask is not None,
        SAMPLED=certified and metric == "euclidean", **registers(True), **FUSED_ROUNDING,
    )  # fmt: skip
    pack_codes_kernel[(padded_codes // configs.PACK_CODES, heads)](
        codebook, result.centre, result.state, table, result.packed, result.half_norms, codes, padded_codes, slots,
        *strides,
        DIM=dim, PADDED=padded, BK=configs.PACK_CODES, BD=slab, METRIC=metric, **registers(True), **FUSED_ROUNDING,
    )  # fmt: skip
    return result


def pack_rows(
    z: torch.Tensor, mask: torch.Tensor | None, codes: PackedCodes, config: configs.SearchConfig
) -> PackedRows:
    """Round rows (B, H, P, D) to fp16 operands in the units of `codes`."""
    batch, heads, positions, dim = z.shape
    rows = batch * positions
    padded = configs.padded_dim(dim)
    block = max(config.block_rows, configs.PACK_ROWS)
    padded_rows = triton.cdiv(rows, block) * block
    floats = torch.empty(3, heads * padded_rows, dtype=torch.float32, device=z.device)
    result = PackedRows(
        packed=torch.empty(heads * padded_rows, padded, dtype=torch.float16, device=z.device),
        beta=floats[0],
        norm=floats[1],
        error=floats[2],
        padded_rows=padded_rows,
    )
    pack_rows_kernel[(padded_rows // configs.PACK_ROWS, heads)](
        z, codes.centre, codes.state, bytes_of(mask), result.packed, result.beta, result.norm, result.error,
        rows, padded_rows, positions, *z.stride(), *mask_strides(mask),
        DIM=dim, PADDED=padded, BM=configs.PACK_ROWS, BD=configs.slice_dim(padded),
        WIDE=wide(z), MASKED=mask is not None, **FUSED_ROUNDING,
    )  # fmt: skip
    return result


def search(
    packed: PackedRows, codes: PackedCodes, config: configs.SearchConfig, rows: int, heads: int, epilogue: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """Run the candidate pass; (best, second, winner) are (splits, H, R') and `second` is only written for "group"."""
    tiles = codes.padded_codes // config.block_codes
    row_blocks = triton.cdiv(rows, config.block_rows)
    # two programs per multiprocessor overlap product and reduction; fewer row blocks than that share the codes out
    wanted = triton.cdiv(2 * multiprocessors(packed.packed.device), row_blocks * heads)
    per_split = triton.cdiv(tiles, min(tiles, wanted, MOST_SPLITS))
    splits = triton.cdiv(tiles, per_split)
    scratch = torch.empty(3, splits, heads, packed.padded_rows, dtype=torch.float32, device=packed.packed.device)
    best, second, winner = scratch[0], scratch[1], scratch[2].view(torch.int32)
    block = [config.block_rows, config.slice_dim]
    search_kernel[(row_blocks, splits, heads)](
        tile_operand(packed.packed, block, config.descriptors),
        tile_operand(codes.packed, [config.block_codes, config.slice_dim], config.descriptors),
        codes.half_norms, packed.beta, best, second, winner,
        rows, packed.padded_rows, codes.padded_codes, tiles, per_split,
        PADDED=codes.packed.shape[1], BM=config.block_rows, BK=config.block_codes, BD=config.slice_dim,
        GROUPS=epilogue == "group", DESCRIPTORS=config.descriptors,
        num_warps=config.warps, num_stages=config.stages, **FUSED_ROUNDING,
    )  # fmt: skip
    return best, second, winner, splits


def _certify(
    z: torch.Tensor,
    codebook: torch.Tensor,
    packed: PackedRows,
    codes: PackedCodes,
    best: torch.Tensor,
    second: torch.Tensor,
    winner: torch.Tensor,
    splits: int,
    by_head: torch.Tensor,
    counters: torch.Tensor,
    metric: str,
) -> None:
    """Write every row's index: the certificate's where it proves one, float64's elsewhere."""
    batch, heads, positions, dim = z.shape
    rows = batch * positions
    padded = codes.packed.shape[1]
    limit = torch.empty(heads * packed.padded_rows, dtype=torch.float32, device=z.device)
    undecided = torch.empty(heads, rows, dtype=torch.int32, device=z.device)
    resolve_kernel[(triton.cdiv(rows, configs.RESOLVE_ROWS), heads)](
        packed.packed, codes.packed, codes.half_norms, packed.beta, packed.norm, packed.error, codes.state,
        best, second, winner, by_head, limit, undecided, counters,
        rows, packed.padded_rows, codes.padded_codes, splits,
        PADDED=padded, BM=configs.RESOLVE_ROWS, BD=min(padded, 64), METRIC=metric, **FUSED_ROUNDING,
    )  # fmt: skip
    programs = min(triton.cdiv(rows, configs.RESCORE_ROWS), 8 * multiprocessors(z.device))
    rescore_kernel[(programs, heads)](
        z, codebook, packed.packed, codes.packed, codes.half_norms, packed.beta, limit, undecided, counters, by_head,
        rows, packed.padded_rows, codes.padded_codes, codebook.shape[1],
        codes.padded_codes // configs.RESCORE_CODES, positions, *z.stride(), *codebook.stride(),
        DIM=dim, PADDED=padded, BM=configs.RESCORE_ROWS, BK=configs.RESCORE_CODES, BD=min(padded, 64), METRIC=metric,
        FEW=configs.RESCORE_FEW,
        **registers(True),
        **SEPARATE_ROUNDING,
    )  # fmt: skip


def _centred(z: torch.Tensor, codebook: torch.Tensor, metric: str) -> bool:
    """Centring costs rounding where both sides are 16 bits wide, whose products are exact as they are."""
    return metric == "euclidean" and (z.element_size() > 2 or codebook.element_size() > 2)
