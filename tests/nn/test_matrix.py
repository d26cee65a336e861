"""Every combination of layout, heads, projection, mask, training, gradient and metric against plain PyTorch.

The reference here is written for one row at a time of channels-last float64 data: no kernel, no view, no custom
gradient. It is what the documentation of the layer says, and nothing else.
"""

import itertools

import pytest
import torch
from nn.combinations import BETA, CODES, DECAY, DIM, GRADIENTS, LAYOUTS, METRICS, compare, rotated, rows_that_count

from vqkernels.nn import VectorQuantizer

HEADS = {"one": (1, False), "shared": (2, False), "separate": (2, True)}
MASKS = ("none", "mask", "lengths")

COMBINATIONS = [
    c
    for c in itertools.product(LAYOUTS, HEADS, (False, True), MASKS, (None, DECAY), GRADIENTS, METRICS)
    if not (c[0] == "rows" and c[3] == "lengths")  # lengths need a batch and positions
]


def plain(layer, z, mask, gradient):
    """Quantized, indices, loss of channels-last z (N, DIM) by loops; and the codebook after an EMA step from zero."""
    project_in = layer.project_in or (lambda x: x)
    project_out = layer.project_out or (lambda x: x)
    books = layer.codebook if layer.separate_codebooks else layer.codebook.expand(layer.heads, -1, -1)
    if layer.metric == "cosine":
        books = books / books.norm(dim=-1, keepdim=True)
    n = torch.zeros(layer.counts.shape, dtype=torch.float64)
    m = torch.zeros(layer.codebook.shape, dtype=torch.float64)
    outputs, indices, errors = [], [], []
    for row, kept in zip(z, mask.tolist(), strict=True):
        if not kept:
            outputs.append(torch.zeros(DIM, dtype=torch.float64))
            indices.append([-1] * layer.heads)
            continue
        parts, chosen = [], []
        for head, x in enumerate(project_in(row).view(layer.heads, -1)):
            if layer.metric == "cosine":
                x = x / x.norm()
            book = books[head]
            score = (x - book).square().sum(1) if layer.metric == "euclidean" else -(book @ x)
            k = int(score.argmin())
            e = book[k]
            through = rotated(x, e) if gradient == "rotation" else x + (e - x).detach()
            parts.append(through)
            chosen.append(k)
            commitment = BETA * (x - e.detach()).square()
            errors.append(commitment if layer.ema_decay is not None else commitment + (x.detach() - e).square())
            at = (head, k) if layer.separate_codebooks else (k,)
            n[at] += 1
            m[at] += x.detach()
        outputs.append(project_out(torch.cat(parts)))
        indices.append(chosen)
    used = (n > 0).unsqueeze(-1)
    updated = torch.where(used, m / n.unsqueeze(-1).clamp_min(1), layer.codebook)
    loss = torch.stack(errors).mean()
    return torch.stack(outputs), torch.tensor(indices), loss, n, updated


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_combination_is_the_plain_computation(layout, metric):
    combinations = [c for c in COMBINATIONS if c[0] == layout and c[-1] == metric]
    assert len(combinations) == 12 * (2 if layout == "rows" else 3) * len(GRADIENTS)
    for number, combination in enumerate(combinations):
        check(number, *combination)


def check(seed, layout, heads, projects, masked, ema_decay, gradient, metric):
    torch.manual_seed(seed)
    shape, channel_dim = LAYOUTS[layout]
    count, separate = HEADS[heads]
    layer = VectorQuantizer(
        DIM,
        CODES,
        codebook_dim=4 if projects else None,
        heads=count,
        separate_codebooks=separate,
        beta=BETA,
        ema_decay=ema_decay,
        metric=metric,
        gradient=gradient,
        channel_dim=channel_dim,
    ).double()
    layer.codebook.data.normal_()
    z = torch.randn(shape, dtype=torch.float64)
    row_shape = z.select(channel_dim, 0).shape
    mask, arguments = rows_that_count(masked, row_shape)
    found = []

    def computed(rows):
        outputs, indices, loss, *state = plain(layer, rows, mask.reshape(-1), gradient)
        found.extend(state)
        return outputs, indices if count > 1 else indices.squeeze(1), loss

    compare(layer, z, mask, arguments, computed)
    n, updated = found
    torch.testing.assert_close(layer.counts, n.long())
    if ema_decay is not None:
        torch.testing.assert_close(layer.codebook, updated, rtol=1e-9, atol=1e-12)
