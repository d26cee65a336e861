"""The whole system beside the usual implementation: steps, sampling, and the demo from images to drawn images.

    python -m benchmarks.full_model --out benchmarks/results/full_model.json --readme docs/full_model.md

The usual implementation (benchmarks/usual_model.py) has our architecture, weights, seeds, batches and losses: one-hot
quantizer, masked PixelCNN, eager float32, Adam, a full forward pass for every sampled code. Ours is what `vqkernels
train` does with its defaults, and with each of its speed flags. Losses of the first steps must agree before anything is
timed; steps take turns and figures are medians. The demo runs once for each, on one thread as `vqkernels demo` does; it
must end as good as the usual one. Writes JSON and, beside it, a Markdown table and a plot.
"""

import argparse
import copy
import json
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.goals import state
from benchmarks.usual_model import (
    Step,
    check_losses,
    code_loss,
    plain_sample,
    reconstruction_loss,
    steps,
    usual_prior,
    usual_vqvae,
)
from vqkernels.bench import machine
from vqkernels.bench.report import markdown, put
from vqkernels.bench.timing import interleave
from vqkernels.models import VQVAE, PixelCNN
from vqkernels.training.acceleration import SpeedConfig

MARKS = ("<!-- full model -->", "<!-- end of full model -->")
IMAGES, SIDE = 32, 32  # of a VQ-VAE step: 8 x 8 codes each, 2,048 rows
GRIDS, GRID, CLASSES = 64, 8, 10  # of a prior step
SAMPLED = 16  # grids
DEFAULT, MIXED = "defaults", "--amp bfloat16"
FLAGS = {
    "no flag": SpeedConfig(channels_last="off", fused_optimizer=False),
    "--channels-last alone": SpeedConfig(fused_optimizer=False),
    "--fused-optimizer alone": SpeedConfig(channels_last="off"),
    DEFAULT: SpeedConfig(),
    MIXED: SpeedConfig(amp="bfloat16"),
    "--compile": SpeedConfig(compile=True),
    "--compile --amp bfloat16": SpeedConfig(compile=True, amp="bfloat16"),
}
TOLERANCES = {name: 2e-2 for name in FLAGS if "bfloat16" in name}
# What is decided: part, contender, goal, floor.
TARGETS = (
    ("VQ-VAE step, K=8192", DEFAULT, 2.2, None),
    ("VQ-VAE step, K=512", DEFAULT, None, None),
    ("demo", DEFAULT, 3.0, 1.5),
    ("demo", MIXED, 3.0, 1.5),
)


def vqvae_steps(codebook_size: int, channels: int, images: int, flags: dict[str, SpeedConfig]) -> dict[str, Step]:
    """The usual step and ours, on the CPU, of equal models."""
    torch.manual_seed(0)
    model = VQVAE(3, hidden_channels=channels, code_dim=64, codebook_size=codebook_size)
    torch.nn.init.normal_(model.quantizer.codebook, std=0.1)  # so that many codes are used
    loss = reconstruction_loss(torch.rand(images, 3, SIDE, SIDE) * 2 - 1)
    return steps(model, usual_vqvae(model), loss, flags, torch.device("cpu"))


def prior_model(codes: int, channels: int, layers: int) -> PixelCNN:
    torch.manual_seed(0)
    return PixelCNN(codes, hidden_channels=channels, num_layers=layers, num_classes=CLASSES)


def prior_steps(model: PixelCNN, grids: int, side: int, flags: dict[str, SpeedConfig]) -> dict[str, Step]:
    """The usual step and ours, of equal PixelCNNs."""
    loss = code_loss(torch.randint(model.num_codes, (grids, side, side)), torch.arange(grids) % CLASSES)
    return steps(model, usual_prior(model), loss, flags, torch.device("cpu"))


def timed(what: str, contenders: dict[str, Step], options: argparse.Namespace) -> dict[str, Any]:
    """Losses, then times in turn."""
    check_losses(contenders, what, TOLERANCES)
    least, most = (1, 2) if options.quick else (5, 25)
    timings, _ = interleave(dict(contenders), options.threads, options.seconds, least, most)
    return _row(what, {name: (t.median, t.low, t.high, t.rounds) for name, t in timings.items()})


def sampling(model: PixelCNN, side: int, options: argparse.Namespace) -> dict[str, Any]:
    """A batch of grids: a full pass of the usual model for every code, and ours from caches."""
    usual, model = usual_prior(model).eval(), copy.deepcopy(model).eval()
    labels = torch.arange(options.sampled) % CLASSES
    codes = torch.randint(model.num_codes, (2, side, side))
    with torch.no_grad():
        difference = (usual(codes, labels[:2]) - model(codes, labels[:2])).abs().max()
    if not difference < 1e-4:
        raise SystemExit(f"the logits differ by {float(difference)}: nothing is timed")
    contenders = {
        "usual": lambda: plain_sample(usual, labels, (side, side)),
        DEFAULT: lambda: model.sample((len(labels), side, side), labels=labels),
    }
    least, most = (1, 1) if options.quick else (2, 25)
    timings, _ = interleave(contenders, options.threads, options.seconds, least, most)
    return _row("sampling", {name: (t.median, t.low, t.high, t.rounds) for name, t in timings.items()})


def _row(what: str, seconds: dict[str, tuple[float, float, float, int]]) -> dict[str, Any]:
    return {
        "what": what,
        "seconds": {
            name: dict(zip(("median", "low", "high", "rounds"), x, strict=True)) for name, x in seconds.items()
        },
        "times usual": {name: seconds["usual"][0] / x[0] for name, x in seconds.items()},
    }


def demo(quick: bool) -> dict[str, Any]:
    """The whole pipeline once for each, on one thread."""
    import dataclasses

    from benchmarks.demo_pipeline import check_runs, our_run, shortened, times_to_loss, usual_run
    from vqkernels.cli.demo import demo_config

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    config = shortened(demo_config(), 12, 8, 2) if quick else demo_config()
    runs = {"usual": usual_run(config)}
    for name, amp in ((DEFAULT, "off"), (MIXED, "bfloat16")):  # as `vqkernels demo` with this flag
        runs[name] = our_run(dataclasses.replace(config, speed=demo_config(amp=amp).speed))
        print(f"demo, {name}: {runs[name]['seconds']['wall']:.1f} s, {runs['usual']['seconds']['wall']:.1f} usual")
    torch.set_num_threads(threads)
    check_runs(runs, 1.05 if not quick else 1.5)
    return {
        "runs": runs,
        "times usual": {
            name: {clock: runs["usual"]["seconds"][clock] / run["seconds"][clock] for clock in ("wall", "process")}
            for name, run in runs.items()
        },
        "to a given loss": {stage: times_to_loss(runs, stage) for stage in ("vqvae", "prior")},
    }


def table(result: dict[str, Any]) -> str:
    """Markdown: every part and flag, the demo, and every target, met or not."""
    facts = result["machine"]
    rows = []
    for row in result["parts"]:
        cells = [
            f"{1e3 * row['seconds'][name]['median']:.1f}, **{row['times usual'][name]:.2f}x**"
            if name in row["seconds"]
            else ""
            for name in FLAGS
        ]
        rows.append([row["what"], f"{1e3 * row['seconds']['usual']['median']:.1f}", *cells])
    lines = [
        f"{facts['processor']}, {facts['threads']} threads (the demo: 1), torch {facts['torch']}, commit "
        f"{facts['commit']}; steps and sampling are medians.",
        "",
        *markdown(("", "usual, ms", *FLAGS), rows, padded=False),
    ]
    if "demo" in result:
        lines += ["", *_demo_table(result["demo"])]
    return "\n".join([*lines, "", *verdicts(result)]) + "\n"


def _demo_table(told: dict[str, Any]) -> list[str]:
    from benchmarks.demo_pipeline import PARTS, QUALITY

    runs, given = told["runs"], told["to a given loss"]
    rows = [[part, *(f"{run['parts'][part]['wall']:.1f}" for run in runs.values())] for part in PARTS]
    times = {name: f"**{told['times usual'][name]['wall']:.2f}x**" for name in runs}
    rows.append(["all", *(f"{run['seconds']['wall']:.1f}, {times[name]}" for name, run in runs.items())])
    rows.append(["all, of this process alone", *(f"{run['seconds']['process']:.1f}" for run in runs.values())])
    for stage, name in (("vqvae", "VQ-VAE"), ("prior", "prior")):
        seconds = given[stage]["seconds"]
        rows.append([f"{name} to a loss of {given[stage]['loss']:.3g}", *(f"{seconds[x]:.1f}" for x in runs)])
    for what in QUALITY:
        rows.append([what.replace("_", " "), *(f"{run['quality'][what]:.4f}" for run in runs.values())])
    return markdown(("demo, seconds", *runs), rows, padded=False)


def verdicts(result: dict[str, Any]) -> list[str]:
    """One line for each target that was measured."""
    measured = {row["what"]: row["times usual"] for row in result["parts"]}
    if "demo" in result:
        measured["demo"] = {name: x["wall"] for name, x in result["demo"]["times usual"].items()}
    lines = []
    for what, name, goal, floor in TARGETS:
        value = measured.get(what, {}).get(name)
        if value is None:
            continue
        if goal is None:
            lines.append(f"- {what}, {name}: {value:.2f}x (no goal was set)")
            continue
        wanted = f"goal {goal}{f', floor {floor}' if floor else ''}"
        lines.append(f"- {what}, {name}: {value:.2f}x ({wanted}): {state(value, goal, floor)}")
    return lines


def draw(path: Path, result: dict[str, Any]) -> None:
    """How much faster every part is, and the demo's losses over seconds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.8), layout="constrained")
    axes = figure.subplots(1, 3)
    rows = [row for row in result["parts"] if row["what"] != "sampling"]
    names = [name for name in FLAGS if any(name in row["seconds"] for row in rows)]
    for number, row in enumerate(rows):
        values = [row["times usual"].get(name, 0.0) for name in names]
        places = [x + 0.8 * number / len(rows) for x in range(len(names))]
        axes[0].bar(places, values, 0.8 / len(rows), align="edge", label=row["what"])
    axes[0].axhline(1, color="black", linewidth=0.8)
    axes[0].set_xticks([x + 0.4 for x in range(len(names))], names, rotation=30, ha="right", fontsize=7)
    axes[0].set(ylabel="times the usual step", title="a training step")
    axes[0].legend(fontsize=7)
    if "demo" in result:
        for panel, stage in zip(axes[1:], ("vqvae", "prior"), strict=True):
            for name, run in result["demo"]["runs"].items():
                curve = run["curves"][stage]
                panel.plot(curve["seconds"], curve["loss"], label=name, linewidth=1)
            panel.set(xlabel="seconds", yscale="log", title=f"demo: loss of the {stage}")
        axes[1].legend(fontsize=7)
    figure.savefig(path, dpi=120)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file; .md and .png go beside it")
    parser.add_argument("--readme", type=Path, help="a file whose text between two marks becomes the table of this run")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=30.0, help="of timing for each part, about")
    parser.add_argument("--no-compile", action="store_true", help="leave out the compiled steps")
    parser.add_argument("--no-demo", action="store_true", help="leave out the demo")
    parser.add_argument("--quick", action="store_true", help="tiny, to see that it runs")
    options = parser.parse_args(arguments)
    if options.readme is not None:
        put(options.readme, MARKS)
    torch.set_num_threads(options.threads)
    begun = time.perf_counter()
    flags = {k: x for k, x in FLAGS.items() if not (x.compile and (options.quick or options.no_compile))}
    tiny = options.quick
    options.sampled = 2 if tiny else SAMPLED
    parts = []
    for size in (64,) if tiny else (8192, 512):
        # Compiling says the same at both sizes.
        chosen = {k: x for k, x in flags.items() if not (x.compile and size == 512)}
        contenders = vqvae_steps(size, 8 if tiny else 128, 2 if tiny else IMAGES, chosen)
        parts.append(timed(f"VQ-VAE step, K={size}", contenders, options))
        print(f"{parts[-1]['what']}: {parts[-1]['times usual'][DEFAULT]:.2f}x", flush=True)
    prior = prior_model(16, 8, 2) if tiny else prior_model(512, 64, 15)
    side = 4 if tiny else GRID
    # The prior has no images: its layout is left alone.
    chosen = {k: x for k, x in flags.items() if k in (DEFAULT, MIXED, "no flag")}
    parts.append(timed("prior step", prior_steps(prior, 4 if tiny else GRIDS, side, chosen), options))
    parts.append(sampling(prior, side, options))
    result = {"machine": machine.facts(options.threads), "parts": parts}
    if not options.no_demo:
        result["demo"] = demo(options.quick)
    result["minutes"] = (time.perf_counter() - begun) / 60
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    text = table(result)
    options.out.with_suffix(".md").write_text(text)
    draw(options.out.with_suffix(".png"), result)
    if options.readme is not None:
        put(options.readme, MARKS, text)
    print(text)


if __name__ == "__main__":
    main()
