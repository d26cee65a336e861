"""What a wrapper changes on purpose, and why; a difference that is gone must leave this table: the tests say so."""

from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch

import pytest

DRAWN = "every process draws for its own rows: the draws are not those of one process on the joined batch"
OLD_WEIGHT_NORM = "torch cannot deep-copy a module with the old weight_norm after a forward; the peer's layer neither"
LEARNS_WITHOUT_GRAD = "learns in every training forward, also under no_grad, as the peer does"
BOOL_FLAG = "the peer's flag is bool, which the averages do not take: the first k-means runs again"
SHARDED_PARAMETER = (
    "a Parameter that FSDP shards keeps nothing that a forward writes into it: this needs moving averages"
)

# (wrapper, cell), both patterns of fnmatch -> why the result is not the plain run's.
DIFFERENCES = {
    ("deepcopy", "DAC *"): OLD_WEIGHT_NORM,
    ("AveragedModel*", "DAC *"): OLD_WEIGHT_NORM,
    ("*compile*", "taming VectorQuantizer, *"): "its one-hot matrix is sparse, at which torch.compile breaks the graph",
    ("*compile*", "lucidrains *, k-means"): "asks on the host whether k-means has run, as the peer does: a graph break",
    ("*compile*", "lucidrains *, dropout"): "draws levels by Python's generator, as the peer does: a graph break",
    ("compile around checkpoint", "DAC *"): "the old weight_norm writes an attribute, which no traced checkpoint may",
    ("update_bn", "DAC *"): OLD_WEIGHT_NORM,
    ("ema-pytorch", "DAC *"): OLD_WEIGHT_NORM,
    ("AveragedModel, use_buffers", "lucidrains [VR]*"): "torch cannot average bool buffers, and the peer has one",
    ("ema-pytorch", "lucidrains *, k-means"): BOOL_FLAG,
    ("training on from AveragedModel, use_buffers", "lucidrains *"): "torch cannot average bool buffers",
    **{
        ("update_bn", f"{layer}, {mode}"): LEARNS_WITHOUT_GRAD
        for layer in ("lucidrains *", "EnCodec *", "rosinality *")
        for mode in ("EMA", "manual EMA", "k-means", "revival", "temperature", "dropout")
    },
    ("compile around checkpoint", "*, k-means*"): "Dynamo allows no change of an attribute inside of a checkpoint",
    ("update_bn", "LlamaGen *"): "remembers the codes of every training forward, as the peer does",
    ("one rank and another", "LlamaGen *"): "every rank remembers the codes of its own rows, as the peer does",
    ("DDP*", "LlamaGen *"): "every rank remembers the codes of its own rows, as the peer does",
    ("FSDP[12]", "LlamaGen *"): "every rank remembers the codes of its own rows, as the peer does",
    ("distributed checkpoint, two ranks", "LlamaGen *"): "every rank remembers the codes of its own rows",
    **{
        (wrapper, f"{layer}, {mode}"): DRAWN
        for wrapper in ("DDP*", "FSDP[12]")
        for layer, mode in (
            ("*VectorQuantize*", "temperature*"),
            ("*VectorQuantizer*", "dropout*"),
            ("lucidrains *", "revival"),
            ("DAC *", "dropout"),
        )
    },
    ("DDP", "lucidrains *, dropout"): DRAWN,
    ("FSDP[12]", "lucidrains *, dropout"): DRAWN,
    ("DDP", "EnCodec *, k-means"): "rank 0 starts the codes from its own rows, as the peer does",
    ("FSDP[12]", "EnCodec *, k-means"): "rank 0 starts the codes from its own rows, as the peer does",
    ("FSDP[12]", "*, k-means, gradient"): SHARDED_PARAMETER,
    ("FSDP[12]", "*, revival, gradient"): SHARDED_PARAMETER,
}


def known(wrapper: str, cell: str) -> str | None:
    return next(
        (why for (one, other), why in DIFFERENCES.items() if fnmatch(wrapper, one) and fnmatch(cell, other)), None
    )


@contextmanager
def reason(wrapper: str, cell: str) -> Iterator[None]:
    """Around a comparison: it must hold, or fail where a difference is known."""
    why = known(wrapper, cell)
    if why is None:
        yield
        return
    # ema-pytorch leaves the program where it cannot copy a model.
    with pytest.raises((AssertionError, RuntimeError, SystemExit)):
        yield
        pytest.fail(f"the difference is gone: take it out of differences.py ({why})", pytrace=False)
