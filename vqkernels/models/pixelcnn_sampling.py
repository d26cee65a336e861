"""Ancestral sampling from a PixelCNN: the cached sampler, and the plain one that is its oracle.

All randomness is one uniform number for each code, drawn before the first position, so that both samplers, any chunks
of the batch and any order of the work give the same codes up to the rounding of the logits.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from vqkernels.backends.drawing import draw_codes, guided
from vqkernels.ops.pixelcnn_step import PixelCNNSizes, advance, pack

CHUNK_BYTES = 1 << 28  # of caches alive at once


class Prior(Protocol):
    """What the samplers ask of a PixelCNN."""

    num_codes: int
    condition_channels: int | None
    label_dropout: float
    embedding: nn.Embedding
    layers: nn.ModuleList
    head: nn.Sequential

    def __call__(self, codes: Tensor, labels: Tensor | None, condition: Tensor | None) -> Tensor: ...


class Options(NamedTuple):
    """How a code is drawn from its logits."""

    temperature: float
    top_k: int  # 0: all
    top_p: float  # 1: all
    guidance: float


def check_options(model: Prior, temperature: float, top_k: int | None, top_p: float | None, guidance: float) -> Options:
    """The options of a sampler.

    Raises:
        ValueError: one of them is out of range.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, but is {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, but is {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], but is {top_p}")
    if guidance != 1.0 and not model.label_dropout > 0:
        raise ValueError("guidance needs a prior that was built, and trained, with label_dropout above 0")
    return Options(float(temperature), top_k or 0, 1.0 if top_p is None else float(top_p), float(guidance))


def start_codes(model: Prior, shape: tuple[int, int, int], known: Tensor | None) -> Tensor:
    """Codes (B, H, W) to begin with: the known ones, and -1 where one is to be drawn.

    Raises:
        ValueError: known has the wrong shape or type, or a code out of range.
    """
    if len(shape) != 3 or min(shape) < 0:
        raise ValueError(f"shape must be (B, H, W), but is {tuple(shape)}")
    device = model.embedding.weight.device
    if known is None:
        return torch.full(shape, -1, dtype=torch.int64, device=device)
    if tuple(known.shape) != tuple(shape) or known.dtype != torch.int64:
        raise ValueError(f"known must be {tuple(shape)} int64, but is {tuple(known.shape)} of {known.dtype}")
    outside = known[(known < -1) | (known >= model.num_codes)].tolist()
    if outside:
        raise ValueError(f"known codes must be in [-1, {model.num_codes - 1}], -1 where unknown; one is {outside[0]}")
    return known.to(device, copy=True, memory_format=torch.contiguous_format)


def plain_sample(
    model: Prior,
    codes: Tensor,
    noise: Tensor,
    labels: Tensor | None,
    condition: Tensor | None,
    options: Options,
    progress: bool = False,
) -> Tensor:
    """Codes by a full forward pass for every position: the specification of the cached sampler."""
    _, height, width = codes.shape
    for row, column in bar([(row, column) for row in range(height) for column in range(width)], progress, "code"):
        missing = codes[:, row, column] < 0
        if not bool(missing.any()):
            continue
        logits = model(codes.clamp_min(0), labels, condition)[:, :, row, column]
        if options.guidance != 1.0 and labels is not None:
            without = model(codes.clamp_min(0), torch.full_like(labels, -1), condition)[:, :, row, column]
            logits = guided(torch.stack([logits, without], 1).flatten(0, 1), options.guidance)
        drawn = draw_codes(logits, noise[:, row, column], options.temperature, options.top_k, options.top_p)
        codes[:, row, column] = torch.where(missing, drawn, codes[:, row, column])
    return codes


def cached_sample(
    model: Prior,
    codes: Tensor,
    noise: Tensor,
    labels: Tensor | None,
    condition: Tensor | None,
    options: Options,
    *,
    backend: str = "auto",
    chunk: int | None = None,
    progress: bool = False,
) -> Tensor:
    """Codes by `CachedSampler`, a chunk of the batch at a time."""
    batch, height, width = codes.shape
    packed = PackedPixelCNN(model)
    if chunk is None:
        row_bytes = packed.sizes.cache_elements(2 if options.guidance != 1.0 else 1, width) * packed.weights.itemsize
        chunk = max(1, CHUNK_BYTES // row_bytes)
    parts = [slice(start, min(start + chunk, batch)) for start in range(0, batch, chunk)]
    steps = [(part, row) for part in parts for row in range(height)]
    sampler = None
    for part, row in bar(steps, progress, "row"):
        if row == 0:
            sampler = CachedSampler(
                packed,
                codes[part],
                noise[part],
                None if labels is None else labels[part],
                None if condition is None else condition[part],
                options,
                backend=backend,
            )
        assert sampler is not None
        sampler.advance(row * width, (row + 1) * width)
    return codes


class PackedPixelCNN:
    """The weights of a PixelCNN as `pixelcnn_step` reads them, packed once for all chunks of a batch."""

    def __init__(self, model: Prior) -> None:
        self.layers: list[Any] = list(model.layers)
        head: list[Any] = list(model.head)
        self.sizes = PixelCNNSizes(
            channels=model.embedding.embedding_dim,
            layers=len(self.layers),
            head_channels=head[1].out_channels,
            num_codes=model.num_codes,
            kernel_size=self.layers[-1].vertical.kernel_size[1],  # with one layer, no second one reads it
            first_kernel_size=self.layers[0].vertical.kernel_size[1],
            condition_channels=model.condition_channels or 0,
        )
        matrices: dict[str, Tensor] = {}
        for number, layer in enumerate(self.layers):
            matrices[f"{number}.vertical"] = layer.vertical.weight.permute(2, 3, 1, 0).flatten(0, 2)
            matrices[f"{number}.vertical_bias"] = layer.vertical.bias[None]
            matrices[f"{number}.vertical_to_horizontal"] = layer.vertical_to_horizontal.weight.flatten(1).T
            matrices[f"{number}.horizontal"] = layer.horizontal.weight.permute(2, 3, 1, 0).flatten(0, 2)
            matrices[f"{number}.output"] = layer.output.weight.flatten(1).T
            matrices[f"{number}.output_bias"] = layer.output.bias[None]
            if layer.condition is not None:
                vertical, horizontal = layer.condition.weight.flatten(1).T.chunk(2, dim=1)
                matrices[f"{number}.condition_vertical"] = vertical
                matrices[f"{number}.condition_horizontal"] = horizontal
        for name, convolution in (("head", head[1]), ("logits", head[3])):
            matrices[name], matrices[f"{name}_bias"] = convolution.weight.flatten(1).T, convolution.bias[None]
        matrices["embedding"] = model.embedding.weight
        dtype = torch.float64 if model.embedding.weight.dtype == torch.float64 else torch.float32
        self.weights = pack([matrices[name].to(dtype) for name, _, _ in self.sizes.matrices()]).detach()
        self.residual_head = isinstance(head[0], nn.ReLU)

    def biases(self, labels: Tensor | None, rows: int) -> Tensor:
        """What labels (R,), -1 for none, and the constant biases add to the gates: (layers, R, 4C)."""
        parts = []
        for layer in self.layers:
            constant = layer.horizontal.bias + layer.vertical_to_horizontal.bias
            bias = torch.cat([torch.zeros_like(constant), constant]).expand(rows, -1)
            parts.append(bias if labels is None else bias + layer.label_bias(labels))
        return torch.stack(parts).detach().to(self.weights.dtype)


class CachedSampler:
    """Advances one chunk of a batch through its grid; the memory of all positions is allocated here.

    Args:
        packed: the model.
        codes: (B, H, W) int64, written in place where they are -1.
        noise: (B, H, W) float64.
        labels: (B,) or None; condition: (B, C, H, W) or None.
        options: how codes are drawn.
        backend: who computes, see `vqkernels info`.
    """

    def __init__(
        self,
        packed: PackedPixelCNN,
        codes: Tensor,
        noise: Tensor,
        labels: Tensor | None,
        condition: Tensor | None,
        options: Options,
        *,
        backend: str = "auto",
    ) -> None:
        self.packed, self.codes, self.noise = packed, codes, noise.contiguous()
        self.options, self.backend = options, backend
        copies = 2 if options.guidance != 1.0 else 1  # rows of the stack for each grid: with the label, and without
        self.rows = copies * len(codes)
        if labels is not None and copies == 2:
            labels = torch.stack([labels, torch.full_like(labels, -1)], 1).flatten()
        self.biases = packed.biases(labels, self.rows)
        weights, width = packed.weights, codes.shape[2]
        self.condition = condition
        if condition is not None:
            self.condition = condition.repeat_interleave(copies, dim=0).permute(0, 2, 3, 1).to(weights).contiguous()
        self.cache = weights.new_zeros(packed.sizes.cache_elements(self.rows, width))
        self.no_logits = weights.new_empty(0, self.rows, packed.sizes.num_codes)

    def advance(self, begin: int, end: int, logits: Tensor | None = None) -> None:
        """Draws the codes at [begin, end); with `logits` (end - begin, R, K), writes those too."""
        temperature, top_k, top_p, guidance = self.options
        advance(
            self.packed.sizes,
            self.codes,
            self.cache,
            self.no_logits if logits is None else logits,
            self.packed.weights,
            self.biases,
            self.condition,
            self.noise,
            residual_head=self.packed.residual_head,
            begin=begin,
            end=end,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            guidance=guidance,
            backend=self.backend,
        )


def bar(steps: list, progress: bool, unit: str) -> Iterable:
    """The steps under a progress bar, where one is wanted and tqdm is installed."""
    if not progress:
        return steps
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        return steps
    return tqdm(steps, desc="sampling", unit=unit, leave=False)
