"""Buffers of statistics that stay float32, whatever the layer around them is cast to.

A moving average of decay 0.999 changes by less than bfloat16 resolves, so a narrow one drifts. Three things narrow a
buffer: a default dtype at construction, a cast of the module, and a loader or wrapper that puts another tensor or other
data in its place (`load_state_dict(assign=True)`, `from_pretrained`, `buffer_dtype` of FSDP1).
"""

from typing import Any

import torch
from torch import Tensor, nn


def wide_dtype() -> torch.dtype:
    """The dtype in which statistics are made: float32, or torch's default where that is wider."""
    return torch.promote_types(torch.get_default_dtype(), torch.float32)


class WideBuffers(nn.Module):
    """A module whose floating buffers are never narrower than float32; its Parameters and children are not changed.

    Casts and `load_state_dict` keep this. `widen_buffers` finds what was replaced without a call of the module; every
    forward in training begins with it.
    """

    def widen_buffers(self) -> None:
        """Replaces every floating buffer narrower than float32 by its values in float32."""
        for name, buffer in self._buffers.items():
            if buffer is not None and _is_narrow(buffer):
                self._buffers[name] = buffer.to(torch.float32)

    def _apply(self, fn, recurse=True):
        """Moves the buffers where `fn` moves them; where it would make one narrow, the values of before move."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            moved = self._buffers[name]
            if buffer is not None and moved is not None and _is_narrow(moved):
                self._buffers[name] = buffer.to(moved.device, torch.float32)
        return self

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        self.widen_buffers()


def _is_narrow(x: Tensor) -> bool:
    return x.is_floating_point() and x.dtype.itemsize < torch.float32.itemsize
