"""What a resumed run may change, and whether its last checkpoint can be continued."""

import dataclasses
from pathlib import Path
from typing import Any

from vqkernels.training.acceleration import SpeedConfig
from vqkernels.training.config import RunConfig
from vqkernels.training.data import ImageData
from vqkernels.training.errors import UserError

# The data may move, but its images must be the same.
FREE = {
    "data",
    "device",
    "backend",
    "parallel",
    "log_every",
    "checkpoint_every",
    "picture_every",
    "vqvae.steps",
    "prior.steps",
    *(f"speed.{field.name}" for field in dataclasses.fields(SpeedConfig)),
}


def check_resumable(state: dict[str, Any], config: RunConfig, data: ImageData, out: Path, stage: str) -> None:
    """Raise UserError unless the state of a checkpoint can be continued under this configuration."""
    before = RunConfig.from_toml(state["config"], str(out))
    prior_begun = state["stage"] == "prior"
    changed = [
        name
        for name in config.differences(before)
        if (name not in FREE and (prior_begun or not name.startswith("prior.")))
        or (prior_begun and name == "vqvae.steps")
    ]
    if changed:
        both = [f"{name} ({before.value(name)}, now {config.value(name)})" for name in changed]
        raise UserError(f"the run {out} was begun with another {' and '.join(both)}; a resumed run cannot change it")
    if state["data"] != data.fingerprint():
        raise UserError(f"the images of {config.data} are not those that the run {out} was begun with")
    if stage == "vqvae" and prior_begun:
        raise UserError(f"the VQ-VAE of {out} is frozen, for its prior is being trained; use --stage prior or all")
    if stage == "prior" and not prior_begun and state["step"] < config.vqvae.steps:
        raise UserError(
            f"the VQ-VAE of {out} has done {state['step']} of its {config.vqvae.steps} steps; "
            "finish it with --stage vqvae, or lower --vqvae.steps"
        )
