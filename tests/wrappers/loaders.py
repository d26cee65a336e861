"""Ways to save a model and to fill another: each takes a trained model and a folder, and returns the model loaded."""

import copy
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from wrappers.cells import Model, build
from wrappers.steps import evaluate

Loader = Callable[[Model, Path], nn.Module]


def fresh(cell: str, seed: int = 5) -> Model:
    """A model of other numbers, in training mode. One whose layer only encodes and decodes has done so before."""
    model = build(cell, seed)
    if model.mode == "fixed":
        evaluate(model)
    return model.train()


def cell_of(model: Model) -> str:
    return f"{model.layer_name}, {model.mode}"


def by_state_dict(model: Model, folder: Path, strict: bool, assign: bool) -> nn.Module:
    loaded = fresh(cell_of(model))
    state = copy.deepcopy(model.state_dict())
    keys = loaded.load_state_dict(state, strict=strict, assign=assign)
    assert not keys.missing_keys and not keys.unexpected_keys
    return loaded


def by_copy(model: Model, folder: Path) -> nn.Module:
    """Tensor by tensor, as code does that knows nothing of state dicts."""
    loaded = fresh(cell_of(model))
    mine = loaded.state_dict()
    for name, value in model.state_dict().items():
        mine[name].data.copy_(value)
    return loaded


def by_distributed_checkpoint(model: Model, folder: Path) -> nn.Module:
    """In place, without `load_state_dict`."""
    dcp.save(model.state_dict(), checkpoint_id=folder)
    loaded = fresh(cell_of(model))
    dcp.load(loaded.state_dict(), checkpoint_id=folder)
    return loaded


def by_accelerate_dispatch(model: Model, folder: Path) -> nn.Module:
    from accelerate import Accelerator, init_empty_weights, load_checkpoint_and_dispatch

    Accelerator(cpu=True).save_model(model, folder)
    with init_empty_weights():
        loaded = build(cell_of(model), seed=5)
    return load_checkpoint_and_dispatch(loaded, folder, device_map={"": "cpu"})


def by_accelerate_state(model: Model, folder: Path) -> nn.Module:
    from accelerate import Accelerator

    saving, loading = Accelerator(cpu=True), Accelerator(cpu=True)
    saving.prepare(model)
    saving.save_state(folder)
    loaded = loading.prepare(fresh(cell_of(model)))
    loading.load_state(folder)
    return loading.unwrap_model(loaded)


def by_transformers(model: Model, folder: Path, dtype: torch.dtype) -> nn.Module:
    from transformers import PretrainedConfig, PreTrainedModel

    class Config(PretrainedConfig):
        model_type = "cell"

        def __init__(self, cell: str = "", **options: Any) -> None:
            super().__init__(**options)
            self.cell = cell

    class Pretrained(PreTrainedModel):
        config_class = Config

        def __init__(self, config: Config) -> None:
            super().__init__(config)
            self.model = build(config.cell, seed=5)
            self.post_init()

    whole = Pretrained(Config(cell_of(model)))
    whole.model.load_state_dict(model.state_dict())
    whole.save_pretrained(folder)
    return Pretrained.from_pretrained(folder, dtype=dtype).model.train()


def by_diffusers(model: Model, folder: Path, dtype: torch.dtype) -> nn.Module:
    from diffusers import ConfigMixin, ModelMixin
    from diffusers.configuration_utils import register_to_config

    class Pretrained(ModelMixin, ConfigMixin):
        @register_to_config
        def __init__(self, cell: str) -> None:
            super().__init__()
            self.model = build(cell, seed=5)

    whole = Pretrained(cell_of(model))
    whole.model.load_state_dict(model.state_dict())
    whole.save_pretrained(folder)
    return Pretrained.from_pretrained(folder, torch_dtype=dtype).model.train()


FLOAT32: dict[str, Loader] = {
    **{
        f"load_state_dict, strict={strict}, assign={assign}": partial(by_state_dict, strict=strict, assign=assign)
        for strict in (True, False)
        for assign in (True, False)
    },
    "copy of every tensor": by_copy,
    "distributed checkpoint": by_distributed_checkpoint,
    "accelerate, load_checkpoint_and_dispatch": by_accelerate_dispatch,
    "accelerate, load_state": by_accelerate_state,
    "transformers, float32": partial(by_transformers, dtype=torch.float32),
    "diffusers, float32": partial(by_diffusers, dtype=torch.float32),
}
BFLOAT16: dict[str, Loader] = {
    "transformers, bfloat16": partial(by_transformers, dtype=torch.bfloat16),
    "diffusers, bfloat16": partial(by_diffusers, dtype=torch.bfloat16),
}
