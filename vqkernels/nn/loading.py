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


def explain_keys(keys: list[str], prefix: str, missing: bool) -> None:
    """Lets the keys below `prefix` that tell of another kind of layer say so, in place."""
    sentences = {
        ("ema_sums", True): (
            "this layer has ema_decay set, but the codebook was trained by gradient; build it with ema_decay=None, or "
            "load with strict=False to go on by moving averages from these codes"
        ),
        ("ema_sums", False): (
            "the codebook was trained by moving averages, but this layer has ema_decay=None; build it with ema_decay, "
            "or load with strict=False to go on by gradient from these codes"
        ),
        ("initialised", True): (
            'this layer has init="kmeans", but the checkpoint is of a layer without; build it with init="uniform", or '
            "load with strict=False: either way the loaded codes are kept"
        ),
    }
    for place, key in enumerate(keys):
        for (name, when), sentence in sentences.items():
            if key == prefix + name and when == missing:
                keys[place] = ExplainedKey(key, sentence)
