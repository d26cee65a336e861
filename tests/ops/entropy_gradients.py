"""What the tests of the entropy loss compare: gradients for given incoming ones, and the usual way to write it."""

import torch

WEIGHTS = {"sample": (0.7, 0.0), "codebook": (0.0, -1.3), "both": (0.7, -1.3)}


def gradients(function, z, codebook, temperature, weights, **options):
    """Gradients of weights . (sample entropy, codebook entropy), summed over heads with weights of their own."""
    z, codebook = z.detach().requires_grad_(), codebook.detach().requires_grad_()
    found = function(z, codebook, temperature, **options)
    heads = 1 + torch.arange(found[0].numel()).view(found[0].shape) / 3
    incoming = [(weight * heads).to(x.dtype) for weight, x in zip(weights, found, strict=True)]
    return torch.autograd.grad(found, (z, codebook), incoming)


def scalar(value):
    """A temperature as the operators take it."""
    return torch.tensor(value, dtype=torch.float64)


def double(x):
    return x.double()


def plain(z, codebook, temperature, metric="euclidean"):
    """What everyone writes, in the inputs' dtype: the measure of how exact float32 must be."""
    logits = z @ codebook.T
    if metric == "euclidean":
        logits = -(z.square().sum(1, keepdim=True) - 2 * logits + codebook.square().sum(1))
    shares, logarithms = (logits / temperature).softmax(1), (logits / temperature).log_softmax(1)
    mean = shares.mean(0)
    return -(shares * logarithms).sum(1).mean(), -(mean * mean.clamp_min(1e-30).log()).sum()


def close(found, expected, tolerance):
    """Equal to within a tolerance relative to the largest element."""
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(double(ours), double(theirs), rtol=0, atol=tolerance * float(theirs.abs().max()))
