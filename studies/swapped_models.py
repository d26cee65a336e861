"""Whole models of other libraries before and after `swap_quantizers`: results, time, memory.

    python -m studies.swapped_models --out studies/results/swap.json --readme docs/swap.md

Every factory below makes a model as its library does, with random weights, and what a step of it takes. Each is
measured as `vqkernels swap` does, plus its quantizers alone on the rows that reach them in a step. The table shows what
got slower or larger, too.
"""

import argparse
import json
import time
import warnings
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vqkernels.bench import machine, model_memory
from vqkernels.bench.model_pair import ModelPair
from vqkernels.bench.report import markdown, put
from vqkernels.bench.timing import Timing, interleave
from vqkernels.bench.user_model import load
from vqkernels.models import VQVAE

MARKS = ("<!-- swapped models -->", "<!-- end of swapped models -->")
Made = tuple[nn.Module, Tensor] | tuple[nn.Module, Tensor, Callable[[Any], Tensor]]

IMAGES, CODE_DIM = 128, 64  # 128 images of 32 x 32, 8 x 8 codes each


def vqvae(codebook_size: int) -> Made:
    """The paper's encoder and decoder, 128 channels, around lucidrains' layer with its defaults: moving averages and
    rotation trick."""
    from vector_quantize_pytorch import VectorQuantize

    model = VQVAE(3, hidden_channels=128, code_dim=CODE_DIM, codebook_size=1)
    model.quantizer = VectorQuantize(dim=CODE_DIM, codebook_size=codebook_size, accept_image_fmap=True)
    images = torch.rand(IMAGES, 3, 32, 32) - 0.5
    return model, images, lambda output: output[2].total


def vqvae_8192() -> Made:
    return vqvae(8192)


def vqvae_1024() -> Made:
    return vqvae(1024)


class _Trained(nn.Module):
    """diffusers' VQModel with what its training needs: the image and the quantizer's loss."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        output = self.model(images)
        return F.mse_loss(output.sample, images), output.commit_loss


def vqmodel() -> Made:
    from diffusers import VQModel

    model = VQModel(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 64),
        latent_channels=64,
        num_vq_embeddings=8192,
        norm_num_groups=32,
    )
    return _Trained(model), torch.rand(4, 3, 64, 64) - 0.5, lambda output: output[0] + output[1].mean()


class _Coder(nn.Module):
    """A codec of transformers as it is used: encode, then decode, without gradients."""

    def __init__(self, model: nn.Module, **options: Any) -> None:
        super().__init__()
        self.model, self.options = model, options

    @torch.no_grad()
    def forward(self, audio: Tensor) -> tuple[Tensor, Tensor]:
        encoded = self.model.encode(audio, **self.options)
        scales = () if getattr(encoded, "audio_scales", None) is None else (encoded.audio_scales,)
        return encoded.audio_codes, self.model.decode(encoded.audio_codes, *scales).audio_values


def encodec() -> Made:
    from transformers import EncodecConfig, EncodecModel

    model = EncodecModel(EncodecConfig())
    for layer in model.quantizer.layers:
        nn.init.normal_(layer.codebook.embed)  # zeros until a checkpoint is loaded
    return _Coder(model, bandwidth=6.0), torch.randn(4, 1, 24000)


def mimi() -> Made:
    from transformers import MimiConfig, MimiModel

    return _Coder(MimiModel(MimiConfig()), num_quantizers=32), torch.randn(2, 1, 24000)


def dac() -> Made:
    from transformers import DacConfig, DacModel

    model = DacModel(DacConfig(encoder_hidden_size=32, decoder_hidden_size=256))
    return model, torch.randn(1, 1, 16000), lambda output: output.loss.sum() + output.audio_values.square().mean()


# Of each: what it is, the class that is swapped, K.
MODELS: dict[str, tuple[str, str, int]] = {
    "vqvae_8192": ("VQ-VAE with lucidrains' layer", "VectorQuantize", 8192),
    "vqvae_1024": ("VQ-VAE with lucidrains' layer", "VectorQuantize", 1024),
    "vqmodel": ("diffusers VQModel", "VectorQuantizer", 8192),
    "encodec": ("transformers EncodecModel, 6 kbit/s", "EncodecVectorQuantization", 1024),
    "dac": ("transformers DacModel", "DacVectorQuantize", 1024),
    "mimi": ("transformers MimiModel, 32 codebooks", "MimiVectorQuantization", 2048),
}


def measure(name: str, threads: int, seconds: float, least: int, most: int) -> dict[str, Any]:
    """The record of one model."""
    spec = f"studies.swapped_models:{name}"
    torch.manual_seed(0)
    pair = ModelPair(load(spec), lambda: load(spec))
    compared, calls = pair.compare(), pair.calls()
    differing, indices = pair.differing(calls)
    holders = {"before": pair.original, "after": pair.swapped}
    steps = {key: pair.step(holder) for key, holder in holders.items()}
    whole, _ = interleave(steps, threads, 0.6 * seconds, least, most)
    alone, _ = interleave({k: pair.alone(h, calls) for k, h in holders.items()}, threads, 0.4 * seconds, least, most)
    peaks = model_memory.measure(spec, threads)
    title, layer, size = MODELS[name]
    return {
        "name": name,
        "title": title,
        "layer": layer,
        "layers": len({call.path for call in calls}),
        "left": [str(entry) for entry in pair.report.left],
        "step": "training step" if pair.trains else "encode and decode",
        "rows": max(call.indices for call in calls),
        "codebook_size": size,
        "indices_differing": differing,
        "indices": indices,
        "largest_difference": {key: found.floats for key, found in compared.items()},
        "quantizer_ms": {key: _ms(timing) for key, timing in alone.items()},
        "whole_ms": {key: _ms(timing) for key, timing in whole.items()},
        "quantizer_mb": dict(zip(holders, peaks.quantizers, strict=True)) if peaks else None,
        "whole_mb": dict(zip(holders, peaks.step, strict=True)) if peaks else None,
    }


def _ms(timing: Timing) -> dict[str, float]:
    return {key: round(1e3 * getattr(timing, key), 4) for key in ("median", "low", "high")} | {"rounds": timing.rounds}


_TIMES = {"the quantizers are": "quantizer_ms", "a step is": "whole_ms"}
_HEAD = (
    "model",
    "N, K",
    "step",
    "indices that differ",
    "largest difference",
    "quantizers alone, ms",
    "whole step, ms",
    "quantizers' peak, N·K·4 bytes",
    "where we lose",
)


def gain(record: dict[str, Any], what: str) -> float:
    """Median before over median after."""
    return record[what]["before"]["median"] / record[what]["after"]["median"]


def units(record: dict[str, Any]) -> tuple[float, float] | None:
    """Peak memory of the quantizers before and after, in matrices of N rows times K codes of 4 bytes."""
    if record["quantizer_mb"] is None:
        return None
    matrix = record["rows"] * record["codebook_size"] * 4 / 1e6
    return record["quantizer_mb"]["before"] / matrix, record["quantizer_mb"]["after"] / matrix


def losses(record: dict[str, Any]) -> list[str]:
    """What is slower or larger after the swap."""
    found = [f"{told} {1 / gain(record, what):.2f}x slower" for told, what in _TIMES.items() if gain(record, what) < 1]
    for told, what in (("the quantizers need", "quantizer_mb"), ("a step needs", "whole_mb")):
        more = record[what]["after"] - record[what]["before"] if record[what] else 0.0
        found += [f"{told} {more:.0f} MB more"] if more > 1 else []
    return found


def table(result: dict[str, Any]) -> str:
    """Markdown: one line per model, losing cells included, and where the figures come from."""
    rows = []
    for x in result["models"]:
        times = []
        for what in ("quantizer_ms", "whole_ms"):
            before, after = (x[what][key]["median"] for key in ("before", "after"))
            times.append(f"{_figure(before)} → {_figure(after)}, **{before / after:.2f}x**")
        peaks = units(x)
        rows.append(
            [
                x["title"],
                f"{x['rows']}, {x['codebook_size']}" + (f", {x['layers']} layers" if x["layers"] > 1 else ""),
                x["step"],
                f"{x['indices_differing']} of {x['indices']}",
                f"{max(x['largest_difference'].values()):.0e}",
                *times,
                f"{peaks[0]:.2f} → {peaks[1]:.2f}" if peaks else "not measured",
                "; ".join(losses(x)) or "nowhere",
            ]
        )
    facts = result["facts"]
    machine_line = f"{facts['processor']}, {facts['threads']} threads, {facts['SIMD level']}, torch {facts['torch']}"
    versions = ", ".join(f"{key} {facts[key]}" for key in ("vector-quantize-pytorch", "diffusers", "transformers"))
    source = f"{machine_line}, {versions}, commit {facts['commit']}; medians, before → after."
    return "\n".join([source, "", *markdown(_HEAD, rows, padded=False)])


def _figure(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a JSON file")
    parser.add_argument("--readme", type=Path, help="a file whose text between two marks becomes the table of this run")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--seconds", type=float, default=25.0, help="of timing per model, about")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="two rounds: whether it runs, not how fast")
    options = parser.parse_args(arguments)
    if options.readme is not None:
        put(options.readme, MARKS)
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", category=FutureWarning)  # torch's older weight norm
    least, most = (2, 2) if options.quick else (5, 25)
    models = []
    for name in options.models:
        begun = time.perf_counter()
        models.append(measure(name, options.threads, options.seconds, least, most))
        told = f"quantizers {gain(models[-1], 'quantizer_ms'):.2f}x, step {gain(models[-1], 'whole_ms'):.2f}x"
        print(f"{name}: {told}; {time.perf_counter() - begun:.0f} s", flush=True)
    facts = machine.facts(options.threads) | {"transformers": metadata.version("transformers")}
    result = {"facts": facts, "models": models}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))
    if options.readme is not None:
        put(options.readme, MARKS, table(result))


if __name__ == "__main__":
    main()
