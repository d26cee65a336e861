"""Where the Triton tests run: on the GPU if there is one, else in Triton's interpreter on the CPU."""

import importlib.util
import os
import sys

import pytest
import torch

if not torch.cuda.is_available() and "triton" not in sys.modules:
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items):
    reason = None
    if importlib.util.find_spec("triton") is None:
        reason = "triton is not installed: pip install triton"
    elif not torch.cuda.is_available() and not _interpreted():
        reason = "no GPU, and triton was imported before TRITON_INTERPRET=1 was set"
    if reason:
        for item in items:
            if "backends/triton" in item.nodeid:
                item.add_marker(pytest.mark.skip(reason=reason))


def _interpreted():
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction

    return isinstance(tl.min, InterpretedFunction)


@pytest.fixture
def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
