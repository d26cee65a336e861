"""The whole comparison: contenders trained, measured and drawn, and the experiment of collapse."""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import torch
from torch import Tensor

from vqkernels.models import VAE, VQVAE
from vqkernels.training.checkpoint import write_atomically
from vqkernels.training.comparison.collapse import Collapse, run_collapse
from vqkernels.training.comparison.contenders import Contender, Workshop, prepare, train_contenders
from vqkernels.training.comparison.measures import POOLED, Figures, measure, reconstruct
from vqkernels.training.comparison.probe import linear_probe
from vqkernels.training.comparison.settings import ComparisonSettings
from vqkernels.training.data import ImageData
from vqkernels.training.errors import UserError
from vqkernels.training.hub_dataset import PREFIX
from vqkernels.training.stages import draw, spread

SHOWN = 10  # held-out images that are reconstructed in the report
DRAWN = 32  # samples of a contender


@dataclass(frozen=True)
class Pictures:
    """What the report shows, images in [-1, 1]."""

    originals: Tensor
    reconstructions: dict[str, Tensor]
    samples: dict[str, Tensor]


@dataclass(frozen=True)
class Comparison:
    """What a comparison has found."""

    settings: ComparisonSettings
    images: dict[str, int]  # how many of each kind
    shape: tuple[int, int, int]
    grid: tuple[int, int]  # of the latents
    figures: tuple[Figures, ...]
    collapse: Collapse
    pixels_probe: float | None  # the same probe on the pixels, averaged to as few features as they allow
    chance: float | None  # per cent of held-out images in the most frequent class
    curves: dict[str, list[tuple[int, float]]]  # held-out bits per dimension over the steps

    def to_json(self) -> dict[str, Any]:
        """Everything as numbers and names; not where the data lie."""
        table = dataclasses.asdict(self)
        table["settings"]["run"]["data"] = data_name(self.settings.run.data)
        return table


def compare(
    settings: ComparisonSettings,
    data: ImageData,
    out: Path,
    *,
    progress: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[Comparison, Pictures]:
    """Train, measure and draw. What `out` holds already of the same comparison is not trained again.

    Args:
        data: with labels, where the probe is to have them; the models never see them.
        out: gets `runs/`, `images.npz`, `settings.json` and `results.json`.
        progress, should_stop: as in `loop.train`.
        say: called with what is being done.

    Raises:
        UserError: there are too few held-out images, or `out` holds something else.
        Interrupted: `should_stop` said so.
    """
    settings.check()
    if len(data.held_out) < 2:
        raise UserError("a comparison needs at least 2 held-out images; raise held_out")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file, not a folder")
    if out.exists() and not (out / "settings.json").exists() and any(not x.name.startswith(".") for x in out.iterdir()):
        raise UserError(f"{out} is not empty and holds no comparison; choose a new folder")
    out.mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(out / ".lock", blocking=False):
            settings.hold(out)
            labelled, bare = prepare(settings, data)
            workshop = Workshop(settings, bare, out, progress, should_stop)
            contenders = train_contenders(workshop, say)
            collapse = run_collapse(workshop, say)
            say("measuring")
            found = _measured(settings, labelled, contenders, collapse)
            content = json.dumps(found.to_json(), indent=1) + "\n"
            write_atomically(out / "results.json", lambda file: file.write(content.encode()))
            return found, _drawn(contenders, labelled, settings.run.seed)
    except filelock.Timeout as error:
        raise UserError(f"another process is comparing in {out}") from error


def data_name(data: str) -> str:
    """A source without the folders it lies in; a data set of the hub keeps its whole name."""
    if data.startswith(PREFIX):
        name, colon, rest = data.removeprefix(PREFIX).partition(":")
        return f"{PREFIX}{Path(name).name if Path(name).exists() else name}{colon}{rest}"
    return data if data == "digits" else Path(data).name


def curve(metrics: tuple[dict[str, Any], ...]) -> list[tuple[int, float]]:
    """Steps and held-out bits per dimension, of the stage that trains the model itself."""
    first = metrics[0]["stage"] if metrics else None
    name = "held_out_bits_per_dim"
    return [(line["step"], line[name]) for line in metrics if line["stage"] == first and name in line]


def _measured(
    settings: ComparisonSettings, data: ImageData, contenders: list[Contender], collapse: Collapse
) -> Comparison:
    evaluated = data.held_out.select(spread(len(data.held_out), settings.evaluated))
    learner = data.train.select(spread(len(data.train), settings.probed))
    side = min(POOLED * 2, *data.size)

    def pixels(x: Tensor) -> Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(x, (side, side)).flatten(1)

    labels = evaluated.labels
    model = contenders[0].model
    return Comparison(
        settings,
        {
            "train": len(data.train),
            "held_out": len(data.held_out),
            "evaluated": len(evaluated),
            "probed": len(learner),
            "collapse_evaluated": min(settings.collapse.evaluated, len(evaluated)),
        },
        (data.channels, *data.size),
        model.latent_size(data.size),
        tuple(measure(contender, data, settings) for contender in contenders),
        collapse,
        linear_probe(pixels, learner, evaluated),
        None if labels is None else float(torch.bincount(labels).max()) / len(labels) * 100,
        {contender.name: curve(contender.metrics) for contender in contenders},
    )


def _drawn(contenders: list[Contender], data: ImageData, seed: int) -> Pictures:
    originals = data.held_out.batch(spread(len(data.held_out), SHOWN))
    reconstructions, samples = {}, {}
    for contender in contenders:
        model = contender.model
        device = next(model.parameters()).device
        reconstructions[contender.name] = reconstruct(model, originals.to(device)).cpu()
        generator = torch.Generator(device).manual_seed(seed)
        if isinstance(model, VQVAE):
            assert contender.prior is not None
            drawn = draw(model, contender.prior, data.size, DRAWN, labels=None, generator=generator)
        else:
            assert isinstance(model, VAE)
            drawn = model.sample((DRAWN, *data.size), generator=generator).clamp(-1, 1)
        samples[contender.name] = drawn.cpu()
    return Pictures(originals, reconstructions, samples)
