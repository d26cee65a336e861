"""Causal transformer prior: a decoder over the codes of a grid in raster order, as VQGAN and its successors use it.

Esser et al., "Taming Transformers for High-Resolution Image Synthesis" (2021), section 3.2, with pre-norm blocks. The
token at position i carries the code at i - 1 and the position i whose code it predicts; the token at position 0 is a
learned start, to which a label adds its class embedding, and every later token attends to it. A position is the sum of
a row's and a column's embedding, so that one model serves every grid up to `max_grid`. In training
`scaled_dot_product_attention` is causal and nothing N x N is built where it has a fused kernel; in sampling keys and
values are kept. A half-precision model is sampled in float32.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vqkernels.models import transformer_sampling
from vqkernels.models.prior import CodePrior


class TransformerBlock(nn.Module):
    """Pre-norm block: causal self-attention, then a feed-forward network of four times the width.

    Args:
        channels: width of a token.
        heads: number of attention heads, a divisor of channels.
        dropout: probability of dropping a feature that either half adds to its token.
    """

    def __init__(self, channels: int, heads: int, *, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(channels)
        self.query_key_value = nn.Linear(channels, 3 * channels)
        self.attention_output = nn.Linear(channels, channels)
        self.feedforward_norm = nn.LayerNorm(channels)
        self.feedforward = nn.Sequential(
            nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor, cache: Tensor | None = None, begin: int = 0) -> Tensor:
        """Tokens (B, T, C) at the positions [begin, begin + T) of a sequence, in and out.

        Args:
            cache: (2, B, heads, N, C / heads), keys and values of the whole sequence: those before `begin` are read,
                those of the tokens are written. None where the tokens are the whole sequence.
            begin: with a cache, either begin is 0 or T is 1.
        """
        projected = self.query_key_value(self.attention_norm(tokens)).unflatten(-1, (3, self.heads, -1))
        query, key, value = projected.permute(2, 0, 3, 1, 4)  # [B, heads, T, C / heads] each
        if cache is not None:
            end = begin + tokens.shape[1]
            cache[0, :, :, begin:end], cache[1, :, :, begin:end] = key, value
            key, value = cache[:, :, :, :end]
        # a single token behind others sees all that there is
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=begin == 0)
        tokens = tokens + self.dropout(self.attention_output(attended.transpose(1, 2).flatten(2)))
        return tokens + self.dropout(self.feedforward(self.feedforward_norm(tokens)))


class TransformerPrior(CodePrior):
    """Autoregressive model of code grids, p(codes) = prod_i p(code_i | codes before i in raster order, label).

    Args:
        num_codes: K, the number of values that a code takes.
        hidden_channels: width of a token, a multiple of num_heads.
        num_layers: number of blocks.
        num_heads: attention heads of a block.
        num_classes: number of labels; None for an unconditional prior.
        max_grid: height and width of the largest grid, for which there are embeddings of rows and columns.
        dropout: probability of dropping a feature of a token, and of what each half of a block adds, in training.
        label_dropout: probability of training a grid without its label, for classifier-free guidance (Ho and Salimans
            2022).

    Raises:
        ValueError: a size is out of range.
    """

    _cached_sample = staticmethod(transformer_sampling.cached_sample)

    def __init__(
        self,
        num_codes: int,
        *,
        hidden_channels: int = 128,
        num_layers: int = 6,
        num_heads: int = 4,
        num_classes: int | None = None,
        max_grid: tuple[int, int] = (32, 32),
        dropout: float = 0.0,
        label_dropout: float = 0.0,
    ) -> None:
        if num_heads > 0 and hidden_channels % num_heads:
            raise ValueError(f"hidden_channels must be a multiple of num_heads, {num_heads}, but is {hidden_channels}")
        if len(max_grid) != 2 or min(max_grid) < 1:
            raise ValueError(f"max_grid must be a height and a width of at least 1, but is {tuple(max_grid)}")
        super().__init__(
            num_codes, hidden_channels, num_classes, label_dropout, num_layers=num_layers, num_heads=num_heads
        )
        self.num_heads = num_heads
        self.start = nn.Parameter(torch.empty(hidden_channels))
        self.class_embedding = None if num_classes is None else nn.Embedding(num_classes, hidden_channels)
        self.row_embedding = nn.Parameter(torch.empty(max_grid[0], hidden_channels))
        self.column_embedding = nn.Parameter(torch.empty(max_grid[1], hidden_channels))
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(
            TransformerBlock(hidden_channels, num_heads, dropout=dropout) for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(hidden_channels)
        self.head = nn.Linear(hidden_channels, num_codes)
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        """Normal weights of deviation 0.02, smaller where a block adds to its tokens, as in GPT-2."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
            if isinstance(module, TransformerBlock):
                outputs: list[Any] = [module.attention_output, module.feedforward[2]]
                for output in outputs:
                    nn.init.normal_(output.weight, std=0.02 / math.sqrt(2 * len(self.layers)))
        for parameter in (self.start, self.row_embedding, self.column_embedding):
            nn.init.normal_(parameter, std=0.02)

    def forward(self, codes: Tensor, labels: Tensor | None = None) -> Tensor:
        """Logits (B, K, H, W) of codes (B, H, W) int64 given labels (B,); those at a position depend on earlier ones.

        Args:
            labels: for a class-conditional prior; with `label_dropout`, -1 means no label.

        Raises:
            ValueError: codes have the wrong shape or are larger than max_grid, or labels are missing, not expected or
                (on the CPU) out of range.
        """
        labels = self._prepare(codes, labels)
        batch, height, width = codes.shape
        tokens = torch.cat([self.start_token(labels, batch), self.embedding(codes.flatten(1))], dim=1)[:, :-1]
        tokens = self.dropout(tokens + self.positions(height, width))
        for layer in self.layers:
            tokens = layer(tokens)
        return self.head(self.norm(tokens)).transpose(1, 2).unflatten(2, (height, width))

    def start_token(self, labels: Tensor | None, batch: int) -> Tensor:
        """The token (B, 1, C) before the first code, without its position; a label of -1 adds nothing to it."""
        start = self.start.expand(batch, -1)
        if self.class_embedding is not None and labels is not None:
            start = start + self.class_embedding(labels.clamp_min(0)) * (labels >= 0)[:, None]
        return start[:, None]

    def positions(self, height: int, width: int) -> Tensor:
        """Embeddings (H * W, C) of the positions of a grid, in raster order.

        Raises:
            ValueError: the grid is larger than max_grid.
        """
        most = (len(self.row_embedding), len(self.column_embedding))
        if height > most[0] or width > most[1]:
            raise ValueError(f"a grid must be at most {most[0]} x {most[1]}, max_grid, but is {height} x {width}")
        return (self.row_embedding[:height, None] + self.column_embedding[:width]).flatten(0, 1)

    def _check_grid(self, shape: torch.Size, **inputs: Any) -> None:
        self.positions(*shape[1:])  # refuses a grid that is too large
