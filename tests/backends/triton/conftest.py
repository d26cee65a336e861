"""Where the Triton tests run: on the GPU if there is one, else in Triton's interpreter on the CPU."""

import importlib.util
import os
import sys
from importlib.metadata import version

import pytest
import torch

if not torch.cuda.is_available() and "triton" not in sys.modules:
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items):
    if reason := _problem():
        for item in items:
            if "backends/triton" in item.nodeid:
                item.add_marker(pytest.mark.skip(reason=reason))


def _problem():
    """Why these tests cannot run here, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    if torch.cuda.is_available():
        return None
    if not _interpreted():
        return "no GPU, and triton was imported before TRITON_INTERPRET=1 was set"
    versions = [tuple(map(int, version(name).split(".")[:2])) for name in ("triton", "numpy")]
    if versions[0] < (3, 7) and versions[1] >= (2, 4):
        return f"the interpreter of Triton {version('triton')} needs numpy < 2.4"
    return None


def _interpreted():
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction

    return isinstance(tl.min, InterpretedFunction)


@pytest.fixture
def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
