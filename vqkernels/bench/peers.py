"""The contenders of the search: what each computes, how it is called, and why it cannot run here.

`prepare(z, codebook)` does what a user does once per codebook (an index, half norms); it is not timed. The function
that it returns is timed. All get the same float32 rows and codes and give int64 indices `(N,)`.
"""

import functools
import importlib
import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vqkernels.nn import VectorQuantizer
from vqkernels.ops.nearest import nearest_code

Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Peer:
    """A named contender of the search."""

    name: str
    computes: str
    prepare: Callable[[Tensor, Tensor], Call]
    module: str = "torch"
    package: str = ""  # its name for pip; empty if nothing must be installed
    ours: bool = False
    searches: bool = True  # False: shown for comparison, never the best peer
    slow_start: bool = False  # left out of --quick
    matrices: int = 0  # how many N x K float32 matrices it holds at its peak


def unavailable(module: str, package: str) -> str | None:
    """Why a contender cannot run here, with the command that installs it; None if it can."""
    try:
        importlib.import_module(module)
    except Exception as error:  # the other peers still run
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:120]
        return f"{reason}; pip install {package}" if package else reason
    return None


def too_large(matrices: int, rows: int, codebook_size: int) -> str | None:
    """Why a contender that holds so many N x K matrices must not start; None if it may."""
    needed = 4.0 * matrices * rows * codebook_size
    try:
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * 0.7
    except (AttributeError, ValueError, OSError):
        return None
    return f"it would hold about {needed / 1e9:.0f} GB" if needed > free else None


def _ours(z: Tensor, codebook: Tensor) -> Call:
    return lambda: nearest_code(z, codebook)


def _our_layer(z: Tensor, codebook: Tensor) -> Call:
    layer = VectorQuantizer(codebook.shape[1], len(codebook)).eval()
    layer.codebook.data.copy_(codebook)
    return torch.no_grad()(lambda: layer(z)[1])


def _addmm_argmin(half: Tensor, z: Tensor, codebook: Tensor) -> Tensor:
    return torch.addmm(half, z, codebook.T, alpha=-1).argmin(1)


def _addmm(z: Tensor, codebook: Tensor) -> Call:
    half = codebook.square().sum(1) / 2
    return lambda: _addmm_argmin(half, z, codebook)


def addmm_argmin(z: Tensor, codebook: Tensor) -> Tensor:
    """The usual search: half squared norms minus products for all pairs, then the smallest of each row."""
    return _addmm_argmin(codebook.square().sum(1) / 2, z, codebook)


def _cdist_argmin(z: Tensor, codebook: Tensor) -> Tensor:
    return torch.cdist(z, codebook).argmin(1)


def _cdist(z: Tensor, codebook: Tensor) -> Call:
    return lambda: _cdist_argmin(z, codebook)


def _compiled(z: Tensor, codebook: Tensor) -> Call:
    half = codebook.square().sum(1) / 2
    torch._dynamo.reset()  # a new graph for each shape, which is the fastest case for it
    function = torch.compile(_addmm_argmin, dynamic=False)
    return lambda: function(half, z, codebook)


def _mm(z: Tensor, codebook: Tensor) -> Call:
    return lambda: torch.mm(z, codebook.T)


def _faiss(z: Tensor, codebook: Tensor) -> Call:
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatL2(codebook.shape[1])
    index.add(codebook.numpy())
    rows = z.numpy()
    return lambda: torch.from_numpy(index.search(rows, 1)[1][:, 0])


def _sklearn(z: Tensor, codebook: Tensor) -> Call:
    from sklearn.metrics import pairwise_distances_argmin

    rows, codes = z.numpy(), codebook.numpy()
    return lambda: torch.from_numpy(pairwise_distances_argmin(rows, codes))


def _lucidrains(z: Tensor, codebook: Tensor) -> Call:
    from vector_quantize_pytorch import VectorQuantize

    layer = VectorQuantize(codebook.shape[1], len(codebook)).eval()
    layer._codebook.embed.data.copy_(codebook[None])
    rows = z[None]
    return torch.no_grad()(lambda: layer(rows)[1][0])


SEARCH: tuple[Peer, ...] = (
    Peer("vqkernels", "exact index", _ours, ours=True),
    Peer("vqkernels layer, eval", "exact index, look-up, loss", _our_layer, "vqkernels", ours=True, searches=False),
    Peer("torch.addmm+argmin", "index; half norms beforehand", _addmm, matrices=1),
    Peer("torch.compile of it", "index; half norms beforehand", _compiled, slow_start=True, matrices=1),
    Peer("torch.cdist+argmin", "index", _cdist, matrices=1),
    Peer("FAISS IndexFlatL2", "index and distance; index built beforehand", _faiss, "faiss", "faiss-cpu"),
    Peer("scikit-learn argmin", "index", _sklearn, "sklearn.metrics", "scikit-learn"),
    Peer(
        "lucidrains, eval",
        "index, look-up",
        _lucidrains,
        "vector_quantize_pytorch",
        "vector-quantize-pytorch",
        matrices=6,
    ),
    Peer("torch.mm alone", "the products, no index: for scale", _mm, searches=False, matrices=1),
)


def _flash_kmeans(z: Tensor, codebook: Tensor) -> Tensor:
    assign = importlib.import_module("flash_kmeans.assign_euclid_triton").euclid_assign_triton
    norms = {"x_sq": z.float().square().sum(1)[None]} if "x_sq" in inspect.signature(assign).parameters else {}
    return assign(z[None], codebook[None], **norms)[0].long()


@functools.cache
def _rectokens_search() -> Callable[[Tensor, Tensor], Tensor]:
    before = torch.get_float32_matmul_precision()
    try:
        return importlib.import_module("rectokens.ops.nn_quantize").nearest_neighbor_quantize
    finally:
        torch.set_float32_matmul_precision(before)  # its import lowers the precision of the whole process


def _rectokens(z: Tensor, codebook: Tensor) -> Tensor:
    return _rectokens_search()(z, codebook)


def _called(search: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Call]:
    return lambda z, codebook: lambda: search(z, codebook)


def gpu_search(compiler: str = "inductor") -> tuple[Peer, ...]:
    """The contenders of the search on a GPU; they take float16 too. One that is not installed raises when it is called.

    Args:
        compiler: the backend of `torch.compile`.
    """
    compiled = {
        name: _called(torch.compile(function, backend=compiler, dynamic=False))
        for name, function in (("addmm+argmin, compiled", addmm_argmin), ("cdist+argmin, compiled", _cdist_argmin))
    }
    return (
        *(Peer(name, "index", prepare, slow_start=True, matrices=1) for name, prepare in compiled.items()),
        Peer("flash-kmeans", "index", _called(_flash_kmeans), "flash_kmeans"),
        Peer("rectokens", "index", _called(_rectokens), "rectokens"),
    )
