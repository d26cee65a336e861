"""`vqkernels decode`: turns codes into images, as one .npy file or a folder of PNGs."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
import tyro
from numpy.lib.format import write_array_header_1_0
from torch import Tensor
from tqdm import tqdm

from vqkernels.models import VQVAE
from vqkernels.training.checkpoint import write_atomically
from vqkernels.training.code_shards import CodesDirectory, fingerprint
from vqkernels.training.errors import UserError
from vqkernels.training.model_building import load_vqvae, pick_device
from vqkernels.training.pictures import save_png
from vqkernels.training.shard_encoding import decode_shards


@dataclass(frozen=True)
class DecodeArguments:
    """Turn the codes of 'vqkernels encode' into images."""

    run: Path
    """The run directory of the model that made the codes."""
    codes: Path
    """The directory that 'vqkernels encode' wrote."""
    out: Path
    """A .npy file, bytes (N, H, W, C); or a new folder for PNGs, with one sub-folder per class."""
    device: str = "auto"
    """auto: cuda if there is a GPU, else cpu."""


def run(arguments: Sequence[str]) -> int:
    """Parse the arguments and decode."""
    parsed = tyro.cli(DecodeArguments, prog="vqkernels decode", args=list(arguments))
    if not parsed.out.parent.is_dir():
        raise UserError(f"the folder {parsed.out.parent} for --out does not exist")
    device = pick_device(parsed.device)
    vqvae, export = load_vqvae(parsed.run, device)
    codes = CodesDirectory(parsed.codes)
    if codes.index.model != fingerprint(vqvae):
        raise UserError(f"the codes in {parsed.codes} are of another model: that of the run '{codes.index.run}'")
    if vqvae.latent_size(codes.index.shape[1:]) != codes.index.codes or codes.index.shape[0] != export.images.channels:
        raise UserError(f"{parsed.codes / 'index.json'} does not fit the model: images of its shape have other codes")
    missing = codes.missing()
    if missing:
        raise UserError(
            f"{parsed.codes} is incomplete: {len(missing)} of {codes.index.shards} shards are missing; finish it with "
            "'vqkernels encode'"
        )
    if parsed.out.suffix == ".npy":
        _to_array(vqvae, codes, parsed.out, device)
    elif parsed.out.suffix:
        raise UserError(f"--out must be a .npy file or a folder, but is {parsed.out}")
    else:
        _to_folder(vqvae, codes, parsed.out, device)
    print(f"{codes.index.images} images are in {parsed.out}")
    return 0


def _to_array(vqvae: VQVAE, codes: CodesDirectory, out: Path, device: torch.device) -> None:
    channels, height, width = codes.index.shape
    header = {"descr": "|u1", "fortran_order": False, "shape": (codes.index.images, height, width, channels)}

    def write(file: BinaryIO) -> None:
        write_array_header_1_0(file, header)
        for images, _ in _pieces(vqvae, codes, device):
            file.write(images.permute(0, 2, 3, 1).contiguous().numpy().data)

    write_atomically(out, write)


def _to_folder(vqvae: VQVAE, codes: CodesDirectory, out: Path, device: torch.device) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is not empty; choose a new folder")
    number = 0
    for images, labels in _pieces(vqvae, codes, device):
        for position, image in enumerate(images):
            folder = out if labels is None else out / _plain(codes.index.class_names[int(labels[position])])
            folder.mkdir(parents=True, exist_ok=True)
            save_png(image, folder / f"{number:08d}.png")
            number += 1


def _plain(name: str) -> str:
    """A class name as the name of one folder. An index may come from a stranger, with any characters in its names."""
    plain = re.sub(r"[/\\\0]", "_", name)
    return plain if plain not in ("", ".", "..") else "_"


def _pieces(vqvae: VQVAE, codes: CodesDirectory, device: torch.device) -> Iterator[tuple[Tensor, Tensor | None]]:
    with tqdm(total=codes.index.images, desc="decoding", unit="image", leave=False, disable=None) as bar:
        for images, labels in decode_shards(vqvae, codes, device):
            yield images, labels
            bar.update(len(images))
