"""Sampling of codes: an index drawn by its distance, in one pass like the search."""

import torch
from torch import Tensor

from ..backends import registry
from .checks import METRICS, check_choice, check_mask, check_rows, check_temperature, row_shape, seed_tensor
from .nearest import nearest
from .registration import Operation


def _fake(
    z: Tensor,
    codebook: Tensor,
    seed: Tensor,
    mask: Tensor | None,
    channel_dim: int,
    metric: str,
    temperature: Tensor,
    row_offset: int,
) -> Tensor:
    return z.new_empty(row_shape(z, channel_dim), dtype=torch.int64)


sample = Operation(
    "sample",
    "(Tensor z, Tensor codebook, Tensor seed, Tensor? mask, int channel_dim, str metric, Tensor temperature,"
    " SymInt row_offset) -> Tensor",
    _fake,
)


def sample_code(
    z: Tensor,
    codebook: Tensor,
    *,
    temperature: float | Tensor,
    seed: int | Tensor,
    mask: Tensor | None = None,
    metric: str = "euclidean",
    channel_dim: int = -1,
    row_offset: int = 0,
    backend: str = "auto",
) -> Tensor:
    """A random code for every row of z, the nearer the likelier.

    The stochastic sampling of codes (Q_tau) of Lee et al. 2022, "Autoregressive Image Generation using Residual
    Quantization".
    Code k is drawn with probability proportional to `exp(-|z - e_k|^2 / temperature)`; with `metric="dot"` to
    `exp(z.e_k / temperature)`, with "cosine" to `exp(z.e_k / |e_k| / temperature)`. The Gumbel-max trick runs inside
    the search: no N x K matrix is built.

    Args:
        z, codebook, mask, channel_dim: as in `nearest_code`.
        temperature: a number of at least 0, where 0 gives `nearest_code`; or a 0-d float64 tensor on the CPU, of which
            one compiled graph serves all values. A compiled graph does not look whether the tensor is 0, and raises.
        seed: an int, or a 0-d int64 tensor on z's device, which is read on the device: a new value costs neither a
            synchronisation nor a recompilation.
        row_offset: the number of the first row. The draw of a row is a function of (seed, head, row number, row,
            codebook), where rows are numbered from `row_offset` in row-major order of z's axes without channels (and
            head): a batch can be split, and ranks can share a seed.
        backend: as in `nearest_code`. The same draws whatever the threads, tiles and batch split, on one backend;
            two backends differ where the rounding of a score decides. On a GPU the eager backend's code serves.

    Returns:
        int64 indices of z's shape without the channel axis. No gradient flows: pass them to
        `quantize_with_statistics(indices=...)`. Rows with a NaN or an infinity get index 0, masked rows -1; codes with
        a NaN or an infinity are never drawn. The C++ kernels score in float32, eager in float64: the logarithm of a
        probability is off by as much as the score over the temperature is rounded.

    Raises:
        TypeError, ValueError: one sentence that names the argument, what was expected and what came.
    """
    check_choice("metric", metric, METRICS)
    channel_dim = check_rows(z, codebook, channel_dim)
    check_mask(mask, z, channel_dim)
    divisor = check_temperature(temperature, zero=True)
    seed = seed_tensor(seed, z.device)
    chosen = registry.resolve(backend, z.device, "sample")
    z, codebook = z.detach(), codebook.detach()
    if not (isinstance(temperature, Tensor) and torch.compiler.is_compiling()) and float(temperature) == 0:
        return nearest(chosen, z, codebook, mask, channel_dim, metric, "exact")[0]
    return sample(chosen, z, codebook, seed, mask, channel_dim, metric, divisor, row_offset)
