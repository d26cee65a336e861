"""How good the class-conditional prior is: samples judged by a classifier of real images, and bits per held-out code.

    python -m studies.prior_quality --data digits --out studies/results/prior_quality.json
    python -m studies.prior_quality --data mnist IMAGES --out studies/results/prior_quality.json
    python -m studies.prior_quality --data cifar IMAGES --out studies/results/prior_quality.json

IMAGES is a folder as `vqkernels train` reads it. The VQ-VAE and then the prior are trained as `vqkernels train` does,
in the run directory --run; a finished run there is measured again, an interrupted one goes on.

Recognised: the share of samples that a support vector machine, trained on the real training images, assigns to the
class that was asked for; the same judge on real held-out images and on their reconstructions says what it is worth.
Bits: the mean -log2 p of a held-out code under the prior, and under the frequencies of the training codes alone
(add-one, so that an unseen code has a probability). Their difference is what the prior knows of neighbours and class.
"""

import argparse
import dataclasses
import json
import math
import shutil
import time
from pathlib import Path

import torch
from torch import Tensor

from vqkernels.bench import machine
from vqkernels.cli.demo import demo_config
from vqkernels.cli.train import train_interruptibly
from vqkernels.models import VQVAE, PixelCNN
from vqkernels.training.checkpoint import holds_run
from vqkernels.training.config import PriorConfig, RunConfig, VQVAEConfig
from vqkernels.training.data import ImageData
from vqkernels.training.evaluation import DigitJudge, Figure
from vqkernels.training.images import ImageSet
from vqkernels.training.pictures import image_grid, save_png
from vqkernels.training.stages import CHUNK, decode, draw_codes, encode

JUDGED = {"cifar": 3_000}  # training images that the judge learns from; all where none is said
SHOWN = 1_000  # held-out images that it judges
COMPLETIONS = 8  # of one image
LEAST = {"digits": 85.0, "mnist": 85.0}  # per cent of the samples
DATA = ("digits", "mnist", "cifar")


def configuration(data: str, images: str, seed: int) -> RunConfig:
    """The run of a data set; that of the digits is `vqkernels demo`."""
    if data == "digits":
        return demo_config(seed)
    cifar = data == "cifar"
    return RunConfig(
        data=images,
        color="rgb" if cifar else "grey",
        held_out=0.1,  # 1,000 of MNIST's 10,000 images, drawn by the seed; CIFAR-10 brings its own test images
        seed=seed,
        vqvae=VQVAEConfig(
            hidden_channels=64 if cifar else 32,
            code_dim=32 if cifar else 16,
            codebook_size=256 if cifar else 64,
            ema_decay=0.99,
            steps=1500 if cifar else 3000,
            batch_size=64,
            learning_rate=1e-3,
            schedule="cosine",
        ),
        prior=PriorConfig(
            hidden_channels=64,
            num_layers=6,
            head_channels=128,
            dropout=0.1 if cifar else 0.2,
            label_dropout=0.1,
            steps=900 if cifar else 3500,
            batch_size=64,
            learning_rate=1e-3,
            schedule="cosine",
        ),
        checkpoint_every=500,
        picture_every=1000,
    )


def unigram_bits(counts: Tensor, codes: Tensor) -> float:
    """Mean -log2 of a code's frequency, for codes of any shape under counts (K,) of other codes, one added to each."""
    p = (counts.double() + 1) / (counts.sum() + len(counts))
    return float(-p.log2()[codes].mean())


@torch.no_grad()
def prior_bits(prior: PixelCNN, codes: Tensor, labels: Tensor | None) -> float:
    """Mean -log2 p of a code of the grids (N, h, w) given their labels (N,)."""
    total = 0.0
    for start in range(0, len(codes), CHUNK):
        part = slice(start, start + CHUNK)
        total += float(prior.bits_per_code(codes[part], None if labels is None else labels[part]).double().sum())
    return total / len(codes)


def spread(images: ImageSet, limit: int) -> ImageSet:
    """At most `limit` images, evenly spaced: data sorted by class is seen in all its classes."""
    count = len(images)
    return images if count <= limit else images.select(torch.arange(limit) * count // limit)


def measure(vqvae: VQVAE, prior: PixelCNN, data: ImageData, *, judged: int, per_class: int, seed: int) -> dict:
    """All figures of a trained model; the samples are drawn with the cached sampler.

    Args:
        judged: the most training images that the judge learns from.
        per_class: samples drawn for each class.
        seed: of the samples.
    """
    judge = DigitJudge(dataclasses.replace(data, train=spread(data.train, judged)))
    shown = spread(data.held_out, SHOWN)
    labels, real = shown.labels, shown.batch(slice(None))
    assert labels is not None  # the judge has checked it
    reconstructions = decode(vqvae, encode(vqvae, shown, torch.device("cpu")), data.size)
    asked = torch.arange(len(data.class_names)).repeat_interleave(per_class)
    ways = [(1.0, 1.0), (0.9, 1.0)] + ([(1.0, 1.5)] if prior.label_dropout > 0 else [])
    samples = []
    for temperature, guidance in ways:
        start = time.perf_counter()
        codes = draw_codes(
            vqvae,
            prior,
            data.size,
            len(asked),
            labels=asked,
            generator=torch.Generator().manual_seed(seed),
            temperature=temperature,
            guidance=guidance,
        )
        seconds = time.perf_counter() - start
        recognised = judge.recognised(decode(vqvae, codes, data.size), asked)
        samples.append(
            {"temperature": temperature, "guidance": guidance, "recognised": recognised, "seconds": round(seconds, 2)}
        )
    train_codes, held_out_codes = (encode(vqvae, part, torch.device("cpu")) for part in (data.train, data.held_out))
    size = vqvae.quantizer.codebook_size
    counts, own = (torch.bincount(codes.flatten(), minlength=size) for codes in (train_codes, held_out_codes))
    bits, unigram = prior_bits(prior, held_out_codes, data.held_out.labels), unigram_bits(counts, held_out_codes)
    frequencies = own[own > 0].double() / own.sum()
    seen = spread(data.train, SHOWN)
    return {
        "images": {"train": len(data.train), "held_out": len(data.held_out), "judge": min(len(data.train), judged)},
        "grid": list(held_out_codes.shape[1:]),
        "codes_in_use": int((counts > 0).sum()),
        "recognised": {
            "real_held_out": judge.recognised(real, labels),
            "reconstructions": judge.recognised(reconstructions, labels),
            "images": len(shown),
        },
        "samples": samples,
        "samples_per_class": per_class,
        "bits_per_code": bits,
        "training_bits_per_code": prior_bits(prior, encode(vqvae, seen, torch.device("cpu")), seen.labels),
        "unigram_bits_per_code": unigram,
        "held_out_entropy_bits": float(-(frequencies * frequencies.log2()).sum()),  # the best that any unigram can do
        "margin_bits": unigram - bits,
    }


def training_seconds(metrics: Path, config: RunConfig) -> dict[str, float]:
    """Seconds of each stage, evaluations and pictures included, from the rates in a run's `metrics.jsonl`."""
    seconds, before = {"vqvae": 0.0, "prior": 0.0}, {"vqvae": 0, "prior": 0}
    for line in metrics.read_text().splitlines():
        values = json.loads(line)
        if "images_per_second" in values:
            stage, step = values["stage"], values["step"]
            images = (step - before[stage]) * getattr(config, stage).batch_size
            seconds[stage] += images / values["images_per_second"]
            before[stage] = step
    return {stage: round(value) for stage, value in seconds.items()}


def completions(vqvae: VQVAE, prior: PixelCNN, data: ImageData, seed: int) -> Tensor:
    """A grid: a held-out image of each class, then the images that keep the upper half of its codes."""
    assert data.held_out.labels is not None
    first = [int((data.held_out.labels == label).nonzero()[0]) for label in range(len(data.class_names))]
    images = data.held_out.select(torch.tensor(first))
    known = encode(vqvae, images, torch.device("cpu"))
    known[:, math.ceil(known.shape[1] / 2) :] = -1
    known = known.repeat_interleave(COMPLETIONS, dim=0)
    labels = images.labels.repeat_interleave(COMPLETIONS)  # type: ignore[union-attr]
    generator = torch.Generator().manual_seed(seed)
    codes = draw_codes(vqvae, prior, data.size, len(known), labels=labels, generator=generator, known=known)
    drawn = decode(vqvae, codes, data.size).unflatten(0, (-1, COMPLETIONS))
    return image_grid(torch.cat([images.batch(slice(None))[:, None], drawn], dim=1).flatten(0, 1), COMPLETIONS + 1)


def report(data: str, record: dict) -> str:
    """What is printed, with the least that it should be."""
    shares, count = record["recognised"], record["samples_per_class"]
    lines = [
        Figure(f"real held-out images recognised (of {shares['images']})", shares["real_held_out"], None, "%"),
        Figure(f"their reconstructions recognised (of {shares['images']})", shares["reconstructions"], None, "%"),
    ]
    for place, way in enumerate(record["samples"]):
        name = f"samples recognised, temperature {way['temperature']}, guidance {way['guidance']} ({count} a class)"
        lines.append(Figure(name, way["recognised"], LEAST.get(data) if place == 0 else None, "%"))
    bits = (
        f"a held-out code takes {record['bits_per_code']:.3f} bits under the prior, "
        f"{record['unigram_bits_per_code']:.3f} under the frequencies of the codes: "
        f"a margin of {record['margin_bits']:.3f} bits  {'PASS' if record['margin_bits'] > 0 else '—'}"
    )
    return "\n".join([*map(str, lines), bits])


def write(path: Path, data: str, record: dict) -> None:
    """Puts the record of a data set into the file, beside those of the others."""
    records = json.loads(path.read_text()) if path.exists() else {}
    records[data] = record
    path.write_text(json.dumps({name: records[name] for name in DATA if name in records}, indent=1) + "\n")


def settings(config: RunConfig) -> dict:
    """The configuration without the place of the images."""
    return {name: value for name, value in dataclasses.asdict(config).items() if name != "data"}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=DATA, required=True)
    parser.add_argument("images", type=Path, nargs="?", help="the folder of images of mnist and cifar")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file, which keeps the other data sets")
    parser.add_argument("--run", type=Path, help="the run directory; runs/quality_DATA when left out")
    parser.add_argument("--pictures", type=Path, help="a folder for the grids, such as docs")
    parser.add_argument("--samples-per-class", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    if (options.images is None) != (options.data == "digits"):
        parser.error("mnist and cifar need the folder of their images, and digits has none")
    torch.set_num_threads(options.threads)
    run = options.run or Path("runs") / f"quality_{options.data}"
    config = configuration(options.data, str(options.images), options.seed)
    trained = train_interruptibly(config, run, resume=holds_run(run))
    if not trained.finished or trained.prior is None:
        raise SystemExit(1)
    record: dict = {
        "command": f"python -m studies.prior_quality --data {options.data}"
        + ("" if options.images is None else " IMAGES")
        + f" --samples-per-class {options.samples_per_class} --seed {options.seed} --threads {options.threads}",
        "machine": machine.facts(options.threads),
        "seed": options.seed,
        "settings": settings(config),
        "training_seconds": training_seconds(run / "metrics.jsonl", config),
    }
    models = trained.vqvae, trained.prior, trained.data
    judged = JUDGED.get(options.data, len(trained.data.train))
    record |= measure(*models, judged=judged, per_class=options.samples_per_class, seed=options.seed)
    write(options.out, options.data, record)
    if options.pictures is not None:
        for name, steps in (("reconstructions", config.vqvae.steps), ("samples", config.prior.steps)):
            shutil.copyfile(
                run / "pictures" / f"{name}_{steps:06d}.png", options.pictures / f"{options.data}_{name}.png"
            )
        save_png(completions(*models, options.seed), options.pictures / f"{options.data}_completions.png")
    print(report(options.data, record))


if __name__ == "__main__":
    main()
