"""Whole graphs and no host synchronisation: compile, export, and a count at the dispatcher."""

import copy
import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vqkernels.nn import GroupedResidualVectorQuantizer, ResidualVectorQuantizer, VectorQuantizer

# Operators that a GPU answers only after the host has waited for it.
WAITING = {
    "_local_scalar_dense",
    "nonzero",
    "nonzero_numpy",
    "is_nonzero",
    "masked_select",
    "equal",
    "_unique",
    "_unique2",
}


class Synchronisations(TorchDispatchMode):
    """Collects what would make the host wait: values read back, sizes that depend on data, copies between devices."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        temperature = name == "_local_scalar_dense" and args[0].dtype == torch.float64  # it is a tensor of the host
        if name in WAITING and not temperature:
            self.found.append(str(func))
        if name in ("index", "index_put", "index_put_") and any(
            isinstance(i, torch.Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        ):
            self.found.append(f"{func} by a mask")
        if name == "_to_copy" and kwargs.get("device") not in (None, args[0].device):
            self.found.append(f"{func} to {kwargs['device']}")
        if name == "copy_" and args[0].device != args[1].device:
            self.found.append(f"{func} to {args[0].device}")
        if name == "repeat_interleave" and "output_size" not in kwargs:
            self.found.append(str(func))
        return func(*args, **kwargs)


def test_the_counter_counts():
    x = torch.randn(4)
    for wait in (
        lambda: x.sum().item(),
        lambda: bool(x.any()),
        lambda: x[x > 0],
        lambda: x.__setitem__(x > 0, x[0]),
        lambda: x.nonzero(),
        lambda: x.equal(x),
        lambda: x.masked_select(x > 0),
        lambda: x.unique(),
        lambda: x.repeat_interleave(torch.ones(4, dtype=torch.int64)),
        lambda: x.to("meta"),
        lambda: torch.zeros(4, device="meta").copy_(x),
    ):
        with Synchronisations() as counted:
            wait()
        assert counted.found, "a synchronisation went unseen"


CONFIGURATIONS = {
    "plain": dict(),
    "plain, revived": dict(revive="rows"),
    "EMA": dict(ema_decay=0.9),
    "EMA, revived": dict(ema_decay=0.9, revive="rows"),
    "manual, revived": dict(ema_decay=0.9, ema_update="manual", revive="rows"),
    "initialised": dict(init="kmeans", ema_decay=0.9, revive="rows"),
    "sampled": dict(temperature=1.0, ema_decay=0.9),
    "initialised, by gradient": dict(init="kmeans"),
    "cosine heads": dict(
        init="kmeans", ema_decay=0.9, revive="rows", metric="cosine", heads=2, separate_codebooks=True
    ),
    "projection": dict(ema_decay=0.9, revive="rows", codebook_dim=4, heads=2),
    "residual": dict(levels=3, init="kmeans", ema_decay=0.9, revive="rows", dropout=0.5),
    "residual, by gradient": dict(levels=2, revive="rows", shared_codebook=True),
    "grouped": dict(levels=2, groups=2, ema_decay=0.9, ema_update="manual", revive="rows"),
}


def build(name):
    options = CONFIGURATIONS[name]
    if "groups" in options:
        return GroupedResidualVectorQuantizer(6, 16, channel_dim=1, **options)
    return (ResidualVectorQuantizer if "levels" in options else VectorQuantizer)(6, 16, channel_dim=1, **options)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("masked", ["nothing", "mask", "lengths"])
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_no_step_waits_for_the_device(name, masked, training):
    layer = build(name).train(training)
    z = torch.randn(4, 6, 9)
    given = {
        "nothing": {},
        "mask": dict(mask=torch.rand(4, 9) < 0.5),
        "lengths": dict(lengths=torch.tensor([9, 0, 3, 4])),
    }
    for step in range(3):
        leaf = z.clone().requires_grad_()
        with Synchronisations() as counted:
            quantized, _, loss = layer(leaf, **given[masked])
            (quantized.sum() + loss.sum()).backward()
            if training and layer.ema_update == "manual":
                layer.update_codebook()
            _ = layer.perplexity, layer.usage, layer.dead_codes
        starts = step == 0 and training and layer.init == "kmeans"  # the first forward asks whether it is the first
        assert len(counted.found) <= 2 if starts else counted.found == []


# Inductor takes long over the many small operators of a revival on a CPU; graphs are whole or not before it sees them.
COMPILED = [(name, "aot_eager") for name in CONFIGURATIONS]
COMPILED += [pytest.param("EMA, revived", "inductor", marks=pytest.mark.slow)]


@pytest.mark.parametrize("name,compiler", COMPILED)
def test_compiles_whole_in_training_and_eval(name, compiler):
    torch._dynamo.reset()
    plain = build(name)
    twin = copy.deepcopy(plain)
    compiled = torch.compile(twin, fullgraph=True, backend=compiler)
    for mode, mask in itertools.product((True, False), (None, torch.rand(4, 9) < 0.6)):
        plain.train(mode), twin.train(mode)
        for _ in range(2):
            z = torch.randn(4, 6, 9)
            a, b = z.clone().requires_grad_(), z.clone().requires_grad_()
            expected, got = plain(a, mask=mask), compiled(b, mask=mask)
            for one, other in zip(expected, got, strict=True):
                torch.testing.assert_close(one, other)
            for (quantized, _, loss), _ in ((expected, a), (got, b)):
                (quantized.square().sum() + loss.sum()).backward()
            torch.testing.assert_close(a.grad, b.grad)
        for key, value in plain.state_dict().items():
            torch.testing.assert_close(twin.state_dict()[key], value, msg=f"{key} differs")


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_exports_with_a_dynamic_batch(name):
    layer = build(name).eval()
    program = torch.export.export(
        layer,
        (torch.randn(4, 6, 9),),
        dynamic_shapes={"z": {0: torch.export.Dim("batch"), 2: torch.export.Dim("time")}},
    )
    z = torch.randn(3, 6, 5)
    for one, other in zip(program.module()(z), layer(z), strict=True):
        assert one.equal(other)
