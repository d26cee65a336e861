"""Explains why a state dict does not fit a layer, and what to do.

Wrong sizes are always errors. Missing and unexpected keys are errors only with strict=True, which a module does not
know. Their explanation is therefore part of the key, an `ExplainedKey`, and torch puts it into its message.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor


class ExplainedKey(str):
    """A key that equals its name; in an f-string an explanation follows it."""

    explanation: str

    def __new__(cls, key: str, explanation: str) -> "ExplainedKey":
        explained = super().__new__(cls, key)
        explained.explanation = explanation
        return explained

    def __format__(self, spec: str) -> str:
        return f"{format(str(self), spec)}: {self.explanation}"


def explain_sizes(state: Mapping[str, Any], prefix: str, codebook: Tensor, axes: tuple[str, ...]) -> list[str]:
    """The error where the saved codebook does not have this layer's shape, whose axes have these names."""
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


# Counters of draws. Where a checkpoint lacks them, the layer keeps its own.
_OF_TRAINING = frozenset({"seed", "sample_steps", "dropout_steps"})
_USAGE = frozenset({"ema_counts", "ema_steps"})
_EXPLANATIONS = {
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
    """Removes, in place, the keys below `prefix` that do not matter, and explains those that do.

    A layer for decoding loads what a layer in training saved. Counters of draws, the flag of an initialisation and the
    usage that revival reads do not matter to it.
    """
    passed_over = _OF_TRAINING if missing else _OF_TRAINING | _USAGE | {"initialised"}
    averaged = f"{prefix}ema_sums" in keys
    kept = []
    for key in keys:
        name = key[len(prefix) :] if key.startswith(prefix) else ""
        if name in passed_over:
            continue
        explanation = None if averaged and name == "ema_counts" else _EXPLANATIONS.get((name, missing))
        kept.append(key if explanation is None else ExplainedKey(key, explanation))
    keys[:] = kept
