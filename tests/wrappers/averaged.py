"""Averaged models: torch's `AveragedModel`, then `update_bn`, and `EMA` of ema-pytorch; and the same by hand."""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, update_bn
from wrappers.cells import Model, build
from wrappers.steps import STEPS, Result, batch, result, snapshot, train, without_metrics


class Averages:
    """One way to average a model, and what it says it computes."""

    buffers: str  # "kept" up to date with the model's, or "averaged"

    def wrap(self, model: nn.Module) -> Any: ...

    def module(self, wrapper: Any) -> Model: ...

    def update(self, wrapper: Any, model: nn.Module) -> None: ...

    def weight(self, step: int) -> float:
        """Of the newest tensors in the average, at a step."""


class Swa(Averages):
    def __init__(self, use_buffers: bool) -> None:
        self.use_buffers, self.buffers = use_buffers, "averaged" if use_buffers else "kept"

    def wrap(self, model: nn.Module) -> AveragedModel:
        return AveragedModel(model, use_buffers=self.use_buffers)

    def module(self, wrapper: AveragedModel) -> Model:
        return wrapper.module

    def update(self, wrapper: AveragedModel, model: nn.Module) -> None:
        wrapper.update_parameters(model)

    def weight(self, step: int) -> float:
        return 1 / (step + 1)


class EmaPytorch(Averages):
    buffers = "averaged"

    def wrap(self, model: nn.Module) -> Any:
        from ema_pytorch import EMA

        return EMA(model, beta=0.5, min_value=0.5, update_after_step=0, update_every=1, include_online_model=False)

    def module(self, wrapper: Any) -> Model:
        return wrapper.ema_model

    def update(self, wrapper: Any, model: nn.Module) -> None:
        wrapper.update()

    def weight(self, step: int) -> float:
        return 1.0 if step == 0 else 0.5


AVERAGES = {"AveragedModel": Swa(False), "AveragedModel, use_buffers": Swa(True), "ema-pytorch": EmaPytorch()}


def averaged(name: str, cell: str) -> tuple[Result, nn.Module]:
    """Of the averaged model, floating tensors alone: the averages of counters are no counters; and the wrapper."""
    how, model = AVERAGES[name], build(cell, norm=True)
    wrapper = how.wrap(model)
    train(cell, model, after=lambda: how.update(wrapper, model))
    module = how.module(wrapper)
    return floating(result(module, [])), wrapper


@cache
def by_hand(name: str, cell: str) -> Result:
    how, model = AVERAGES[name], build(cell, norm=True)
    states: list[dict[str, Tensor]] = []
    train(cell, model, after=lambda: states.append(snapshot(model)))
    assert len(states) == STEPS
    mean = dict(states[-1])
    parameters = {key for key, _ in model.named_parameters(remove_duplicate=False)}
    for key, value in mean.items():
        if value.is_floating_point() and (how.buffers == "averaged" or key in parameters):
            value = states[0][key]
            for step, state in enumerate(states):
                value = value.lerp(state[key], how.weight(step))
            mean[key] = value
    model.load_state_dict(mean)
    return floating(result(model, []))


def floating(whole: Result) -> Result:
    return whole._replace(state={name: value for name, value in whole.state.items() if value.is_floating_point()})


def moved_by_update_bn(wrapper: nn.Module, module: Model) -> dict[str, float]:
    """How far each tensor of the layer moves when the batch normalisation's statistics are taken anew."""
    before = without_metrics(snapshot(module.quantizer))
    update_bn([batch(step) for step in range(STEPS)], wrapper)
    after = snapshot(module.quantizer)
    return {name: float((after[name].double() - value.double()).abs().max()) for name, value in before.items()}


def after_one_more_step(cell: str, module: Model, flagged: bool) -> dict[str, Tensor]:
    """The state of a new model that takes an averaged model's and trains on.

    Args:
        flagged: set what says that the first k-means has run.
    """
    state = snapshot(module)
    for name in state:
        if flagged and name.endswith((".initialised", ".initted", ".inited")):
            state[name] = torch.ones_like(state[name])
    model = build(cell, seed=5, norm=True)
    model.load_state_dict(state)
    train(cell, model, steps=[STEPS])
    return {name: value for name, value in snapshot(model).items() if value.is_floating_point()}
