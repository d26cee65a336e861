"""Open questions about the design that existing kernels can answer: what the candidate pass costs alone, whether other
tiles are better, what sorting costs against atomics, and how often the filter decides.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import vqkernels as vq
from benchmarks.hardware.checks import Row
from benchmarks.hardware.setting import Setting
from vqkernels.backends.triton import configs, launch
from vqkernels.backends.triton.nearest import pack_codes, pack_rows, search
from vqkernels.verification.adversaries import ADVERSARIES

# (rows, codes, warps, stages) of other tiles, by family; those that do not fit are told so
TILES = {
    80: [(128, 64, 4, 3), (64, 64, 4, 3), (128, 32, 4, 2), (64, 128, 4, 3)],
    90: [(128, 256, 8, 3), (256, 64, 8, 3), (64, 128, 4, 3), (128, 128, 4, 2), (128, 128, 8, 3), (128, 64, 4, 3)],
    100: [(128, 128, 4, 3), (128, 256, 8, 3), (256, 64, 8, 3), (64, 64, 4, 3)],
}


def questions(setting: Setting) -> Iterator[Row]:
    n = setting.size(1 << 20, 40)
    for k in setting.size((16384, 1024), (64,)):
        for d in setting.size((64, 128, 32, 256), (16,)):
            yield _candidate_pass(setting, n, k, d)
    for k in setting.size((512, 65536), (8,)):
        for skewed in (False, True):
            yield _sums(setting, n, k, setting.size(64, 8), skewed)
    for k, d in setting.size(((1024, 64), (16384, 64), (16384, 256), (8192, 32)), ((20, 8),)):
        yield _undecided(setting, k, d)


def _candidate_pass(setting: Setting, n: int, k: int, d: int) -> Row:
    """Both epilogues, without packing and resolving, in the shipped tile and in others; how many best scores differ."""
    torch.manual_seed(0)
    z, codebook = torch.randn(1, 1, n, d, device=setting.device), torch.randn(1, k, d, device=setting.device)
    chip = launch.capability(setting.device)
    family = configs.family(chip)
    shipped = configs.search_config(chip, configs.padded_dim(d), n)
    tiles = {"shipped": shipped}
    for rows, codes, warps, stages in TILES.get(family if isinstance(family, int) else 0, []):
        tiles[f"{rows}x{codes}, {warps} warps, {stages} stages"] = configs.SearchConfig(
            rows, codes, shipped.slice_dim, warps, stages, shipped.descriptors
        )
    if setting.dry:
        tiles["64x32"] = configs.SearchConfig(64, 32, shipped.slice_dim, 4, 1, False)
    contenders: dict[str, Callable[[], Any]] = {}
    differing: dict[str, int | str] = {}
    best: dict[str, Tensor] = {}
    for name, config in tiles.items():
        packed_codes = pack_codes(z, None, codebook, "euclidean", config, certified=True)
        packed_rows = pack_rows(z, None, packed_codes, config)
        for epilogue in ("group", "index"):
            run = partial(search, packed_rows, packed_codes, config, n, 1, epilogue)
            label = f"{name}, {epilogue}"
            try:
                found = run()[0].amin(0)[0, :n]
            except Exception as error:  # a tile that does not fit the chip
                differing[label] = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:120]}"
                continue
            differing[label] = int((found != best.setdefault(epilogue, found)).sum())
            contenders[label] = run
    told = setting.times(contenders)
    for entry in told.values():
        if "ms" in entry:
            entry["T scores/s"] = round(n * k / entry["ms"] / 1e9, 3)
    return {"what": "candidate pass", "N": n, "K": k, "D": d, "rows whose best score differs": differing, "times": told}


def _sums(setting: Setting, n: int, k: int, d: int, skewed: bool) -> Row:
    """Sort and segment, which repeats every bit, against atomic additions, which do not."""
    torch.manual_seed(0)
    z = torch.randn(n, d, device=setting.device)
    if skewed:
        weights = 1 / torch.arange(1, k + 1, device=setting.device, dtype=torch.float32)  # Zipf
        indices = torch.multinomial(weights, n, replacement=True)
    else:
        indices = torch.randint(k, (n,), device=setting.device)

    def atomics() -> tuple[Tensor, Tensor]:
        sums = torch.zeros(k, d, device=setting.device).index_add_(0, indices, z)
        return torch.zeros(k, device=setting.device).index_add_(
            0, indices, torch.ones_like(indices, dtype=z.dtype)
        ), sums

    ours = partial(vq.codebook_statistics, z, indices, k, backend="triton")
    counts, sums = ours()
    expected = torch.zeros(k, d, device=setting.device, dtype=torch.float64).index_add_(0, indices, z.double())
    scale = float(expected.abs().max())
    row: Row = {
        "what": "sums", "N": n, "K": k, "D": d, "indices": "Zipf" if skewed else "uniform",
        "counts equal": bool((counts == torch.bincount(indices, minlength=k)).all()),
        "largest error, ours": float((sums.double() - expected).abs().max()) / scale,
        "largest error, atomics": float((atomics()[1].double() - expected).abs().max()) / scale,
    }  # fmt: skip
    return row | {"times": setting.times({"sort and segment": ours, "index_add_": atomics})}


def _undecided(setting: Setting, k: int, d: int) -> Row:
    """How many rows go to float64, by kind of data and type of input."""
    n = setting.size(1 << 18, 40)
    rates: dict[str, dict[str, float]] = {}
    for name in ("gaussian", "clustered", "norms over eight decades"):
        z, codebook = (x.to(setting.device) for x in ADVERSARIES[name](n, k, d))
        rates[name] = {}
        for kind in (torch.float32, torch.float16, torch.bfloat16):
            _, decided = vq.nearest_code(z.to(kind), codebook.to(kind), backend="triton", return_certificate=True)
            rates[name][str(kind).removeprefix("torch.")] = round(1 - float(decided), 6)
    return {"what": "undecided rows", "N": n, "K": k, "D": d, "rates": rates}
