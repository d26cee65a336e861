"""Shared fixtures: every backend in turn (an absent one skips by name), poisoned fresh memory, and fixed seeds."""

import pytest
import torch

from vqkernels.backends import registry


def pytest_configure(config: pytest.Config) -> None:
    # Fresh tensors are filled with NaN or INT_MAX, in C++ too: a kernel that leaves an element unwritten is seen.
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    # The workers of pytest-xdist share the cores; tests of threads ask for them by the fixture below.
    torch.set_num_threads(1)


@pytest.fixture(params=["cpu", "eager"])
def backend(request: pytest.FixtureRequest) -> str:
    """A backend that computes CPU tensors."""
    try:
        return registry.resolve(request.param, "cpu")
    except RuntimeError as error:
        pytest.skip(f"backend {request.param}: {error}")


@pytest.fixture
def cpu_kernels() -> None:
    """Skips where the C++ kernels are absent."""
    try:
        registry.resolve("cpu", "cpu")
    except RuntimeError as error:
        pytest.skip(str(error))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def threads():
    """Sets torch's thread count for one test and restores it."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
