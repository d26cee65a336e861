"""How fast the PixelCNN prior samples and trains, beside the samplers and layers that everyone writes.

    python -m benchmarks.prior --out benchmarks/results/prior.json
    python -m benchmarks.prior --training-only --out training.json     # a few minutes

Sampling: ours from caches; the plain sampler, a full forward pass of the same model for every code, without autograd;
and `generate` of the widespread GatedPixelCNN (benchmarks/standard_pixelcnn.py), which runs with autograd as it does
there. The plain and the standard sampler cost the same at every position, so that where a whole grid would take longer
than the budget a number of positions is timed and multiplied: such figures are marked `extrapolated` and tell how many.
Training: one step (forward, backward) of the same weights and loss with full kernels that are masked in every forward,
of the standard implementation (one class bias less), and of ours. The table counts the multiply-adds of the masked
model over ours as each computes them, which is the gain where all of them run at the speed of the machine.

Rounds are interleaved; figures are medians. Before anything is timed the cached codes must equal the plain ones, and
the loss of the masked model ours. Writes JSON and, beside it, a Markdown table and a plot.
"""

import argparse
import json
import statistics
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.goals import state
from benchmarks.standard_pixelcnn import MaskedPixelCNN, StandardPixelCNN
from vqkernels.bench import machine
from vqkernels.bench.report import markdown
from vqkernels.bench.timing import seconds_per_call, take_turns
from vqkernels.models import PixelCNN

CODES, LAYERS, CLASSES = 512, 15, 10
TARGETS = {8: (30, 15), 16: (120, 60), 32: (500, 200)}  # speed-up over the plain sampler at batch 16: goal, floor
TRAINING_TARGETS = (1.8, 1.4)


def check_codes(model: PixelCNN, side: int) -> None:
    """The cached codes are the plain ones, on a grid small enough to wait for; in float64, where rounding decides
    nothing."""
    wide = PixelCNN(CODES, hidden_channels=model.embedding.embedding_dim, num_layers=LAYERS, num_classes=CLASSES)
    wide.double().load_state_dict(model.state_dict())
    labels = torch.tensor([3, 7])
    shape = (2, min(side, 4), min(side, 5))
    plain, cached = (
        wide.sample(shape, labels=labels, generator=torch.Generator().manual_seed(0), cached=cached)
        for cached in (False, True)
    )
    if not torch.equal(plain, cached):
        raise SystemExit("the cached sampler drew other codes than the plain one: nothing is timed")


def plain_positions(model: PixelCNN, batch: int, side: int, labels: Tensor, positions: int) -> None:
    """The plain sampler on a grid of which all but the first `positions` codes are known: that many forward passes."""
    known = torch.zeros(batch, side * side, dtype=torch.int64)
    known[:, :positions] = -1
    model.sample((batch, side, side), labels=labels, known=known.view(batch, side, side), cached=False)


def sampling(channels: int, side: int, batch: int, budget: float) -> dict:
    """One cell of the table."""
    torch.manual_seed(0)
    model = PixelCNN(CODES, hidden_channels=channels, num_layers=LAYERS, num_classes=CLASSES).eval()
    standard = StandardPixelCNN(CODES, channels, LAYERS, CLASSES).eval()
    labels, size = torch.arange(batch) % CLASSES, side * side
    check_codes(model, side)

    def cached() -> None:
        model.sample((batch, side, side), labels=labels)

    cached()
    contenders = {
        "plain": lambda count: plain_positions(model, batch, side, labels, count),
        "standard": lambda count: standard.generate(labels, (side, side), count),
    }
    counts = {}
    for name, run in contenders.items():
        run(1)
        one = seconds_per_call(lambda run=run: run(1), 1)
        counts[name] = max(1, min(size, int(budget / 3 / one)))
    functions = {"cached": cached} | {name: partial(run, counts[name]) for name, run in contenders.items()}
    samples = take_turns(functions, dict.fromkeys(functions, 3))
    for name, count in counts.items():
        samples[name] = [value * size / count for value in samples[name]]
    middle = {name: statistics.median(values) for name, values in samples.items()}
    return {
        "channels": channels,
        "side": side,
        "batch": batch,
        "seconds": middle,
        "samples": samples,
        "positions_timed": {"cached": size, **counts},
        "extrapolated": [name for name, count in counts.items() if count < size],
        "times_plain": middle["plain"] / middle["cached"],
        "times_standard": middle["standard"] / middle["cached"],
    }


def training(channels: int, side: int, batch: int, rounds: int) -> dict:
    """Seconds of a training step of each form of the model."""
    torch.manual_seed(0)
    ours = PixelCNN(CODES, hidden_channels=channels, num_layers=LAYERS, num_classes=CLASSES)
    masked = MaskedPixelCNN(CODES, channels, LAYERS, CLASSES)
    masked.load_cropped(ours.state_dict())
    models = {"ours": ours, "masked": masked, "standard": StandardPixelCNN(CODES, channels, LAYERS, CLASSES)}
    codes, labels = torch.randint(CODES, (batch, side, side)), torch.arange(batch) % CLASSES

    def step(model: torch.nn.Module) -> float:
        model.zero_grad(set_to_none=True)
        loss = F.cross_entropy(model(codes, labels), codes)
        loss.backward()
        return float(loss.detach())

    losses = {name: step(model) for name, model in models.items()}
    if abs(losses["ours"] - losses["masked"]) > 1e-5:
        raise SystemExit(f"the masked model has another loss than ours, {losses}: nothing is timed")
    functions = {name: partial(step, model) for name, model in models.items()}
    samples = take_turns(functions, dict.fromkeys(functions, rounds))
    middle = {name: statistics.median(values) for name, values in samples.items()}
    operations = {}
    for name, model in models.items():
        with FlopCounterMode(display=False) as counter:
            step(model)
        operations[name] = counter.get_total_flops()
    return {
        "channels": channels,
        "side": side,
        "batch": batch,
        "seconds": middle,
        "samples": samples,
        "operations": operations,
        "operations_masked": operations["masked"] / operations["ours"],
        "parameters": {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()},
        "times_masked": middle["masked"] / middle["ours"],
        "times_standard": middle["standard"] / middle["ours"],
    }


def table(cells: list[dict], steps: list[dict], facts: dict[str, str]) -> str:
    """Markdown: every cell, then every target, met or not."""
    lines = [
        f"{facts['processor']}, {facts['threads']} threads, torch {facts['torch']}, commit {facts['commit']}; "
        f"{LAYERS} layers, K = {CODES}. Seconds for a batch of grids; ~ extrapolated from some of the positions.",
    ]
    rows = []
    for cell in cells:
        told = {name: f"{value:.3g}" for name, value in cell["seconds"].items()}
        told |= {name: f"~{told[name]}" for name in cell["extrapolated"]}
        ratios = [f"{cell[name]:.0f}" for name in ("times_plain", "times_standard")]
        rows.append([*_shape(cell), *(told[name] for name in ("cached", "plain", "standard")), *ratios])
    if cells:
        head = ("channels", "grid", "batch", "cached", "plain", "standard", "× plain", "× standard")
        lines += ["", *markdown(head, rows, padded=False)]
    rows = []
    for cell in steps:
        told = [f"{cell['seconds'][name]:.3g}" for name in ("ours", "masked", "standard")]
        ratios = [f"{cell[name]:.2f}" for name in ("times_masked", "times_standard", "operations_masked")]
        rows.append([*_shape(cell), *told, *ratios])
    head = ("channels", "grid", "batch", "ours, s/step", "masked", "standard", "× masked", "× standard")
    lines += ["", *markdown((*head, "operations, masked to ours"), rows, padded=False)]
    return "\n".join([*lines, "", *verdicts(cells, steps)]) + "\n"


def _shape(cell: dict) -> list[str]:
    return [str(cell["channels"]), f"{cell['side']}×{cell['side']}", str(cell["batch"])]


def verdicts(cells: list[dict], steps: list[dict]) -> list[str]:
    """One line for each target that was measured."""
    lines = []
    for cell in cells:
        if cell["batch"] == 16 and cell["channels"] == 64 and cell["side"] in TARGETS:
            what = f"sampling {cell['side']}×{cell['side']}, times the plain sampler"
            lines.append(_verdict(what, cell["times_plain"], *TARGETS[cell["side"]]))
    for cell in steps:
        what = f"training step {cell['side']}×{cell['side']}, {cell['channels']} channels, times the masked model"
        lines.append(_verdict(what, cell["times_masked"], *TRAINING_TARGETS))
    return lines


def _verdict(what: str, value: float, goal: float, floor: float) -> str:
    return f"- {what}: {value:.3g} (goal {goal}, floor {floor}): {state(value, goal, floor)}"


def draw(path: Path, cells: list[dict]) -> None:
    """Seconds over the number of codes, one line for each sampler, one panel for each batch."""
    from matplotlib.figure import Figure

    channels = cells[0]["channels"]
    batches = sorted({cell["batch"] for cell in cells})
    figure = Figure(figsize=(4 * len(batches), 3.6), layout="constrained")
    for axes, batch in zip(figure.subplots(1, len(batches), squeeze=False)[0], batches, strict=True):
        chosen = [cell for cell in cells if cell["batch"] == batch and cell["channels"] == channels]
        for name in ("standard", "plain", "cached"):
            axes.plot([c["side"] ** 2 for c in chosen], [c["seconds"][name] for c in chosen], marker="o", label=name)
        axes.set(xscale="log", yscale="log", xlabel="codes in a grid", title=f"batch {batch}, {channels} channels")
    figure.axes[0].set_ylabel("seconds for the batch")
    figure.axes[0].legend()
    figure.savefig(path, dpi=130)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file; .md and .png go beside it")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--channels", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--sides", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--budget", type=float, default=12.0, help="seconds for each slow sampler of a cell")
    parser.add_argument("--training-batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7, help="training steps timed of each model")
    parser.add_argument("--training-only", action="store_true", help="no sampling, and no plot of it")
    parser.add_argument("--quick", action="store_true", help="one tiny cell, to see that it runs")
    options = parser.parse_args(arguments)
    if options.quick:
        options.channels, options.sides, options.batches = [8], [4], [2]
        options.budget, options.training_batch, options.rounds = 0.2, 2, 1
    torch.set_num_threads(options.threads)
    facts = machine.facts(options.threads)
    cells, steps = [], []
    for channels in options.channels:
        for side in options.sides:
            for batch in [] if options.training_only else options.batches:
                cells.append(sampling(channels, side, batch, options.budget))
                last = cells[-1]
                print(
                    f"{channels} channels, {side}×{side}, batch {batch}: {last['times_plain']:.0f} × plain", flush=True
                )
        for side in options.sides[:2]:
            steps.append(training(channels, side, options.training_batch, options.rounds))
            print(f"training {channels} channels, {side}×{side}: {steps[-1]['times_masked']:.2f} × masked", flush=True)
    result = {"machine": facts, "layers": LAYERS, "codes": CODES, "sampling": cells, "training": steps}
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    text = table(cells, steps, facts)
    options.out.with_suffix(".md").write_text(text)
    if cells:
        draw(options.out.with_suffix(".png"), cells)
    print(text)


if __name__ == "__main__":
    main()
