"""Labels of a class-conditional prior: what a batch of them must be."""

from typing import Protocol

import torch
from torch import Tensor


class Labelled(Protocol):
    """A prior that may have classes."""

    num_classes: int | None
    label_dropout: float


def check_labels(model: Labelled, labels: Tensor | None, batch: int) -> None:
    """Raise ValueError unless labels are (batch,) and in range, or None for a prior without classes.

    With `label_dropout`, -1 stands for no label. The range is checked on the CPU alone.
    """
    if labels is None:
        if model.num_classes is not None:
            raise ValueError(f"labels are needed: this prior is conditional on {model.num_classes} classes")
    elif model.num_classes is None:
        raise ValueError("labels are not expected: this prior was built with num_classes=None")
    elif labels.shape != (batch,):
        raise ValueError(f"labels must be ({batch},), one per grid of codes, but have shape {tuple(labels.shape)}")
    elif labels.device.type == "cpu" and not torch.compiler.is_compiling():  # a GPU would have to wait
        least = -1 if model.label_dropout > 0 else 0
        outside = labels[(labels < least) | (labels >= model.num_classes)].tolist()
        if outside:
            raise ValueError(f"labels must be in [{least}, {model.num_classes - 1}], but one is {outside[0]}")
