"""Codebooks that k-means initialises from the first batch: is one initialised, and can this batch do it?"""

import warnings
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ..nn.wide import WideBuffers


class FromData(WideBuffers):
    """A codebook with a buffer that says whether it is initialised. Anything may fill the buffer, and it decides.

    The host remembers the buffer once it was True, so that not every forward reads from the device. It reads again if
    the buffer is another object, after a state dict was loaded, and as long as the buffer is False.
    """

    _flag: str  # the buffer's name; one element
    _seen: Tensor | None = None  # the buffer, if it was seen True

    def _is_initialised(self) -> bool:
        flag = self._buffers[self._flag]
        assert flag is not None
        if self._seen is flag:
            return True
        if torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling():
            return self._seen is not None  # in an export the buffers are other objects
        if _has_no_values(flag):
            return True
        self._look()
        return self._seen is flag

    def _look(self) -> None:
        """Reads the buffer."""
        flag = self._buffers[self._flag]
        assert flag is not None
        self._seen = flag if not _has_no_values(flag) and bool(flag) else None

    def _apply(self, fn, recurse=True):
        flag = self._buffers[self._flag]
        super()._apply(fn, recurse)
        if self._buffers[self._flag] is not flag:
            self._look()
        return self

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        self._look()


def _has_no_values(x: Tensor) -> bool:
    return x.is_meta or isinstance(x, FakeTensor)


def has_rows(distinct: Tensor, codebook_size: int) -> bool:
    """Whether k-means had a row for every codebook, and so may initialise it; warns if it had too few for all codes.

    Args:
        distinct: of `vqkernels.kmeans`, `()` or `(H,)`.
    """
    found = int(distinct.min())
    if 0 < found < codebook_size:
        warnings.warn(
            f"k-means initialisation of {codebook_size} codes from {found} different rows that are neither masked nor "
            "NaN: the other codes start as copies of these with a jitter; use a larger first batch",
            RuntimeWarning,
            stacklevel=3,
        )
    return found > 0
