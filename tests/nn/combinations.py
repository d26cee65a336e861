"""What the tests of every combination share: layouts, masks, the rotation trick, the comparison with plain PyTorch."""

import torch

DIM, BETA, DECAY, CODES = 6, 0.3, 0.8, 7
LAYOUTS = {
    "rows": ((5, DIM), -1),
    "sequence": ((2, 5, DIM), -1),
    "audio": ((2, DIM, 5), 1),
    "image": ((2, DIM, 3, 2), 1),
}
METRICS = ("euclidean", "dot", "cosine")
GRADIENTS = ("straight_through", "rotation")


def rotated(z, e):
    """e as a rotation and scaling of z held constant (Fifty et al. 2024, equation 4)."""
    u, v = z.detach() / z.detach().norm(), e.detach() / e.detach().norm()
    r = (u + v) / (u + v).norm()
    return e.detach().norm() / z.detach().norm() * (z - 2 * (z @ r) * r + 2 * (z @ u) * v)


def rows_that_count(masked, shape):
    """A bool mask of rows of this shape, and the arguments of `forward` that say so."""
    mask = torch.ones(shape, dtype=torch.bool)
    if masked == "mask":
        mask = torch.rand(shape) < 0.6
        mask.view(-1)[0] = True
        return mask, dict(mask=mask)
    if masked == "lengths":
        lengths = torch.tensor([2, 1])
        kept = torch.arange(shape[1]) < lengths[:, None]
        return kept.view(*kept.shape, *[1] * (len(shape) - 2)).expand(shape), dict(lengths=lengths)
    return mask, {}


def compare(layer, z, kept, arguments, plain):
    """Results, gradients of all results together, and decoding, against those of channels-last rows.

    `plain(rows (N, DIM))` gives quantized `(N, DIM)`, indices `(N, ...)` and losses.
    """
    channel_dim = layer.channel_dim
    z = torch.where(kept.unsqueeze(channel_dim), z, torch.nan).requires_grad_()
    rows = z.detach().movedim(channel_dim, -1).reshape(-1, DIM).requires_grad_()
    expected, indices, losses = plain(rows)
    incoming, weights = torch.randn_like(expected), torch.randn_like(losses)
    value = (expected * incoming).sum() + (losses * weights).sum()
    wanted = torch.autograd.grad(value, [rows, *layer.parameters()], allow_unused=True)

    quantized, got, got_losses = layer(z, **arguments)
    upstream = incoming.view(*kept.shape, DIM).movedim(-1, channel_dim)
    value = (quantized * upstream).sum() + (got_losses * weights).sum()
    grads = torch.autograd.grad(value, [z, *layer.parameters()], allow_unused=True)

    close = dict(rtol=1e-9, atol=1e-11)
    assert quantized.shape == z.shape and quantized.dtype == z.dtype and got_losses.shape == losses.shape
    torch.testing.assert_close(quantized.movedim(channel_dim, -1).reshape(-1, DIM), expected, **close)
    assert got.equal(indices.view(*kept.shape, *indices.shape[1:]))
    torch.testing.assert_close(got_losses, losses, **close)
    rows_gradient = torch.where(kept.reshape(-1, 1), wanted[0], 0.0)
    torch.testing.assert_close(grads[0].movedim(channel_dim, -1).reshape(-1, DIM), rows_gradient, **close)
    for ours, theirs in zip(grads[1:], wanted[1:], strict=True):
        torch.testing.assert_close(ours, theirs, **close)
    layer.eval()
    again, codes, _ = layer(z.detach(), **arguments)
    assert layer.decode(codes).equal(again)
