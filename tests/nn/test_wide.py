"""Floating buffers of statistics stay float32 through casts, loaders and wrappers."""

import copy

import pytest
import torch
from torch import nn

from vqkernels.nn.wide import WideBuffers, wide_dtype


class Statistics(WideBuffers):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("average", torch.full((3,), 1 / 3, dtype=wide_dtype()))
        self.register_buffer("steps", torch.tensor(7))
        self.register_buffer("absent", None)
        self.weight = nn.Parameter(torch.ones(2))
        self.inner = nn.BatchNorm1d(2)


@pytest.mark.parametrize("cast", ["bfloat16", "half", "float8_e5m2"])
def test_a_cast_keeps_the_values_of_floating_buffers(cast):
    layer = Statistics().to(getattr(torch, cast, torch.half))
    assert layer.average.equal(torch.full((3,), 1 / 3)) and layer.steps.item() == 7
    assert layer.weight.dtype == layer.inner.running_mean.dtype != torch.float32


def test_a_wider_cast_and_a_wider_default_are_followed():
    assert Statistics().double().average.dtype == torch.float64
    assert Statistics().double().bfloat16().average.dtype == torch.float32
    torch.set_default_dtype(torch.float64)
    try:
        assert wide_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_narrow_default_dtype_makes_no_narrow_statistics():
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert wide_dtype() == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_assigned_tensors_are_widened_with_their_values():
    layer, state = Statistics(), {name: x.bfloat16() for name, x in Statistics().state_dict().items()}
    layer.load_state_dict(state, assign=True)
    assert layer.average.dtype == torch.float32 and layer.average.equal(state["average"].float())
    assert layer.weight.dtype == torch.bfloat16


def test_buffers_on_the_meta_device_are_widened():
    with torch.device("meta"):
        layer = Statistics().bfloat16()
    assert layer.average.is_meta and layer.average.dtype == torch.float32
    layer = layer.to_empty(device="cpu")
    assert layer.average.dtype == torch.float32 and not layer.average.is_meta


def test_a_forward_widens_what_was_put_in_place_behind_the_modules_back():
    layer = Statistics()
    layer._buffers["average"] = layer.average.bfloat16()
    layer.widen_buffers()
    assert layer.average.equal(torch.full((3,), 1 / 3).bfloat16().float())
    layer.average.data = layer.average.data.half()  # as FSDP1 does with buffer_dtype
    layer.widen_buffers()
    assert layer.average.dtype == torch.float32


def test_buffers_that_are_wide_stay_the_same_objects():
    layer = Statistics()
    before = dict(layer._buffers)
    layer.widen_buffers()
    assert all(layer._buffers[name] is before[name] for name in before)
    assert copy.deepcopy(layer).average.equal(layer.average)
