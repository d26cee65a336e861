"""The same training with a peer's quantizer and with it swapped: two curves that should be one.

    python -m studies.swap_curves IMAGES --out studies/results/swap_curves.json --plot docs/swap_curves.png

IMAGES is a folder of images, as `vqkernels train` reads it. The paper's VQ-VAE is trained with lucidrains' layer
(moving averages and rotation trick, its defaults) and with that of diffusers (codes trained by gradient), then again
from the same start, on the same batches, after `swap_quantizers`. Rounding alone tells the runs apart, and training
magnifies it: losses should agree to float noise at first and stay within two percent at the end. How much training
magnifies rounding is measured, too: the peer's run is repeated with one weight moved by one unit in its last place.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from vqkernels import swap_quantizers
from vqkernels.bench import machine
from vqkernels.models import VQVAE
from vqkernels.training.data import load_images

HIDDEN, CODE_DIM, LEARNING_RATE = 64, 64, 3e-4
FIRST, LAST = 5, 20  # steps over which the start is compared, and the end is averaged


class Diffusers(nn.Module):
    """The layer of diffusers' VQModel, results in our order."""

    def __init__(self, codebook_size: int) -> None:
        super().__init__()
        from diffusers.models.autoencoders.vae import VectorQuantizer

        self.layer = VectorQuantizer(codebook_size, CODE_DIM, beta=0.25, legacy=False, sane_index_shape=True)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        quantized, loss, (_, _, indices) = self.layer(z)
        return quantized, indices, loss


def lucidrains(codebook_size: int) -> nn.Module:
    from vector_quantize_pytorch import VectorQuantize

    return VectorQuantize(dim=CODE_DIM, codebook_size=codebook_size, accept_image_fmap=True)


PEERS: dict[str, tuple[str, Callable[[int], nn.Module]]] = {
    "lucidrains": ("lucidrains, moving averages and rotation trick", lucidrains),
    "diffusers": ("diffusers, codes trained by gradient", Diffusers),
}


def train(
    name: str, images: Tensor, options: argparse.Namespace, *, swapped: bool = False, moved: bool = False
) -> list[float]:
    """The loss of every step: of the peer, with it swapped, or with one weight moved by one unit in its last place."""
    torch.manual_seed(options.seed)
    model = VQVAE(3, hidden_channels=HIDDEN, code_dim=CODE_DIM, codebook_size=1)
    model.quantizer = PEERS[name][1](options.codebook_size)
    if moved:
        with torch.no_grad():
            weight = next(model.parameters()).view(-1)[:1]
            weight.copy_(torch.nextafter(weight, weight + 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    if swapped:  # after the optimizer was made: it goes on with the same parameters
        swap_quantizers(model, strict=True)
    losses: list[float] = []
    for step in range(options.steps):
        generator = torch.Generator().manual_seed(options.seed * 1_000_003 + step)
        x = images[torch.randint(len(images), (options.batch,), generator=generator)].to(torch.float32) / 255 - 0.5
        loss = model(x)[2].total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def apart(theirs: list[float], ours: list[float]) -> list[float]:
    """Relative difference of the losses of every step."""
    return [abs(a - b) / abs(a) for a, b in zip(theirs, ours, strict=True)]


def record(name: str, theirs: list[float], ours: list[float], moved: list[float]) -> dict:
    """The curves, the largest difference of the first steps, and that of the means over the last, ours and the peer's
    own."""
    ends = [sum(curve[-LAST:]) / len(curve[-LAST:]) for curve in (theirs, ours, moved)]
    return {
        "name": name,
        "title": PEERS[name][0],
        "first_steps": max(apart(theirs, ours)[:FIRST]),
        "end": abs(ends[1] - ends[0]) / ends[0],
        "end_of_moved": abs(ends[2] - ends[0]) / ends[0],
        "theirs": theirs,
        "ours": ours,
        "moved": moved,
    }


def draw(path: Path, records: list[dict]) -> None:
    """Above the losses, theirs and ours; below how far apart they are, and the peer from itself."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6), layout="constrained")
    axes = figure.subplots(2, len(records), sharex=True, squeeze=False, height_ratios=(2, 1))
    for (upper, lower), x in zip(axes.T, records, strict=True):
        steps = range(1, len(x["theirs"]) + 1)
        upper.plot(steps, x["theirs"], color="tab:orange", linewidth=4, alpha=0.5, label="before the swap")
        upper.plot(steps, x["ours"], color="black", linewidth=1, label="after the swap")
        upper.set(title=x["title"], ylabel="loss", yscale="log")
        upper.legend()
        # Equal losses have no place on a logarithmic axis: they are drawn at its foot.
        for key, color, told in (
            ("moved", "tab:orange", "the peer, one weight moved by one ulp"),
            ("ours", "black", "ours"),
        ):
            distances = [max(y, 1e-8) for y in apart(x["theirs"], x[key])]
            lower.plot(steps, distances, color=color, linewidth=1, label=told)
        lower.axhline(0.02, color="grey", linestyle=":", label="2 %")
        lower.set(xlabel="step", ylabel="relative difference", yscale="log", ylim=(5e-9, 1))
        lower.legend(loc="lower right", fontsize=8)
    figure.savefig(path, dpi=110)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, help="a folder of images")
    parser.add_argument("--out", type=Path, required=True, help="a JSON file")
    parser.add_argument("--plot", type=Path, required=True, help="a PNG file")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--codebook-size", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    images = load_images(str(options.images), color="rgb", held_out=0.0).train.pixels
    records = []
    for name in options.peers:
        theirs, ours = train(name, images, options), train(name, images, options, swapped=True)
        records.append(record(name, theirs, ours, train(name, images, options, moved=True)))
        told = f"first {FIRST} steps within {records[-1]['first_steps']:.1e}, end within {records[-1]['end']:.2%}"
        told += f", the peer from itself {records[-1]['end_of_moved']:.2%}"
        print(f"{name}: {told}", flush=True)
    chosen = {key: getattr(options, key) for key in ("steps", "batch", "codebook_size", "seed")}
    result = {"facts": machine.facts(torch.get_num_threads()), "images": len(images), **chosen, "peers": records}
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    draw(options.plot, records)


if __name__ == "__main__":
    main()
