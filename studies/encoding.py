"""Whether `vqkernels encode` keeps up with its own encoder network.

    python -m studies.encoding --out studies/results/encoding.json [--jpegs FOLDER]

The network alone: the encoder on batches that lie in memory as it takes them. `encode`: everything between a source and
shards on disk (reading, decoding, scaling, the network, the search, writing), from an .npy file and from a folder of
JPEGs, those of `--jpegs` or smooth random ones. In every round each runs once over the same number of images; the share
is the median over the rounds of the network's time over that of `encode`. Beside it stand the seconds that the parts
alone take. Before anything is timed the codes on disk must be those of the model, in the order of the images. Writes
JSON and, beside it, a Markdown table.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vqkernels.bench import machine
from vqkernels.bench.report import markdown
from vqkernels.bench.timing import take_turns
from vqkernels.models import VQVAE
from vqkernels.training.acceleration import SpeedConfig, place
from vqkernels.training.code_shards import CodesDirectory, CodesIndex
from vqkernels.training.data import open_source
from vqkernels.training.images import Source
from vqkernels.training.shard_encoding import CHUNK, encode_shards

CPU = torch.device("cpu")
SIDE = 32
GOAL = 0.9


def smooth_images(count: int) -> np.ndarray:
    """(count, SIDE, SIDE, 3) uint8 without the noise that makes a JPEG long."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 5, 5, generator=generator)
    fine = torch.nn.functional.interpolate(coarse, (SIDE, SIDE), mode="bicubic").clamp(0, 1)
    return (fine * 255).byte().permute(0, 2, 3, 1).numpy()


def sources(folder: Path, count: int, jpegs: Path | None) -> dict[str, Source]:
    """The same images in an .npy file and as JPEGs, or the JPEGs of a folder."""
    images = smooth_images(count)
    np.save(folder / "images.npy", images)
    if jpegs is None:
        jpegs = folder / "jpegs"
        jpegs.mkdir()
        for number, image in enumerate(images):
            Image.fromarray(image).save(jpegs / f"{number:08d}.jpg", quality=90)
    found = {"npy": open_source(str(folder / "images.npy")).train, "jpeg": open_source(str(jpegs), color="rgb").train}
    if found["jpeg"].shape != (3, SIDE, SIDE) or len(found["jpeg"]) < count:
        raise SystemExit(f"--jpegs must hold at least {count} images of {SIDE}x{SIDE}")
    return found


class Encoding:
    """`encode` of the first `count` images of a source, each time into a new directory."""

    def __init__(self, model: VQVAE, source: Source, count: int, shard_images: int, folder: Path) -> None:
        self.model, self.source, self.folder, self.runs = model, source, folder, 0
        height, width = source.shape[1:]
        self.index = CodesIndex(
            "model", "run", "data", "all", count, source.shape, model.quantizer.codebook_size,
            model.latent_size((height, width)), (), False, shard_images, "npy",
        )  # fmt: skip

    def __call__(self) -> CodesDirectory:
        self.runs += 1
        directory = CodesDirectory(self.folder / f"{id(self)}-{self.runs}", self.index)
        encode_shards(self.model, self.source, directory, CPU)
        return directory

    def read(self) -> None:
        for start in range(0, self.index.images, CHUNK):
            self.source.read(start, min(start + CHUNK, self.index.images))

    def check(self) -> None:
        """The codes on disk are those of the model, image by image."""
        directory = self()
        found = torch.cat([directory.read(shard).codes for shard in range(self.index.shards)])
        expected = torch.cat(
            [
                self.model.encode(self.source.read(start, min(start + CHUNK, len(found))).batch(slice(None)))
                for start in range(0, len(found), CHUNK)
            ]
        )
        if not torch.equal(found, expected):
            raise SystemExit("the codes on disk are not those of the model: nothing is timed")


def measure(count: int, channels: int, rounds: int, jpegs: Path | None) -> dict[str, Any]:
    """Seconds of everyone in every round, and the shares."""
    torch.manual_seed(0)
    model = VQVAE(3, hidden_channels=channels, code_dim=64, codebook_size=512).eval()
    place(model, SpeedConfig(), CPU)
    batch = torch.rand(CHUNK, 3, SIDE, SIDE).to(memory_format=torch.channels_last) * 2 - 1

    @torch.no_grad()
    def network() -> Tensor:
        for start in range(0, count, CHUNK):
            z = model.encoder(batch[: min(CHUNK, count - start)])
        return z

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        encodings = {
            kind: Encoding(model, source, count, 4 * CHUNK, folder)
            for kind, source in sources(folder, count, jpegs).items()
        }
        for encoding in encodings.values():
            encoding.check()
        z = network()
        parts: dict[str, Callable[[], object]] = {f"reading {kind}": x.read for kind, x in encodings.items()}
        with torch.no_grad():
            parts["search"] = lambda: [model.quantizer(z) for _ in range(0, count, CHUNK)]
            contenders: dict[str, Callable[[], object]] = {"network": network, **encodings, **parts}
            samples = take_turns(contenders, dict.fromkeys(contenders, rounds))
    shares = {
        kind: statistics.median(x / y for x, y in zip(samples["network"], samples[kind], strict=True))
        for kind in encodings
    }
    return {
        "images": count,
        "channels": channels,
        "jpegs": "given" if jpegs else "made",
        "seconds": {name: statistics.median(values) for name, values in samples.items()},
        "samples": samples,
        "share": shares,
    }


def table(result: dict[str, Any]) -> str:
    """Markdown: the throughputs, what the parts cost alone, and the verdicts."""
    facts, told = result["machine"], result["encoding"]
    names = {"network": "the encoder network alone", "npy": "`encode`, .npy", "jpeg": "`encode`, JPEGs"}
    rows = []
    for name, value in told["seconds"].items():
        share = f"{told['share'][name]:.0%}" if name in told["share"] else ""
        rows.append([names.get(name, name + " alone"), f"{value:.2f}", f"{told['images'] / value:.0f}", share])
    lines = [
        f"{facts['processor']}, {facts['threads']} threads, torch {facts['torch']}, commit {facts['commit']}; "
        f"{told['images']} images of {SIDE}×{SIDE}, {told['channels']} channels, K = 512; medians.",
        "",
        *markdown(("", "seconds", "images/s", "share of the network"), rows, padded=False),
        "",
    ]
    for kind, share in told["share"].items():
        lines.append(f"- {kind}: {share:.0%} (goal {GOAL:.0%}): {'met' if share >= GOAL else 'missed'}")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file; the .md goes beside it")
    parser.add_argument("--jpegs", type=Path, help="a folder of JPEGs of 32x32, instead of smooth random ones")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--images", type=int, default=4096)
    parser.add_argument("--channels", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="few images and a small model, to see that it runs")
    options = parser.parse_args(arguments)
    if options.quick:
        options.images, options.channels, options.rounds = 600, 8, 1
    torch.set_num_threads(options.threads)
    told = measure(options.images, options.channels, options.rounds, options.jpegs)
    result = {"machine": machine.facts(options.threads), "encoding": told}
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    options.out.with_suffix(".md").write_text(table(result))
    print(table(result))


if __name__ == "__main__":
    main()
