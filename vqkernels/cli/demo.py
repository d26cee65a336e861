"""`vqkernels demo`: trains, draws and measures on scanned digits, in a few minutes on one core."""

import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

from vqkernels.bench import machine
from vqkernels.cli.train import train_interruptibly
from vqkernels.training.acceleration import SpeedConfig
from vqkernels.training.checkpoint import holds_run
from vqkernels.training.config import PriorConfig, RunConfig, VQVAEConfig
from vqkernels.training.evaluation import evaluate_digits
from vqkernels.training.report import write_html
from vqkernels.training.run_report import run_document


@dataclass(frozen=True)
class DemoArguments:
    """Train a VQ-VAE and its prior on scanned digits, draw digits, and measure both."""

    out: Path = Path("runs/demo")
    """The run directory. The same command continues an interrupted demo."""
    seed: int = 0
    """Seed of weights, batches, held-out images and samples."""
    amp: Literal["auto", "off", "bfloat16"] = "auto"
    """bfloat16: mixed precision in the VQ-VAE (the prior is too narrow to gain). auto: bfloat16 if the CPU has AMX."""


def demo_config(seed: int = 0, amp: Literal["off", "bfloat16"] = "off") -> RunConfig:
    """The settings of the demo: 8x8 images, 4x4 codes out of 64; a fifth of the digits is held out."""
    return RunConfig(
        data="digits",
        held_out=0.2,
        seed=seed,
        vqvae=VQVAEConfig(
            hidden_channels=64,
            code_dim=16,
            codebook_size=64,
            downsamplings=1,
            ema_decay=0.99,
            steps=2000,
            batch_size=64,
            learning_rate=1e-3,
            schedule="cosine",
        ),
        prior=PriorConfig(
            hidden_channels=32,
            num_layers=6,
            head_channels=128,
            dropout=0.3,
            steps=1000,
            batch_size=64,
            learning_rate=1e-3,
            schedule="cosine",
        ),
        speed=SpeedConfig(amp=amp, amp_stages="autoencoder"),
        checkpoint_every=500,
        picture_every=500,
    )


def chosen_precision(amp: Literal["auto", "off", "bfloat16"]) -> Literal["off", "bfloat16"]:
    """The precision that `amp` means on this machine. auto: bfloat16 if the CPU has instructions for it (AMX)."""
    if amp != "auto":
        return amp
    capabilities: dict = getattr(torch.cpu, "get_capabilities", dict)()  # of torch 2.11 and newer
    return "bfloat16" if capabilities.get("amx_bf16") else "off"


def run(arguments: Sequence[str]) -> int:
    """Train, measure and print; returns 1 if interrupted."""
    parsed = tyro.cli(DemoArguments, prog="vqkernels demo", args=list(arguments))
    start = time.monotonic()
    torch.set_num_threads(1)  # such small models gain nothing from a second thread, and lose much on a busy machine
    amp = chosen_precision(parsed.amp)
    print(f"the VQ-VAE trains in {'float32' if amp == 'off' else 'bfloat16 with weights of float32'}")
    config = demo_config(parsed.seed, amp)
    trained = train_interruptibly(config, parsed.out, resume=holds_run(parsed.out))
    if not trained.finished or trained.prior is None:
        return 1
    print("\nJudged by a support vector machine trained on the real training digits:")
    figures = evaluate_digits(trained.vqvae, trained.prior, trained.data, seed=parsed.seed)
    for figure in figures:
        print(figure)
    seconds = time.monotonic() - start
    report = run_document(
        config,
        trained.vqvae,
        trained.prior,
        trained.data,
        figures,
        parsed.out / "metrics.jsonl",
        machine.facts(torch.get_num_threads()),
        shlex.join(["vqkernels", "demo", "--seed", str(parsed.seed), "--amp", amp]),
        seconds=seconds,
    )
    write_html(report, parsed.out / "report.html")
    print(f"\n{seconds:.0f} seconds in all; the report: {parsed.out / 'report.html'}; the pictures:")
    for picture in sorted((parsed.out / "pictures").iterdir()):
        print(f"  {picture}")
    return 0
