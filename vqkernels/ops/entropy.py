"""Entropies of soft assignments, and their gradients, without the N x K matrix of probabilities."""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from ..backends import registry
from ..backends.layout import empty_rows, layout_of
from .checks import check_choice, check_mask, check_rows, check_temperature, row_shape
from .differentiation import FusedFunction, is_differentiated
from .registration import Operation
from .snapshot import snapshot

METRICS = ("euclidean", "dot")


def _fake_forward(
    z: Tensor, codebook: Tensor, mask: Tensor | None, channel_dim: int, metric: str, temperature: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batched = codebook.dim() == 3
    heads = z.shape[0] if batched else 1
    rows = 1
    for size in row_shape(z, channel_dim)[int(batched) :]:
        rows = rows * size
    dtype = _result_dtype(z, codebook)
    return (
        z.new_empty((heads,), dtype=torch.float64),
        z.new_empty((heads,), dtype=torch.float64),
        z.new_empty((heads, rows), dtype=dtype),
        z.new_empty((heads, rows), dtype=dtype),
        z.new_empty((heads, codebook.shape[-2]), dtype=dtype),
    )


def _fake_backward(
    grad_sample: Tensor,
    grad_codebook_entropy: Tensor,
    z: Tensor,
    codebook: Tensor,
    mask: Tensor | None,
    row_entropy: Tensor,
    log_partition: Tensor,
    mean_assignment: Tensor,
    channel_dim: int,
    metric: str,
    temperature: Tensor,
    codebook_gradient: bool,
) -> tuple[Tensor, Tensor]:
    grad_z = empty_rows(z, layout_of(z, channel_dim, codebook.dim() == 3))
    if not codebook_gradient:
        return grad_z, codebook.new_empty((0,))
    return grad_z, torch.empty_like(codebook, memory_format=torch.contiguous_format)


def _result_dtype(z: Tensor, codebook: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in (z.dtype, codebook.dtype) else torch.float32


entropy = Operation(
    "entropy",
    "(Tensor z, Tensor codebook, Tensor? mask, int channel_dim, str metric, Tensor temperature)"
    " -> (Tensor sample_entropy, Tensor codebook_entropy, Tensor row_entropy, Tensor log_partition,"
    " Tensor mean_assignment)",
    _fake_forward,
)
entropy_backward = Operation(
    "entropy_backward",
    "(Tensor grad_sample, Tensor grad_codebook_entropy, Tensor z, Tensor codebook, Tensor? mask, Tensor row_entropy,"
    " Tensor log_partition, Tensor mean_assignment, int channel_dim, str metric, Tensor temperature,"
    " bool codebook_gradient) -> (Tensor grad_z, Tensor grad_codebook)",
    _fake_backward,
)


def _forward(
    z: Tensor, codebook: Tensor, mask: Tensor | None, channel_dim: int, metric: str, temperature: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What the operator yields, the entropies in the dtype of the others."""
    sample, whole, *kept = entropy(backend, z, codebook, mask, channel_dim, metric, temperature)
    dtype = _result_dtype(z, codebook)
    return sample.to(dtype, copy=True), whole.to(dtype, copy=True), *kept


class _EntropyLoss(FusedFunction):
    """One forward and one backward operator. Saves its inputs and two numbers per row and one per code.

    Of the temperature it saves a copy, so that the caller may anneal it between the passes.
    """

    @staticmethod
    def forward(
        z: Tensor,
        codebook: Tensor,
        mask: Tensor | None,
        channel_dim: int,
        metric: str,
        temperature: Tensor,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        return *_forward(z, codebook, mask, channel_dim, metric, temperature, backend), snapshot(temperature)

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple, output: tuple) -> None:
        z, codebook, mask, channel_dim, metric, _, backend = inputs
        kept = output[2:]
        ctx.mark_non_differentiable(*kept)
        ctx.save_for_backward(z, codebook, mask, *kept)
        ctx.arguments = channel_dim, metric, backend  # type: ignore[attr-defined]

    @staticmethod
    def backward(ctx, grad_sample, grad_codebook_entropy, *_):
        channel_dim, metric, backend = ctx.arguments
        *saved, temperature = ctx.saved_tensors
        wanted = ctx.needs_input_grad[1]
        grad_z, grad_codebook = _EntropyBackward.apply(
            grad_sample, grad_codebook_entropy, *saved, channel_dim, metric, temperature, wanted, backend
        )
        return grad_z, grad_codebook if wanted else None, *(5 * [None])


class _EntropyBackward(FusedFunction):
    """The gradient as a Function of its own, so that asking for a second derivative is an error, not a wrong zero."""

    @staticmethod
    def forward(
        grad_sample,
        grad_codebook_entropy,
        z,
        codebook,
        mask,
        row_entropy,
        log_partition,
        mean_assignment,
        channel_dim,
        metric,
        temperature,
        codebook_gradient,
        backend,
    ):
        kept = (row_entropy, log_partition, mean_assignment)
        options = (channel_dim, metric, temperature, codebook_gradient)
        return entropy_backward(backend, grad_sample, grad_codebook_entropy, z, codebook, mask, *kept, *options)

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple, output: tuple) -> None:
        pass

    @staticmethod
    def backward(ctx, grad_z, grad_codebook):
        raise RuntimeError("vqkernels does not support double backward: entropy_loss is differentiable only once")


def entropy_loss(
    z: Tensor,
    codebook: Tensor,
    temperature: float | Tensor,
    *,
    mask: Tensor | None = None,
    metric: str = "euclidean",
    channel_dim: int = -1,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """How undecided each row is among the codes, and how evenly all rows together use them: two entropies in nats.

    With p_i = softmax over j of `-|z_i - e_j|^2 / temperature` (`metric="dot"`: of `z_i.e_j / temperature`), these are
    the mean over rows of `-sum_j p_ij log p_ij`, and `-sum_j m_j log m_j` of the mean assignment m. Training adds
    `sample_entropy - gamma * codebook_entropy` to its loss (Yu et al. 2023, "Language Model Beats Diffusion: Tokenizer
    is Key to Visual Generation"). The probabilities are computed block by block and again in the backward
    pass: memory beyond inputs and outputs is O((N + K) D).

    Args:
        z, codebook, channel_dim, backend: as in `nearest_code`.
        temperature: positive and finite, in the units of the squared distance or of the product; a number, or a 0-d
            float64 tensor on the CPU, of which one compiled graph serves all values. No gradient reaches it.
        mask: bool, z's shape without the channel axis. Rows where it is False are not read, count nowhere and get
            gradient 0.
        metric: "euclidean" or "dot"; a cosine is the product of vectors of length one.

    Returns:
        sample_entropy, codebook_entropy: 0-d, or `(H,)` with a batched codebook; float32 (float64 where an input is).
        Both are differentiable with respect to z and the codebook.

    A row with a NaN or an infinity makes both entropies NaN, gets a NaN gradient itself and gives nothing to the
    codebook's; a code with one has probability 0 and gradient 0. With no rows, entropies and gradients are 0.
    Deterministic to the bit on the CPU, whatever the threads. Logits beyond 3e38 are computed in float64 there;
    elsewhere they give NaN, unless an input is float64.

    Raises:
        TypeError, ValueError: one sentence that names the argument, what was expected and what came.
        RuntimeError: where a second derivative is asked for.
    """
    check_choice("metric", metric, METRICS)
    channel_dim = check_rows(z, codebook, channel_dim)
    check_mask(mask, z, channel_dim)
    inputs = (z, codebook, mask, channel_dim, metric, check_temperature(temperature))
    compute = _EntropyLoss.apply if is_differentiated(z, codebook) else _forward
    sample, whole = compute(*inputs, registry.resolve(backend, z.device, "entropy"))[:2]
    return (sample, whole) if codebook.dim() == 3 else (sample.squeeze(0), whole.squeeze(0))
