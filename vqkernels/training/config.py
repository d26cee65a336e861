"""What a run is: dataclasses, and their TOML form.

A key that is absent from a TOML file has its default; None is written by leaving the key out. Unknown keys, wrong
types and values out of range are errors that name the key.
"""

import dataclasses
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import tomli_w
import tyro

from vqkernels.training.acceleration import SpeedConfig
from vqkernels.training.errors import UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Schedule = Literal["constant", "cosine"]
Parallel = Literal["ddp", "fsdp"]
PriorModel = Literal["pixelcnn", "transformer"]
FORMAT = "vqkernels-run-1"


@dataclass(frozen=True)
class VQVAEConfig:
    """The VQ-VAE and its training."""

    hidden_channels: int = 128
    code_dim: int = 64
    codebook_size: int = 512
    downsamplings: int = 2
    """Each halves the height and width of the codes."""
    residual_blocks: int = 2
    residual_channels: int | None = None
    """Width inside a residual block; None: hidden_channels."""
    beta: float = 0.25
    """Weight of the commitment loss."""
    ema_decay: float | None = None
    """None: the codebook is trained by its loss; a number such as 0.99: by moving averages."""
    init: Literal["uniform", "kmeans"] = "uniform"
    """kmeans: the codes begin as those of the first batch."""
    revive: Literal["off", "rows"] = "off"
    """rows: a code that is hardly used becomes a row of the batch."""
    likelihood: Literal["logistic_mixture", "gaussian", "categorical"] | None = None
    """What the decoder says about 8-bit pixels; None: the image itself, trained by its squared error."""
    steps: int = 20_000
    batch_size: int = 128
    learning_rate: float = 2e-4
    schedule: Schedule = "constant"
    """cosine: the learning rate falls to 0 over the steps."""


@dataclass(frozen=True)
class PriorConfig:
    """The prior and its training."""

    model: Annotated[PriorModel, tyro.conf.arg(name="")] = "pixelcnn"  # --prior on the command line
    """What the prior is: a gated PixelCNN, or a causal transformer."""
    hidden_channels: int = 64
    num_layers: int = 15
    head_channels: int = 512
    """Width before the logits; of a PixelCNN alone."""
    num_heads: int = 4
    """Attention heads, a divisor of hidden_channels; of a transformer alone."""
    dropout: float = 0.0
    label_dropout: float = 0.0
    """Probability of training a grid of codes without its label; above 0 samples can be guided."""
    steps: int = 20_000
    batch_size: int = 128
    learning_rate: float = 3e-4
    schedule: Schedule = "constant"
    """cosine: the learning rate falls to 0 over the steps."""


@dataclass(frozen=True)
class RunConfig:
    """Everything that determines a run."""

    data: str
    """'digits', a folder of images (sub-folders are classes), an .npz or .npy file, IDX files, CIFAR-10 batches, or
    hf:NAME (hf:NAME:SPLIT) through the datasets library, NAME of the hub or a path."""
    color: Literal["auto", "grey", "rgb", "rgba"] = "auto"
    """auto: grey if every image is, else rgb."""
    held_out: float = 0.1
    """Fraction of the images kept from training, where the data brings no test split of its own."""
    seed: int = 0
    device: str = "auto"
    """auto: cuda if there is one, else cpu."""
    backend: str = "auto"
    """Who computes the quantization; see 'vqkernels info'."""
    parallel: Parallel = "ddp"
    """What processes under torchrun share: ddp, the batch; fsdp, the batch, the weights and the optimizer's state."""
    log_every: int = 50
    """Steps between lines of metrics."""
    checkpoint_every: int = 1000
    """Steps between checkpoints, each with an evaluation on held-out images."""
    picture_every: int = 1000
    """Steps between image grids; there is always one at the end of a stage."""
    speed: Annotated[SpeedConfig, tyro.conf.arg(name="")] = field(default_factory=SpeedConfig)
    vqvae: VQVAEConfig = field(default_factory=VQVAEConfig)
    prior: PriorConfig = field(default_factory=PriorConfig)

    def check(self) -> "RunConfig":
        """Return self.

        Raises:
            UserError: a value is out of range.
        """
        _at_least(0, self, "seed")
        _at_least(1, self, "log_every", "checkpoint_every", "picture_every")
        if not 0 <= self.held_out < 1:
            raise UserError(f"held_out must be at least 0 and less than 1, but is {self.held_out}")
        for name in ("vqvae", "prior"):
            stage = getattr(self, name)
            _at_least(1, stage, "hidden_channels", "batch_size", "steps", prefix=f"{name}.")
            if not stage.learning_rate > 0:
                raise UserError(f"{name}.learning_rate must be positive, but is {stage.learning_rate}")
        if self.speed.cuda_graphs and not self.speed.compile:
            raise UserError("speed.cuda_graphs needs speed.compile")
        _at_least(1, self.vqvae, "code_dim", "codebook_size", "downsamplings", prefix="vqvae.")
        _at_least(0, self.vqvae, "residual_blocks", "beta", prefix="vqvae.")
        if self.vqvae.residual_channels is not None:
            _at_least(1, self.vqvae, "residual_channels", prefix="vqvae.")
        if self.vqvae.ema_decay is not None and not 0 <= self.vqvae.ema_decay < 1:
            raise UserError(f"vqvae.ema_decay must be at least 0 and less than 1, but is {self.vqvae.ema_decay}")
        from_data = self.vqvae.init == "kmeans" or self.vqvae.revive == "rows"
        if self.parallel == "fsdp" and self.vqvae.ema_decay is None and from_data:
            raise UserError(
                "parallel fsdp drops what a step writes into a codebook that is trained by its loss: set "
                "vqvae.ema_decay, such as 0.99, or leave vqvae.init and vqvae.revive at uniform and off"
            )
        _at_least(1, self.prior, "num_layers", "head_channels", "num_heads", prefix="prior.")
        if self.prior.model == "transformer" and self.prior.hidden_channels % self.prior.num_heads:
            raise UserError(
                f"prior.hidden_channels must be a multiple of prior.num_heads, {self.prior.num_heads}, "
                f"but is {self.prior.hidden_channels}"
            )
        if not 0 <= self.prior.dropout < 1:
            raise UserError(f"prior.dropout must be at least 0 and less than 1, but is {self.prior.dropout}")
        if not 0 <= self.prior.label_dropout < 1:
            raise UserError(
                f"prior.label_dropout must be at least 0 and less than 1, but is {self.prior.label_dropout}"
            )
        return self

    def differences(self, other: "RunConfig") -> list[str]:
        """Dotted names of the fields that differ, such as `vqvae.code_dim`."""
        mine, theirs = _flat(dataclasses.asdict(self)), _flat(dataclasses.asdict(other))
        return [name for name in mine if mine[name] != theirs[name]]

    def value(self, name: str) -> Any:
        """The value of a dotted name."""
        return _flat(dataclasses.asdict(self))[name]

    def to_toml(self) -> str:
        return tomli_w.dumps({"format": FORMAT, **_without_none(dataclasses.asdict(self))})

    @classmethod
    def from_toml(cls, text: str, name: str, *, data: str | None = None) -> "RunConfig":
        """Read a configuration.

        Args:
            text: TOML.
            name: what to call the text in errors.
            data: used where the text names no data.

        Raises:
            UserError: the text is not TOML, has an unknown key or a value of the wrong type, or names no data.
        """
        try:
            table = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise UserError(f"{name} is not valid TOML: {error}") from error
        if table.pop("format", FORMAT) != FORMAT:
            raise UserError(f"{name} was written by another version of vqkernels (this one reads {FORMAT})")
        if data is not None:
            table.setdefault("data", data)
        if "data" not in table:
            raise UserError(f"{name} names no data")
        return _from_table(cls, table, name, "")


def read_config(path: Path, *, data: str | None = None) -> RunConfig:
    """Read a TOML file; see `RunConfig.from_toml`."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the configuration {path} cannot be read: {error}") from error
    return RunConfig.from_toml(text, str(path), data=data)


def _from_table(kind: Any, table: dict[str, Any], name: str, prefix: str) -> Any:
    hints = get_type_hints(kind)
    values = {}
    for key, value in table.items():
        if key not in hints:
            raise UserError(f"{name}: unknown key {prefix}{key} (known: {', '.join(hints)})")
        hint = hints[key]
        if dataclasses.is_dataclass(hint) and isinstance(value, dict):
            values[key] = _from_table(hint, value, name, f"{prefix}{key}.")
        elif _accepts(hint, value):
            values[key] = value
        else:
            raise UserError(f"{name}: {prefix}{key} must be {_describe(hint)}, but is {value!r}")
    return kind(**values)


def _accepts(hint: Any, value: Any) -> bool:
    if get_origin(hint) in (Union, UnionType):
        return any(_accepts(choice, value) for choice in get_args(hint))
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return isinstance(value, hint) and isinstance(value, bool) == (hint is bool)


def _describe(hint: Any) -> str:
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(_describe(choice) for choice in get_args(hint) if choice is not NoneType)
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(repr(choice) for choice in get_args(hint))
    return {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}.get(hint, "a table")


def _at_least(least: int, config: Any, *names: str, prefix: str = "") -> None:
    for name in names:
        if getattr(config, name) < least:
            raise UserError(f"{prefix}{name} must be at least {least}, but is {getattr(config, name)}")


def _without_none(table: dict[str, Any]) -> dict[str, Any]:
    return {k: _without_none(v) if isinstance(v, dict) else v for k, v in table.items() if v is not None}


def _flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return flat
