"""The forward pass of a PixelCNN by the fused layers of `vqkernels.ops.pixelcnn_layer`, and when they serve.

It is what `PixelCNN.stacks` and the head compute, which remain the specification: the same function of the same
parameters, up to the order of sums. The biases in front of a gate, which positions share, are added up beforehand.
"""

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

from vqkernels.backends import registry
from vqkernels.ops.pixelcnn_head import logits_of_rows
from vqkernels.ops.pixelcnn_layer import gated_layer, look_up_taps, start_layer

NARROWEST = 3  # columns of a grid below which a tile of four outputs costs more than the convolution


class Model(Protocol):
    """What a PixelCNN holds."""

    embedding: nn.Embedding
    layers: nn.ModuleList
    head: nn.Sequential

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def modules(self) -> Iterator[nn.Module]: ...


def serves(model: Model, codes: Tensor, condition: Tensor | None) -> bool:
    """Whether the fused layers compute these codes (B, H, W): on the CPU by its kernels, in float32 or float64.

    The specification serves everywhere else: under autocast, `torch.func` and forward differentiation, in an exported
    or traced graph, with kernels other than 3, where a hook on a part of the model waits to be called, and where
    somebody has put another module in the place of one, or another `forward`.
    """
    if torch.compiler.is_exporting() or torch.jit.is_tracing():
        return False
    if codes.device.type != "cpu" or registry.resolve("auto", codes.device) != "cpu":
        return False
    if torch.is_autocast_enabled("cpu") or codes.shape[2] < NARROWEST or codes.numel() == 0:
        return False
    if codes.dtype not in (torch.int64, torch.int32) or not _embeds(model.embedding):
        return False
    layers: list[Any] = list(model.layers)
    dtype = model.embedding.weight.dtype
    if dtype not in (torch.float32, torch.float64) or not all(map(_convolves, layers)) or not _has_head(model.head):
        return False
    if any(layer.vertical.kernel_size != (2, 3) for layer in layers[1:]):
        return False
    if any(p.dtype != dtype or p.device.type != "cpu" for p in model.parameters()):
        return False
    if condition is not None and condition.dtype != dtype:
        return False
    if torch.compiler.is_compiling():
        return True
    if torch._C._are_functorch_transforms_active() or nn.modules.module._has_any_global_hook():
        return False
    if forward_ad._current_level >= 0:
        return False
    return not any(map(_changed, model.modules()))


def logits(model: Model, codes: Tensor, labels: Tensor | None, condition: Tensor | None) -> Tensor:
    """(B, K, H, W) of codes (B, H, W) that `serves` accepted."""
    grid = (codes.shape[0], codes.shape[1], codes.shape[2])
    layers: list[Any] = list(model.layers)
    head: list[Any] = list(model.head)
    first, *others = layers
    above, beside = _first_convolutions(model, first, codes.long().contiguous())
    given = None if condition is None else condition.permute(0, 2, 3, 1).flatten(0, 2)  # [B H W, C']
    shifts = _shifts(layers, labels, given, grid)
    tiles, pairs, features = start_layer(
        above, beside, shifts[0], _across(first), *_output(first, grid), grid,
        last=not others, backend="cpu",
    )  # fmt: skip
    for number, layer in enumerate(others, 1):
        tiles, pairs, features = gated_layer(
            tiles, pairs, features, shifts[number], layer.vertical.weight,
            _across(layer), layer.horizontal.weight[:, :, 0].permute(2, 1, 0).flatten(0, 1), *_output(layer, grid),
            grid, last=number == len(others), backend="cpu",
        )  # fmt: skip
    activation, hidden, _, last = head
    weights = hidden.weight.flatten(1), hidden.bias, last.weight.flatten(1), last.bias
    return logits_of_rows(activation(features), *weights, grid, "cpu")


def _first_convolutions(model: Model, layer: Any, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Both convolutions (B H W, 2C) of the first layer, without biases: products with every code, looked up, or with
    every position where the grids hold fewer."""
    if model.embedding.num_embeddings <= codes.numel():
        inputs = model.embedding.weight
    else:
        inputs = model.embedding(codes).flatten(0, 2)
        codes = torch.arange(codes.numel()).view(codes.shape)
    found = []
    for convolution in (layer.vertical, layer.horizontal):
        outputs, channels, rows, columns = convolution.weight.shape
        matrix = convolution.weight.permute(1, 2, 3, 0).reshape(channels, -1)
        table = (inputs @ matrix).view(-1, rows * columns, outputs)
        up = rows if convolution is layer.vertical else 0  # mask A: the rows above, then the columns to the left
        left = columns // 2 if convolution is layer.vertical else columns
        found.append(look_up_taps(codes, table, (rows, columns, up, left), "cpu"))
    return found[0], found[1]


def _shifts(
    layers: list[Any], labels: Tensor | None, condition: Tensor | None, grid: tuple[int, int, int]
) -> list[tuple[Tensor, Tensor]]:
    """What each layer's gates add to their features, (B, 2C) or with a condition (B H W, 2C): biases, label, condition.

    Made for all layers at once: there are many small tensors in it.
    """
    batch, height, width = grid
    own = torch.stack([layer.vertical.bias for layer in layers])  # [L, 2C]
    across = torch.stack([layer.vertical_to_horizontal.weight.flatten(1) for layer in layers])  # [L, 2C, 2C]
    beside = torch.bmm(across, own[:, :, None])[:, :, 0]
    for part in ("vertical_to_horizontal", "horizontal"):
        beside = beside + torch.stack([getattr(layer, part).bias for layer in layers])
    shift = torch.stack([own, beside], 1)[:, :, None].expand(-1, -1, batch, -1)  # [L, 2, B, 2C]
    if labels is not None:
        biases = torch.cat([layer.class_bias.weight for layer in layers], 1)  # [classes, L 4C]
        label = F.embedding(labels.clamp_min(0), biases) * (labels >= 0)[:, None]  # -1 adds nothing
        shift = shift + label.view(batch, len(layers), 2, -1).permute(1, 2, 0, 3)
    if condition is not None:
        weights = torch.cat([layer.condition.weight.flatten(1) for layer in layers])  # [L 4C, C']
        here = (condition @ weights.t()).view(batch, height * width, len(layers), 2, -1)
        shift = (here.permute(2, 3, 0, 1, 4) + shift[:, :, :, None]).flatten(2, 3)
    parts = shift.contiguous().flatten(0, 1).unbind(0)
    return list(zip(parts[::2], parts[1::2], strict=True))


def _across(layer: Any) -> Tensor:
    return layer.vertical_to_horizontal.weight.flatten(1).t()


def _output(layer: Any, grid: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor | None]:
    """Matrix and bias behind the horizontal gate, and the scaled mask of a dropout, drawn as the specification does."""
    matrix, bias = layer.output.weight.flatten(1).t(), layer.output.bias
    if layer.dropout.p == 0 or not layer.dropout.training:
        return matrix, bias, None
    batch, height, width = grid
    return matrix, bias, layer.dropout(matrix.new_ones(batch * height * width, len(matrix)))


def _is(module: Any, kind: type[nn.Module]) -> bool:
    """Whether a module computes what this kind does; it may have parametrized weights."""
    return isinstance(module, kind) and type(module).forward is kind.forward


def _embeds(module: Any) -> bool:
    """An embedding that looks up and no more."""
    return _is(module, nn.Embedding) and module.max_norm is None and module.padding_idx is None


def _convolves(layer: Any) -> bool:
    parts = [layer.vertical, layer.horizontal, layer.vertical_to_horizontal, layer.output]
    parts += [] if layer.condition is None else [layer.condition]
    has_labels = layer.class_bias is None or _embeds(layer.class_bias)
    return has_labels and all(_is(part, nn.Conv2d) for part in parts) and _is(layer.dropout, nn.Dropout)


def _has_head(head: nn.Sequential) -> bool:
    return len(head) == 4 and _is(head[2], nn.ReLU) and all(_multiplies(head[place]) for place in (1, 3))


def _multiplies(module: Any) -> bool:
    """A 1x1 convolution with a bias."""
    return _is(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.bias is not None


def _changed(module: nn.Module) -> bool:
    """Whether a call of the module does more than its class does, or something else."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "forward" in vars(module)
