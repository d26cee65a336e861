"""Cached ancestral sampling from a PixelCNN; the plain sampler, which specifies it, is in ancestral_sampling.py."""

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vqkernels.models.ancestral_sampling import CHUNK_BYTES, Options, Sampled, bar, chunks, with_and_without
from vqkernels.ops.pixelcnn_step import PixelCNNSizes, advance, pack


class SampledPixelCNN(Sampled, Protocol):
    """What the cached sampler asks of a PixelCNN."""

    condition_channels: int | None
    layers: nn.ModuleList
    head: nn.Sequential


def cached_sample(
    model: SampledPixelCNN,
    codes: Tensor,
    noise: Tensor,
    labels: Tensor | None,
    options: Options,
    condition: Tensor | None,
) -> Tensor:
    """Codes by `CachedSampler`, a chunk of the batch at a time."""
    batch, height, width = codes.shape
    packed = PackedPixelCNN(model)
    row_bytes = packed.sizes.cache_elements(2 if options.guidance != 1.0 else 1, width) * packed.weights.itemsize
    parts = chunks(batch, options.chunk, row_bytes, CHUNK_BYTES)
    sampler = None
    for part, row in bar([(part, row) for part in parts for row in range(height)], options.progress, "row"):
        if row == 0:
            given = None if labels is None else labels[part]
            there = None if condition is None else condition[part]
            sampler = CachedSampler(packed, codes[part], noise[part], given, there, options, backend=options.backend)
        assert sampler is not None
        sampler.advance(row * width, (row + 1) * width)
    return codes


class PackedPixelCNN:
    """The weights of a PixelCNN as `pixelcnn_step` reads them, packed once for all chunks of a batch."""

    def __init__(self, model: SampledPixelCNN) -> None:
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
        labels, copies = with_and_without(labels, options.guidance)
        self.rows = copies * len(codes)
        self.biases = packed.biases(labels, self.rows)
        weights, width = packed.weights, codes.shape[2]
        self.condition = condition
        if condition is not None:
            self.condition = condition.repeat_interleave(copies, dim=0).permute(0, 2, 3, 1).to(weights).contiguous()
        self.cache = weights.new_zeros(packed.sizes.cache_elements(self.rows, width))
        self.no_logits = weights.new_empty(0, self.rows, packed.sizes.num_codes)

    def advance(self, begin: int, end: int, logits: Tensor | None = None) -> None:
        """Draws the codes at [begin, end); with `logits` (end - begin, R, K), writes those too."""
        temperature, top_k, top_p, guidance = self.options[:4]
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
