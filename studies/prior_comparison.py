"""Which prior models codes better: the PixelCNN or the causal transformer, at equal parameters, seeds and wall-clock.

    python -m studies.prior_comparison --threads 1 --out studies/results/prior_comparison.json

One VQ-VAE of the scanned digits (or of `--data FOLDER`) gives the codes. For every seed both priors are trained for the
same number of seconds on the same batches, with the same optimizer and a learning rate that falls to 0 over those
seconds, once with each dropout. The clock runs in training steps alone, and all take turns in short slices of it, so
that whatever else the machine does slows all; how busy it was is told by the processor seconds. The transformer has as
many blocks and channels as bring its parameters nearest to the PixelCNN's; more than 3 % apart nothing is trained.

Held-out images are split in two: after every slice the bits per code of the validation images are measured; the dropout
and the weights with the fewest are kept, and those are tested on the other images. The bits of the last weights, with
that dropout, are reported too. Sampling is timed afterwards, cached, rounds interleaved, medians. Writes JSON and,
beside it, a Markdown table.
"""

import argparse
import copy
import json
import math
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from vqkernels.bench import machine
from vqkernels.bench.report import markdown
from vqkernels.bench.timing import take_turns
from vqkernels.models import PixelCNN, Prior, TransformerPrior
from vqkernels.training.batches import Batches
from vqkernels.training.config import RunConfig, VQVAEConfig
from vqkernels.training.loop import train
from vqkernels.training.stages import encode

NAMES = ("pixelcnn", "transformer")
TOLERANCE = 0.03  # of the parameters
HEADS = 4


class Codes:
    """Codes and labels of a data set, in three parts.

    Args:
        parts: by name, codes (N, h, w) and labels (N,) or None.
        num_codes: K.
        num_classes: None where there are no labels.
    """

    def __init__(self, parts: dict[str, tuple[Tensor, Tensor | None]], num_codes: int, num_classes: int | None) -> None:
        self.parts, self.num_codes, self.num_classes = parts, num_codes, num_classes
        self.grid = tuple(parts["train"][0].shape[1:])

    def independent_bits(self) -> float:
        """Bits per code of the test images for a model that knows how often each code occurs, and nothing else."""
        counts = torch.bincount(self.parts["train"][0].flatten(), minlength=self.num_codes).double() + 1
        return float(-(counts / counts.sum()).log2()[self.parts["test"][0]].mean())


def make_codes(options: argparse.Namespace) -> Codes:
    """Codes of a VQ-VAE that is trained here, the same for every seed of the priors."""
    config = RunConfig(
        data=options.data,
        held_out=0.3,
        checkpoint_every=options.vqvae_steps,
        picture_every=options.vqvae_steps,
        vqvae=VQVAEConfig(
            hidden_channels=options.vqvae_channels,
            code_dim=16,
            codebook_size=options.codes,
            downsamplings=options.downsamplings,
            ema_decay=0.99,
            steps=options.vqvae_steps,
            batch_size=64,
            learning_rate=1e-3,
            schedule="cosine",
        ),
    )
    with tempfile.TemporaryDirectory() as folder:
        trained = train(config, Path(folder) / "run", stage="vqvae")
    device = torch.device("cpu")
    data = trained.data
    codes, labels = encode(trained.vqvae, data.held_out, device), data.held_out.labels
    tested = torch.arange(len(codes)) % 3 != 0
    parts = {"train": (encode(trained.vqvae, data.train, device), data.train.labels)}
    for name, chosen in (("validation", ~tested), ("test", tested)):
        parts[name] = (codes[chosen], None if labels is None else labels[chosen])
    return Codes(parts, options.codes, len(data.class_names) or None)


def parameters(model: Prior) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def build(name: str, codes: Codes, sizes: dict[str, int], dropout: float = 0.0) -> Prior:
    common = {"num_classes": codes.num_classes, "dropout": dropout}
    if name == "pixelcnn":
        return PixelCNN(codes.num_codes, **common, **sizes)
    return TransformerPrior(codes.num_codes, num_heads=HEADS, max_grid=codes.grid, **common, **sizes)


def equal_sizes(codes: Codes, options: argparse.Namespace) -> dict[str, dict[str, int]]:
    """Sizes of both: the PixelCNN's as asked, the transformer's with the nearest number of parameters."""
    pixelcnn = {"hidden_channels": options.channels, "num_layers": options.layers, "head_channels": options.head}
    goal = parameters(build("pixelcnn", codes, pixelcnn))

    def distance(sizes: dict[str, int]) -> int:
        return abs(parameters(build("transformer", codes, sizes)) - goal)

    candidates = []
    for layers in (3, 4, 5, 6):  # a block has about 12 C^2 parameters
        nearest = round(math.sqrt(goal / (12 * layers)) / HEADS)
        for width in range(max(1, nearest - 4), nearest + 3):
            candidates.append({"hidden_channels": HEADS * width, "num_layers": layers})
    transformer = min(candidates, key=distance)
    if distance(transformer) > TOLERANCE * goal:
        raise SystemExit(f"no transformer has within {TOLERANCE:.0%} of {goal} parameters: nothing is trained")
    return {"pixelcnn": pixelcnn, "transformer": transformer}


@torch.no_grad()
def held_out_bits(model: Prior, codes: Codes, part: str) -> float:
    """Mean bits per code."""
    grids, labels = codes.parts[part]
    model.eval()
    bits = [
        model.bits_per_code(grids[start : start + 256], None if labels is None else labels[start : start + 256])
        for start in range(0, len(grids), 256)
    ]
    model.train()
    return float(torch.cat(bits).double().mean())


class PriorTraining:
    """A prior in training.

    Args:
        name: of NAMES.
        dropout: of the model.
        seed: of the weights and of the batches.
    """

    def __init__(
        self, name: str, codes: Codes, options: argparse.Namespace, sizes: dict[str, int], dropout: float, seed: int
    ) -> None:
        torch.manual_seed(seed)
        self.name, self.codes, self.options, self.dropout = name, codes, options, dropout
        self.model = build(name, codes, sizes, dropout)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=options.learning_rate)
        self.batches = Batches(len(codes.parts["train"][0]), options.batch, seed)
        self.steps, self.seconds, self.processor_seconds = 0, 0.0, 0.0
        self.curve: list[dict] = []
        self.best = copy.deepcopy(self.model.state_dict())

    def train_until(self, seconds: float) -> None:
        """Steps until the clock of this contender shows so many seconds, then an evaluation off the clock."""
        grids, labels = self.codes.parts["train"]
        while self.seconds < seconds:
            began, worked = time.perf_counter(), time.process_time()
            for group in self.optimizer.param_groups:
                share = min(1.0, self.seconds / self.options.seconds)
                group["lr"] = self.options.learning_rate * 0.5 * (1 + math.cos(math.pi * share))
            indices = self.batches.indices(self.steps)
            loss = F.cross_entropy(
                self.model(grids[indices], None if labels is None else labels[indices]), grids[indices]
            )
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
            self.steps += 1
            self.seconds += time.perf_counter() - began
            self.processor_seconds += time.process_time() - worked
        bits = held_out_bits(self.model, self.codes, "validation")
        if not self.curve or bits < min(point["bits"] for point in self.curve):
            self.best = copy.deepcopy(self.model.state_dict())
        self.curve.append({"steps": self.steps, "seconds": self.seconds, "bits": bits})

    def finish(self) -> dict:
        """The record; leaves the model with the kept weights."""
        last = held_out_bits(self.model, self.codes, "test")
        self.model.load_state_dict(self.best)
        kept = min(self.curve, key=lambda point: point["bits"])
        return {
            "dropout": self.dropout,
            "validation_bits": kept["bits"],
            "test_bits": held_out_bits(self.model, self.codes, "test"),
            "test_bits_of_the_last_weights": last,
            "steps": self.steps,
            "seconds": self.seconds,
            "processor_seconds": self.processor_seconds,
            "kept_at_step": kept["steps"],
            "curve": self.curve,
        }


def sampling_seconds(models: dict[str, Prior], codes: Codes, batch: int, rounds: int) -> dict[str, float]:
    """Median seconds of drawing a batch of grids."""
    labels = None if codes.num_classes is None else torch.arange(batch) % codes.num_classes
    functions = {name: partial(model.sample, (batch, *codes.grid), labels=labels) for name, model in models.items()}
    for function in functions.values():
        function()  # warms up
    samples = take_turns(functions, dict.fromkeys(functions, rounds))
    return {name: statistics.median(values) for name, values in samples.items()}


def compare(codes: Codes, options: argparse.Namespace) -> dict:
    """Trains both for every seed; the result but for the machine."""
    sizes = equal_sizes(codes, options)
    seeds: dict[str, list[dict]] = {name: [] for name in NAMES}
    models: dict[str, Prior] = {}
    for seed in range(options.seeds):
        contenders = [
            PriorTraining(name, codes, options, sizes[name], dropout, seed)
            for dropout in options.dropouts
            for name in NAMES
        ]
        for turn in range(options.slices):
            for contender in contenders:
                contender.train_until(options.seconds * (turn + 1) / options.slices)
        for name in NAMES:
            tried = [(contender.finish(), contender.model) for contender in contenders if contender.name == name]
            record, models[name] = min(tried, key=lambda one: one[0]["validation_bits"])
            others = {str(other["dropout"]): other["validation_bits"] for other, _ in tried}
            seeds[name].append({"seed": seed, **record, "validation_bits_by_dropout": others})
            print(
                f"seed {seed}, {name}, dropout {record['dropout']:g}: {record['test_bits']:.4f} bits per code, "
                f"{record['steps']} steps in {record['seconds']:.1f} s",
                flush=True,
            )
    drawn = {str(batch): sampling_seconds(models, codes, batch, options.rounds) for batch in options.sample_batches}
    return {
        "grid": codes.grid,
        "codes": codes.num_codes,
        "images": {name: len(grids) for name, (grids, _) in codes.parts.items()},
        "independent_bits": codes.independent_bits(),
        "parameters": {name: parameters(model) for name, model in models.items()},
        "sizes": sizes,
        "seeds": seeds,
        "sampling_seconds": drawn,
    }


def span(values: list[float], digits: int) -> str:
    """Mean and range."""
    mean = statistics.mean(values)
    return f"{mean:.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def table(result: dict) -> str:
    """Markdown."""
    facts, used, seeds = result["machine"], result["options"], result["seeds"]
    first, second = ([record["test_bits"] for record in seeds[name]] for name in NAMES)
    apart = statistics.mean(second) - statistics.mean(first)
    fewer = sum(b < a for a, b in zip(first, second, strict=True))
    rows = []

    def row(what: str, cells: list[str]) -> None:
        rows.append([what, *cells])

    row("parameters", [f"{result['parameters'][name]:,}" for name in NAMES])
    row("layers × channels", [f"{s['num_layers']} × {s['hidden_channels']}" for s in map(result["sizes"].get, NAMES)])
    for what, key, digits in (
        ("bits per code, test images", "test_bits", 3),
        ("the same, last weights", "test_bits_of_the_last_weights", 3),
        ("training steps", "steps", 0),
        ("seconds of training", "seconds", 1),
        ("processor seconds of these", "processor_seconds", 1),
        ("weights kept at step", "kept_at_step", 0),
        ("dropout", "dropout", 2),
    ):
        row(what, [span([record[key] for record in seeds[name]], digits) for name in NAMES])
    for batch, drawn in result["sampling_seconds"].items():
        row(f"ms to draw {batch} grid{'' if batch == '1' else 's'}", [f"{drawn[name] * 1e3:.1f}" for name in NAMES])
    lines = [
        f"{facts['processor']}, threads: {facts['threads']}, torch {facts['torch']}, commit {facts['commit']}. "
        f"Codes of {used['data']}, {result['grid'][0]}×{result['grid'][1]} of K = {result['codes']}: "
        f"{', '.join(f'{count} {name}' for name, count in result['images'].items())} images. "
        f"Seeds: {used['seeds']}; {used['seconds']:g} s of training for each prior, seed and dropout, batch "
        f"{used['batch']}, Adam at {used['learning_rate']:g} falling to 0; dropout chosen by the validation images: "
        f"{', '.join(f'{dropout:g}' for dropout in used['dropouts'])}. Mean (range over the seeds).",
        "",
        *markdown(("", "PixelCNN", "transformer"), rows, padded=False),
        "",
        f"The transformer's bits per code less the PixelCNN's: {apart:+.3f}; fewer on {fewer} of {len(first)} seeds. "
        f"Codes drawn independently, by their frequency, need {result['independent_bits']:.3f}.",
    ]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file; .md goes beside it")
    parser.add_argument("--data", default="digits", help="as `vqkernels train --data`")
    parser.add_argument("--downsamplings", type=int, default=1, help="of the VQ-VAE; 2 for images of 28x28")
    parser.add_argument("--codes", type=int, default=64)
    parser.add_argument("--vqvae-channels", type=int, default=64)
    parser.add_argument("--vqvae-steps", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=30.0, help="of training, for each prior, seed, dropout")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--slices", type=int, default=30, help="turns, each with an evaluation")
    parser.add_argument("--channels", type=int, default=32, help="of the PixelCNN")
    parser.add_argument("--layers", type=int, default=6, help="of the PixelCNN")
    parser.add_argument("--head", type=int, default=128, help="channels before the PixelCNN's logits")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--dropouts", type=float, nargs="+", default=[0.1, 0.3])
    parser.add_argument("--sample-batches", type=int, nargs="+", default=[1, 100])
    parser.add_argument("--rounds", type=int, default=7, help="of sampling")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="a second in all, to see that it runs")
    options = parser.parse_args(arguments)
    if options.quick:
        options.codes, options.vqvae_channels, options.vqvae_steps, options.sample_batches = 16, 8, 4, [1, 4]
        options.channels, options.layers, options.head, options.rounds = 16, 2, 16, 1
        options.seconds, options.seeds, options.slices = 0.1, 2, 2
    torch.set_num_threads(options.threads)
    facts = machine.facts(options.threads)
    used = {key: value for key, value in vars(options).items() if key not in ("out", "quick")}
    used["data"] = Path(options.data).name
    result = {"machine": facts, "options": used, **compare(make_codes(options), options)}
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    text = table(result)
    options.out.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
