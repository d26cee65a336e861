"""What a state dict that does not fit a layer should have been, in sentences that say what to do.

Wrong sizes are errors whatever the caller asked for. Missing and unexpected keys are errors only with strict=True, of
which a module is not told: their sentence travels with the key, an `ExplainedKey`, into torch's message.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor


class ExplainedKey(str):
    """A key that equals its name and, in an f-string, tells what to do about it."""

    sentence: str

    def __new__(cls, key: str, sentence: str) -> "ExplainedKey":
        explained = super().__new__(cls, key)
        explained.sentence = sentence
        return explained

    def __format__(self, spec: str) -> str:
        return f"{format(str(self), spec)}: {self.sentence}"


def explain_sizes(state: Mapping[str, Any], prefix: str, codebook: Tensor, axes: tuple[str, ...]) -> list[str]:
    """A sentence where the saved codebook is not of this layer's shape, whose axes have these names."""
    name = f"{prefix}codebook"
    saved = state.get(name)
    if not isinstance(saved, Tensor) or saved.shape == codebook.shape:
        return []
    if saved.dim() != codebook.dim() and not {"levels", "groups"}.isdisjoint(axes):
        return [
            f"{name} has shape {list(saved.shape)} in the checkpoint, but this layer holds {list(codebook.shape)} "
            f"({', '.join(axes)}): build it with the checkpoint's levels, groups and shared_codebook."
        ]
    if saved.dim() != codebook.dim():
        kinds = {2: "one codebook (K, D)", 3: "one codebook per head (H, K, D)"}
        return [
            f"{name} has shape {list(saved.shape)} in the checkpoint, {kinds.get(saved.dim(), 'no codebook of ours')}, "
            f"but this layer holds {kinds[codebook.dim()]}: build it with separate_codebooks={saved.dim() == 3}."
        ]
    differ = [
        f"{what}={theirs} where this layer has {ours}"
        for what, theirs, ours in zip(axes, saved.shape, codebook.shape, strict=True)
        if theirs != ours
    ]
    return [f"{name} was saved with {' and '.join(differ)}: build the layer with the checkpoint's sizes."]


# Counters of draws, and how the codes began: what a layer has and a checkpoint has not stays as it is.
_OF_TRAINING = frozenset({"seed", "sample_steps", "dropout_steps"})
_USAGE = frozenset({"ema_counts", "ema_steps"})
_SENTENCES = {
    ("ema_sums", True): (
        "this layer has ema_decay set, but the codebook was trained by gradient; build it with ema_decay=None, or "
        "load with strict=False to go on by moving averages, in which each loaded code weighs as much as one row"
    ),
    ("ema_sums", False): (
        "the codebook was trained by moving averages, but this layer has ema_decay=None; build it with ema_decay, "
        "or load with strict=False to decode or to go on by gradient from these codes"
    ),
    ("ema_counts", True): (
        'this layer has revive="rows", but the checkpoint holds no usage; build it with revive="off", or load with '
        "strict=False: each loaded code then counts as used by one row"
    ),
    ("initialised", True): (
        'this layer has init="kmeans", but the checkpoint is of a layer without; build it with init="uniform", or '
        "load with strict=False: either way the loaded codes are kept"
    ),
}


def explain_keys(keys: list[str], prefix: str, missing: bool) -> None:
    """Takes out, in place, the keys below `prefix` that do not matter, and lets those that do say what to do.

    A layer for decoding loads what a layer in training saved: counters of draws, the flag of an initialisation, and
    the usage that revival looks at.
    """
    passed_over = _OF_TRAINING if missing else _OF_TRAINING | _USAGE | {"initialised"}
    averaged = f"{prefix}ema_sums" in keys
    kept = []
    for key in keys:
        name = key[len(prefix) :] if key.startswith(prefix) else ""
        if name in passed_over:
            continue
        sentence = None if averaged and name == "ema_counts" else _SENTENCES.get((name, missing))
        kept.append(key if sentence is None else ExplainedKey(key, sentence))
    keys[:] = kept
