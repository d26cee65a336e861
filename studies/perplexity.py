"""How much of a codebook stays in use: the same VQ-VAE on images with our layer and with lucidrains', equal budgets.

    python -m studies.perplexity IMAGES --out studies/results/perplexity

IMAGES is a folder with train/ and test/, as `vqkernels train` reads it. Every contender starts from the same encoder
and decoder and sees the same batches. One JSON file per contender (a run that was cut short goes on at its last
checkpoint), perplexity.json with all of them, and perplexity.png.

Perplexity is exp of the entropy of the codes' frequencies: over all test images every `--every` steps and at the end,
which is what the plot shows, and over one training batch, which is smaller as a batch has few rows per code.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import vqkernels
from vqkernels.models import VQVAE
from vqkernels.nn import VectorQuantizer
from vqkernels.nn.metrics import perplexity
from vqkernels.training.data import load_images

CODE_DIM, HIDDEN, BATCH, LEARNING_RATE = 64, 64, 64, 3e-4
RECOMMENDED = dict(ema_decay=0.99, init="kmeans", revive="rows")  # those of docs/layers.md


class Lucidrains(nn.Module):
    """Their layer with our signature: images, quantized by codes on the channel axis."""

    def __init__(self, codebook_size: int, **arguments: object) -> None:
        super().__init__()
        from vector_quantize_pytorch import VectorQuantize

        self.layer = VectorQuantize(dim=CODE_DIM, codebook_size=codebook_size, accept_image_fmap=True, **arguments)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        quantized, indices, loss = self.layer(z)
        return quantized, indices, loss.sum()


CONTENDERS: dict[str, tuple[str, Callable[[int], nn.Module]]] = {
    "vqkernels": (
        "vqkernels, recommended settings",
        lambda size: VectorQuantizer(CODE_DIM, size, channel_dim=1, **RECOMMENDED),
    ),
    "lucidrains": ("lucidrains, defaults", lambda size: Lucidrains(size)),
    "lucidrains_recommended": (
        "lucidrains, kmeans_init and threshold_ema_dead_code=2",
        lambda size: Lucidrains(size, kmeans_init=True, threshold_ema_dead_code=2),
    ),
}


def build(name: str, codebook_size: int, seed: int) -> VQVAE:
    """The model of a contender; encoder and decoder are the same for all."""
    torch.manual_seed(seed)
    model = VQVAE(3, hidden_channels=HIDDEN, code_dim=CODE_DIM, codebook_size=codebook_size)
    torch.manual_seed(seed)
    model.quantizer = CONTENDERS[name][1](codebook_size)
    return model


def scaled(pixels: Tensor) -> Tensor:
    return pixels.to(torch.float32) / 255 - 0.5


@torch.no_grad()
def evaluate(model: VQVAE, pixels: Tensor, codebook_size: int) -> dict[str, float]:
    """Perplexity, codes in use and reconstruction error over all images."""
    model.eval()
    counts, error = torch.zeros(codebook_size, dtype=torch.int64), 0.0
    for part in pixels.split(250):
        x = scaled(part)
        reconstruction, indices, _ = model(x)
        counts += torch.bincount(indices.reshape(-1), minlength=codebook_size)
        error += float(F.mse_loss(reconstruction, x, reduction="sum"))
    model.train()
    return {
        "perplexity": float(perplexity(counts)),
        "codes_in_use": int((counts > 0).sum()),
        "reconstruction_error": error / pixels.numel(),
    }


def write(path: Path, text: str) -> None:
    """Replaces a file whole or not at all."""
    part = path.with_suffix(path.suffix + ".part")
    part.write_text(text)
    os.replace(part, path)


def train(name: str, images: Tensor, held_out: Tensor, options: argparse.Namespace) -> dict:
    """Trains a contender, going on where an earlier run was cut short; its record."""
    record_path, state_path = options.out / f"{name}.json", options.out / f"{name}.pt"
    budget = {key: getattr(options, key) for key in ("steps", "codebook_size", "seed", "every")}
    budget |= {"images": len(images), "held_out": len(held_out)}
    if record_path.exists():
        record = json.loads(record_path.read_text())
        if record["budget"] == budget:
            print(f"{name}: already done", flush=True)
            return record
    model = build(name, options.codebook_size, options.seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    curve: list[dict] = []
    step, seconds = 0, 0.0
    if state_path.exists():
        state = torch.load(state_path, weights_only=True)
        if state["budget"] == budget:
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            torch.set_rng_state(state["generator"])
            step, seconds, curve = state["step"], state["seconds"], state["curve"]
            print(f"{name}: goes on at step {step}", flush=True)
    while step < options.steps:
        began = time.perf_counter()
        generator = torch.Generator().manual_seed(options.seed * 1_000_003 + step)  # the same batches for everyone
        x = scaled(images[torch.randint(len(images), (BATCH,), generator=generator)])
        _, indices, losses = model(x)
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
        step += 1
        seconds += time.perf_counter() - began
        if step % 50 == 0 or step == options.steps:
            left = (options.steps - step) * seconds / step
            print(
                f"{name}: step {step}/{options.steps}, loss {float(losses.total.detach()):.4f}, {left:.0f} s left",
                flush=True,
            )
        if step % options.every == 0 or step == options.steps:
            counts = torch.bincount(indices.reshape(-1), minlength=options.codebook_size)
            curve.append({"step": step, "batch_perplexity": float(perplexity(counts))})
            curve[-1] |= evaluate(model, held_out, options.codebook_size)
            print(f"{name}: perplexity {curve[-1]['perplexity']:.1f} of {options.codebook_size}", flush=True)
            state = {"budget": budget, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
            state |= {"generator": torch.get_rng_state(), "step": step, "seconds": seconds, "curve": curve}
            torch.save(state, state_path.with_suffix(".part"))
            os.replace(state_path.with_suffix(".part"), state_path)
    record = {"name": name, "title": CONTENDERS[name][0], "budget": budget, "seconds": seconds, "curve": curve}
    write(record_path, json.dumps(record, indent=1) + "\n")
    state_path.unlink(missing_ok=True)
    return record


def draw(path: Path, records: list[dict], codebook_size: int) -> None:
    """Perplexity and reconstruction error on the held-out images over the steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for record in records:
        steps = [point["step"] for point in record["curve"]]
        left.plot(steps, [point["perplexity"] for point in record["curve"]], marker=".", label=record["title"])
        right.plot(steps, [point["reconstruction_error"] for point in record["curve"]], marker=".")
    left.axhline(0.6 * codebook_size, color="grey", linestyle=":", label=f"60 % of K = {codebook_size}")
    left.set(xlabel="step", ylabel="perplexity of the codes, held-out images", ylim=(0, codebook_size))
    right.set(xlabel="step", ylabel="mean squared error, held-out images", yscale="log")
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    figure.savefig(path, dpi=130)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, help="a folder with train/ and test/")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--codebook-size", type=int, default=1024)
    parser.add_argument("--every", type=int, default=100, help="steps between two evaluations")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    data = load_images(str(options.images), color="rgb", held_out=0.0)
    if not len(data.held_out):
        parser.error(f"{options.images} has no test/ beside train/")
    records = [train(name, data.train.pixels, data.held_out.pixels, options) for name in options.contenders]
    result = {
        "torch": torch.__version__,
        "vqkernels": vqkernels.__version__,
        "machine": platform.machine(),
        "batch": BATCH,
        "learning_rate": LEARNING_RATE,
        "contenders": records,
    }
    write(options.out / "perplexity.json", json.dumps(result, indent=1) + "\n")
    draw(options.out / "perplexity.png", records, options.codebook_size)
    for record in records:
        last = record["curve"][-1]
        share = last["perplexity"] / options.codebook_size
        told = f"perplexity {last['perplexity']:.1f} ({share:.0%} of K), {last['codes_in_use']} codes used"
        print(f"{record['title']}: {told}")


if __name__ == "__main__":
    main()
