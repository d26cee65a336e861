"""Cached ancestral sampling from a transformer prior: keys and values of every position are computed once.

The cache of a chunk is allocated before its first position. Codes that all grids of a chunk know at the beginning, as
in a completion, go through the model in one pass.
"""

import copy
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vqkernels.backends.drawing import draw_codes, guided
from vqkernels.models.ancestral_sampling import CHUNK_BYTES, Options, Sampled, bar, chunks, evaluating, with_and_without


class SampledTransformer(Sampled, Protocol):
    """What the cached sampler asks of a transformer."""

    num_heads: int
    layers: nn.ModuleList
    norm: nn.LayerNorm
    head: nn.Linear

    def start_token(self, labels: Tensor | None, batch: int) -> Tensor: ...

    def positions(self, height: int, width: int) -> Tensor: ...


def cached_sample(
    model: SampledTransformer, codes: Tensor, noise: Tensor, labels: Tensor | None, options: Options
) -> Tensor:
    """Codes by `CachedSampler`, a chunk of the batch at a time."""
    batch, height, width = codes.shape
    module: Any = model
    with evaluating(module):
        if model.embedding.weight.dtype in (torch.float16, torch.bfloat16):
            model = copy.deepcopy(module).float()
        copies = 2 if options.guidance != 1.0 else 1
        row_bytes = copies * height * width * 2 * len(model.layers) * model.embedding.weight[0].nbytes
        parts = chunks(batch, options.chunk, row_bytes, CHUNK_BYTES)
        sampler = None
        for part, row in bar([(part, row) for part in parts for row in range(height)], options.progress, "row"):
            if row == 0:
                given = None if labels is None else labels[part]
                sampler = CachedSampler(model, codes[part], noise[part], given, options)
            assert sampler is not None
            sampler.advance(row * width, (row + 1) * width)
    return codes


class CachedSampler:
    """Advances one chunk of a batch through its grid.

    Args:
        model: in eval mode.
        codes: (B, H, W) int64, written in place where they are -1.
        noise: (B, H, W) float64.
        labels: (B,) or None.
        options: how codes are drawn.
    """

    def __init__(
        self, model: SampledTransformer, codes: Tensor, noise: Tensor, labels: Tensor | None, options: Options
    ) -> None:
        self.model, self.options = model, options
        self.codes, self.noise = codes.view(len(codes), -1), noise.flatten(1)  # [B, N]
        labels, self.copies = with_and_without(labels, options.guidance)
        rows, length = self.copies * len(codes), self.codes.shape[1]
        self.start = model.start_token(labels, rows)
        self.positions = model.positions(*codes.shape[1:])
        heads, channels = model.num_heads, model.embedding.embedding_dim
        self.caches = self.start.new_empty(len(model.layers), 2, rows, heads, length, channels // heads)
        unknown = (self.codes < 0).any(0).nonzero()
        self.done = int(unknown[0, 0]) if len(unknown) else length
        if self.done:
            self.features(0, self.done)

    def features(self, begin: int, end: int) -> Tensor:
        """Last features (R, end - begin, C) at positions of which every earlier code is there; begin is 0, or the
        position behind the last one, and then end is begin + 1."""
        before = self.codes[:, max(begin - 1, 0) : end - 1].repeat_interleave(self.copies, dim=0)
        tokens = self.model.embedding(before)
        if begin == 0:
            tokens = torch.cat([self.start, tokens], dim=1)
        tokens = tokens + self.positions[begin:end]
        for layer, cache in zip(self.model.layers, self.caches, strict=True):
            tokens = layer(tokens, cache, begin)
        return tokens

    def logits(self, position: int) -> Tensor:
        """(R, K), the logits of the code at a position; positions come in order, each once."""
        return self.model.head(self.model.norm(self.features(position, position + 1)[:, 0]))

    def advance(self, begin: int, end: int) -> None:
        """Draws the codes at [begin, end); every earlier position must have been advanced."""
        temperature, top_k, top_p, guidance = self.options[:4]
        for position in range(max(begin, self.done), end):
            logits = self.logits(position)
            if guidance != 1.0:
                logits = guided(logits, guidance)
            drawn = draw_codes(logits, self.noise[:, position], temperature, top_k, top_p)
            there = self.codes[:, position]
            self.codes[:, position] = torch.where(there < 0, drawn, there)
