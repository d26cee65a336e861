"""What a framework leaves behind when a layer fails inside of it does not reach the next test."""

import pytest
import torch


@pytest.fixture(autouse=True)
def default_dtype():
    before = torch.get_default_dtype()
    yield
    torch.set_default_dtype(before)
