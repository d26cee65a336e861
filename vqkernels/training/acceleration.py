"""How a step is computed: memory format, mixed precision, compilation, optimizer. Results differ by rounding.

The model is never wrapped or renamed: a checkpoint has the same keys and shapes whatever is chosen here, and a run may
be resumed with another choice. The memory format belongs to the model; `place` sets it wherever a model is built or
read. The rest holds in training steps alone: everything else computes in float32, uncompiled.
"""

import contextlib
import importlib.util
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor, nn

from vqkernels.models import VAE, VQVAE
from vqkernels.training.errors import UserError
from vqkernels.training.sharding import load_optimizer

Autoencoder = TypeVar("Autoencoder", VQVAE, VAE)
TYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class SpeedConfig:
    """How a step is computed. Results differ by rounding; benchmarks/results/full_model.md has what each gains."""

    channels_last: Literal["auto", "on", "off"] = "auto"
    """Channels innermost in memory, in encoder and decoder; auto: on the CPU, where it was measured."""
    amp: Literal["off", "bfloat16", "float16"] = "off"
    """Mixed precision: convolutions in this type, weights and losses in float32; on a CPU it pays where it has AMX."""
    amp_stages: Literal["all", "autoencoder", "prior"] = "all"
    """Which stages have mixed precision: convolutions gain by it; a narrow PixelCNN loses its fused float32 layers."""
    fused_optimizer: bool = True
    """One kernel updates all weights."""
    compile: bool = False
    """torch.compile: the first steps take longer."""
    cuda_graphs: bool = False
    """With --compile, on a GPU: a step is launched as a whole."""


def place(model: Autoencoder, config: SpeedConfig, device: torch.device) -> Autoencoder:
    """The model itself, on the device, with the weights of its convolutions in the chosen memory format.

    The activations follow the weights. Convolutions round differently in another format, so a model computes in the
    format in which it was trained.
    """
    model.to(device)
    chosen = config.channels_last
    if chosen == "on" or (chosen == "auto" and device.type == "cpu"):
        for network in (model.encoder, model.decoder):
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


class Speed:
    """The choices of a run on a device.

    Args:
        stage: the name of the stage that is trained; None for any.

    Raises:
        UserError: the device or the machine cannot do what was chosen.
    """

    def __init__(self, config: SpeedConfig, device: torch.device, stage: str | None = None) -> None:
        if config.cuda_graphs and device.type != "cuda":
            raise UserError(f"--cuda-graphs needs a CUDA device, but the device is {device}")
        if config.compile and device.type == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is None:
            raise UserError("--compile needs a C++ compiler: there is no g++, nor does CXX name one")
        if config.compile and device.type == "cuda" and importlib.util.find_spec("triton") is None:
            raise UserError("--compile needs Triton on a CUDA device: pip install triton")
        self.config, self.device = config, device
        mixed = config.amp_stages == "all" or stage is None or (stage == "prior") == (config.amp_stages == "prior")
        self.amp = config.amp if mixed else "off"
        # float16 has so small a range that gradients are scaled into it; a disabled scaler does nothing.
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.amp == "float16")

    def optimizer(self, parameters: Iterable[Tensor], learning_rate: float) -> torch.optim.Optimizer:
        """Adam, which fused is one kernel for all parameters."""
        return torch.optim.Adam(parameters, lr=learning_rate, fused=self.config.fused_optimizer)

    def forward(self, model: nn.Module) -> nn.Module:
        """The model as it is called in training: itself, or compiled, with the same parameters."""
        if not self.config.compile:
            return model
        return cast(nn.Module, torch.compile(model, mode="reduce-overhead" if self.config.cuda_graphs else None))

    def begin_step(self) -> None:
        """Tell CUDA graphs that what they returned before is no longer needed."""
        if self.config.cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The context of the loss: convolutions and matrix products in the chosen type."""
        if self.amp == "off":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, TYPES[self.amp])

    def learn(self, loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
        """Backward pass and optimizer step."""
        optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.step(optimizer)
        self.scaler.update()

    def load(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """Continue from a checkpoint, of this or of another choice."""
        load_optimizer(optimizer, state["optimizer"])
        for group in optimizer.param_groups:
            group["fused"] = self.config.fused_optimizer  # the checkpoint has brought its own
            for parameter in group["params"]:
                entries = optimizer.state[parameter]
                for name, value in entries.items():
                    # A fused kernel counts its steps on the device, and reads a parameter and its averages in one order
                    # of memory.
                    if name == "step":
                        entries[name] = value.to(parameter.device if self.config.fused_optimizer else "cpu")
                    elif value.shape == parameter.shape and value.stride() != parameter.stride():
                        entries[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        if state.get("scaler") and self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
