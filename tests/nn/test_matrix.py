"""Every combination of layout, heads, projection, mask, training, gradient and metric against plain PyTorch.

The reference here is written for one row at a time of channels-last float64 data: no kernel, no view, no custom
gradient. It is what the documentation of the layer says, and nothing else.
"""

import itertools

import pytest
import torch

from vqkernels.nn import VectorQuantizer

DIM, BETA, DECAY, CODES = 6, 0.3, 0.8, 7
LAYOUTS = {
    "rows": ((5, DIM), -1),
    "sequence": ((2, 5, DIM), -1),
    "audio": ((2, DIM, 5), 1),
    "image": ((2, DIM, 3, 2), 1),
}
HEADS = {"one": (1, False), "shared": (2, False), "separate": (2, True)}
MASKS = ("none", "mask", "lengths")
METRICS = ("euclidean", "dot", "cosine")
GRADIENTS = ("straight_through", "rotation")

COMBINATIONS = [
    c
    for c in itertools.product(LAYOUTS, HEADS, (False, True), MASKS, (None, DECAY), GRADIENTS, METRICS)
    if not (c[0] == "rows" and c[3] == "lengths")  # lengths need a batch and positions
]


def rotated(z, e):
    """e as a rotation and scaling of z held constant (Fifty et al. 2024, equation 4); straight through from zero."""
    u, v = z.detach() / z.detach().norm(), e.detach() / e.detach().norm()
    r = (u + v) / (u + v).norm()
    scale = e.detach().norm() / z.detach().norm()
    return scale * (z - 2 * (z @ r) * r + 2 * (z @ u) * v)


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
    mask, arguments = torch.ones(row_shape, dtype=torch.bool), {}
    if masked == "mask":
        mask = torch.rand(row_shape) < 0.6
        mask.view(-1)[0] = True
        arguments["mask"] = mask
    if masked == "lengths":
        lengths = torch.tensor([2, 1])
        arguments["lengths"] = lengths
        kept = torch.arange(row_shape[1]) < lengths[:, None]
        mask = kept.view(*kept.shape, *[1] * (len(row_shape) - 2)).expand(row_shape)
    z = torch.where(mask.unsqueeze(channel_dim), z, torch.nan).requires_grad_()

    rows = z.detach().movedim(channel_dim, -1).reshape(-1, DIM).requires_grad_()
    expected, indices, loss, n, updated = plain(layer, rows, mask.reshape(-1), gradient)
    incoming = torch.randn_like(expected)
    leaves = [rows, *layer.parameters()]
    wanted = torch.autograd.grad((expected * incoming).sum() + loss, leaves, allow_unused=True)

    quantized, got, got_loss = layer(z, **arguments)
    upstream = incoming.view(*row_shape, DIM).movedim(-1, channel_dim)
    grads = torch.autograd.grad((quantized * upstream).sum() + got_loss, [z, *layer.parameters()], allow_unused=True)

    close = dict(rtol=1e-9, atol=1e-12)
    assert quantized.shape == z.shape and quantized.dtype == z.dtype
    torch.testing.assert_close(quantized.movedim(channel_dim, -1).reshape(-1, DIM), expected, **close)
    assert got.equal(indices.view(*row_shape, count) if count > 1 else indices.view(row_shape))
    torch.testing.assert_close(got_loss, loss, **close)
    torch.testing.assert_close(layer.counts, n.long())
    rows_gradient = torch.where(mask.reshape(-1, 1), wanted[0], 0.0)
    torch.testing.assert_close(grads[0].movedim(channel_dim, -1).reshape(-1, DIM), rows_gradient, **close)
    for ours, theirs in zip(grads[1:], wanted[1:], strict=True):
        torch.testing.assert_close(ours, theirs, **close)
    if ema_decay is not None:
        torch.testing.assert_close(layer.codebook, updated, **close)
    layer.eval()
    again, codes, _ = layer(z.detach(), **arguments)
    assert layer.decode(codes).equal(again)
