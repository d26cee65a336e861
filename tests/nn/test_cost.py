"""What the layer adds to the bare operator, counted at the dispatcher: no pass over the rows, a few small operators."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

import vqkernels
from vqkernels.nn import VectorQuantizer

ROWS, CODES, DIM = 4096, 512, 64
VIEWS = {
    "view",
    "alias",
    "detach",
    "unsqueeze",
    "squeeze",
    "select",
    "as_strided",
    "expand",
    "t",
    "transpose",
    "_unsafe_view",
}


class Work(TorchDispatchMode):
    """Names of the operators, and the elements each reads and writes; views are free."""

    def __init__(self):
        super().__init__()
        self.operators = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name not in VIEWS:
            tensors = [x for x in tree_flatten((args, kwargs, out))[0] if isinstance(x, torch.Tensor)]
            self.operators.append((name, sum(x.numel() for x in tensors)))
        return out


def bare(z, codebook):
    quantized, _, codebook_loss, commitment_loss = vqkernels.vector_quantize(z, codebook)
    return quantized, codebook_loss + 0.25 * commitment_loss


def work(step, z):
    leaf = z.clone().requires_grad_()
    incoming = torch.randn_like(z)
    with Work() as counted:
        quantized, loss = step(leaf)
        torch.autograd.backward([quantized, loss], [incoming, None])
    return counted.operators


def beyond(ours, theirs):
    """The operators of one list that the other does not have."""
    rest = list(theirs)
    return [one for one in ours if not (one in rest and rest.remove(one) is None)]


@pytest.mark.parametrize("training", [True, False])
def test_the_plain_layer_adds_less_than_a_tenth(training, cpu_kernels):
    """Beside the operator's N K D multiply-adds and its passes over z, the layer's own work is a sliver."""
    layer = VectorQuantizer(DIM, CODES).train(training)
    z = torch.randn(ROWS, DIM)
    plain = work(lambda leaf: bare(leaf, layer.codebook), z)
    layer.codebook.grad = None
    whole = work(lambda leaf: (lambda out: (out[0], out[2]))(layer(leaf)), z)
    extra = [(name, elements) for name, elements in beyond(whole, plain) if name != "quantize"]
    # In training: the counts are kept, and autograd makes zeros for the statistics, which have no gradient.
    assert [name for name, _ in extra] == (["copy_", "zeros", "zeros"] if training else [])
    assert sum(elements for _, elements in extra) < 0.1 * sum(elements for _, elements in plain)
    assert sum(elements for _, elements in extra) <= CODES * (DIM + 4)
    (ours,), (theirs,) = ([e for name, e in operators if name == "quantize"] for operators in (whole, plain))
    assert ours - theirs == (CODES * (DIM + 1) if training else 0)  # it writes the statistics, too


def test_an_ema_layer_makes_no_pass_over_the_rows(cpu_kernels):
    layer = VectorQuantizer(DIM, CODES, ema_decay=0.99)
    z = torch.randn(ROWS, DIM)
    codes = layer.codebook.clone()
    plain = work(lambda leaf: bare(leaf, codes), z)
    whole = work(lambda leaf: (lambda out: (out[0], out[2]))(layer(leaf)), z)
    extra = beyond(whole, plain)
    passes = [
        (name, elements) for name, elements in extra if elements >= ROWS * DIM and not name.startswith("quantize")
    ]
    assert passes == [], "an operator of the EMA update reads something as large as z"
    own = sum(elements for name, elements in extra if not name.startswith("quantize"))
    assert own < 0.01 * ROWS * CODES * DIM
