"""A data set as codes on disk: shards of grids, and an index that names the model and the images.

    index.json               what the codes are, written first; every process writes the same bytes
    codes-000000.npy         (n, h, w) uint16, or int32 where the codebook has more than 65,536 codes
    labels-000000.npy        (n,) int64, where the images have labels
    codes-000000.parquet     instead of both, with --container parquet: columns `codes` (a list of h * w) and `label`

Shard k holds images k * shard_images and following, in the order of the source, so which shards are missing can be seen
from the directory alone: a killed run goes on where it was, ranks share the shards without talking to one another, and
no image can be lost or written twice. A shard is moved into place when it is whole.
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vqkernels.models import VQVAE
from vqkernels.training.checkpoint import write_atomically
from vqkernels.training.errors import UserError

FORMAT = "vqkernels-codes-1"
Container = Literal["npy", "parquet"]


@dataclass(frozen=True)
class CodesIndex:
    """What a directory of codes holds."""

    model: str  # fingerprint of the weights of the VQ-VAE
    run: str  # name of the run directory it came from
    data: str
    split: str
    images: int
    shape: tuple[int, int, int]  # channels, height and width of the images
    codebook_size: int
    codes: tuple[int, int]  # height and width of a grid
    class_names: tuple[str, ...]  # empty: no labels
    labelled: bool
    shard_images: int
    container: Container

    @property
    def shards(self) -> int:
        return -(-self.images // self.shard_images)

    def bounds(self, shard: int) -> tuple[int, int]:
        """First image of a shard, and the one after its last."""
        return shard * self.shard_images, min((shard + 1) * self.shard_images, self.images)

    @property
    def dtype(self) -> Any:
        return np.uint16 if self.codebook_size <= 1 << 16 else np.int32


class Codes(NamedTuple):
    """Grids (n, h, w) int64, and labels (n,) int64 or None."""

    codes: Tensor
    labels: Tensor | None


class CodesDirectory:
    """The shards of one data set.

    Args:
        path: the directory.
        index: what is to be written there; None to read what is there.

    Raises:
        UserError: the directory holds something else, or codes of another model or other images; or nothing to read.
    """

    def __init__(self, path: Path, index: CodesIndex | None = None) -> None:
        self.path, file = path, path / "index.json"
        others = path.exists() and (
            not path.is_dir() or any(not x.name.startswith(".") and x != file for x in path.iterdir())
        )
        # Looked at after the rest: another process that begins now writes it before any shard.
        found = _read_index(file) if file.exists() else None
        if index is None:
            if found is None:
                raise UserError(f"{path} holds no codes: there is no index.json")
            self.index = found
            return
        if found is None:
            if others:
                raise UserError(f"{path} is not empty and holds no codes; choose a new directory")
            path.mkdir(parents=True, exist_ok=True)
            content = json.dumps({"format": FORMAT, **dataclasses.asdict(index)}, indent=1) + "\n"
            write_atomically(file, lambda out: out.write(content.encode()))
        elif found != index:
            names = [x.name for x in dataclasses.fields(index) if getattr(index, x.name) != getattr(found, x.name)]
            raise UserError(f"{path} was begun with another {' and '.join(names)}; choose a new directory")
        self.index = index

    def missing(self) -> list[int]:
        """Shards that are not there yet."""
        return [shard for shard in range(self.index.shards) if not self._file("codes", shard).exists()]

    def write(self, shard: int, codes: Tensor, labels: Tensor | None) -> None:
        """Write one shard; its codes come last, so that a shard with codes is whole."""
        for leftover in self.path.glob(f".*-{shard:06d}.*.tmp"):  # of a killed process
            leftover.unlink()
        array = codes.cpu().numpy().astype(self.index.dtype)
        if self.index.container == "parquet":
            pq, pa = _pyarrow()
            columns = {"codes": pa.FixedSizeListArray.from_arrays(pa.array(array.reshape(-1)), array[0].size)}
            if labels is not None:
                columns["label"] = pa.array(labels.numpy())
            table = pa.table(columns)
            write_atomically(self._file("codes", shard), lambda out: pq.write_table(table, out))
            return
        if labels is not None:
            write_atomically(self._file("labels", shard), lambda out: np.save(out, labels.numpy()))
        write_atomically(self._file("codes", shard), lambda out: np.save(out, array))

    def read(self, shard: int) -> Codes:
        """One shard.

        Raises:
            UserError: it is missing, damaged, or not what the index says.
        """
        first, end = self.index.bounds(shard)
        file = self._file("codes", shard)
        if not file.exists():
            raise UserError(f"{self.path} is incomplete: {file.name} is missing; finish it with 'vqkernels encode'")
        try:
            codes, labels = self._load(shard)
        except Exception as error:  # a damaged file fails in any way
            raise UserError(f"{file} is damaged and cannot be read: {error}; delete it and encode again") from error
        wrong = codes.shape != (end - first, *self.index.codes) or codes.max(initial=0) >= self.index.codebook_size
        wrong |= codes.min(initial=0) < 0 or (labels is None) == self.index.labelled
        if wrong or (labels is not None and labels.shape != (end - first,)):
            raise UserError(f"{file} is not what index.json says; delete it and encode again")
        grids = torch.from_numpy(codes.astype(np.int64))
        return Codes(grids, None if labels is None else torch.from_numpy(labels.astype(np.int64)))

    def _load(self, shard: int) -> tuple[np.ndarray, np.ndarray | None]:
        file = self._file("codes", shard)
        if self.index.container == "parquet":
            pq, _ = _pyarrow()
            table = pq.read_table(file)
            flat = table.column("codes").combine_chunks().flatten().to_numpy()
            labels = table.column("label").to_numpy() if self.index.labelled else None
            return flat.reshape(table.num_rows, *self.index.codes), labels
        labels = np.load(self._file("labels", shard), allow_pickle=False) if self.index.labelled else None
        return np.load(file, allow_pickle=False), labels

    def _file(self, kind: str, shard: int) -> Path:
        return self.path / f"{kind}-{shard:06d}.{self.index.container}"


def fingerprint(vqvae: VQVAE) -> str:
    """A hash of what decides about codes and their meaning: the weights, by name."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(vqvae.state_dict().items()):
        if name.startswith(("encoder.", "decoder.")) or name == "quantizer.codebook":
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _read_index(file: Path) -> CodesIndex:
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
        if table.pop("format") != FORMAT:
            raise UserError(f"{file} was written by another version of vqkernels (this one reads {FORMAT})")
        for name in ("shape", "codes", "class_names"):
            table[name] = tuple(table[name])
        return CodesIndex(**table)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file} is no index of codes: {error}") from error


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError("Parquet needs pyarrow: pip install 'vqkernels[data]'") from error
    return pyarrow.parquet, pyarrow
