"""A data set as codes on disk: shards of grids, and an index that names the model and the images.

    index.json               what the codes are, written first; every process writes the same bytes
    codes-000000.npy         (n, h, w) uint16, or int32 where the codebook has more than 65,536 codes
    labels-000000.npy        (n,) int64, where the images have labels; a checksum follows both arrays
    codes-000000.parquet     instead of both, with --container parquet: columns `codes` (a list of h * w) and `label`

Shard k holds images k * shard_images and following, in the order of the source, so which shards are missing can be seen
from the directory alone: a killed run resumes there, ranks share the shards without communicating, and
no image can be lost or written twice. A shard is moved into place when it is whole.
"""

import dataclasses
import hashlib
import json
import math
import zlib
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from vqkernels.models import VQVAE
from vqkernels.training.checkpoint import write_atomically
from vqkernels.training.errors import UserError

FORMAT = "vqkernels-codes-1"
Container = Literal["npy", "parquet"]
SEAL = b"crc32"  # behind an array, then four bytes of it, little-endian; readers of .npy stop at the end of the array
MAX_COUNT = 1 << 40
MAX_SHARDS = 1 << 20


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

    def check(self) -> "CodesIndex":
        """Return self.

        Raises:
            ValueError: a value is of another type than it should be, or out of range.
        """
        for name in ("model", "run", "data", "split"):
            _require(isinstance(getattr(self, name), str), name, "a string", getattr(self, name))
        for name in ("images", "codebook_size", "shard_images"):
            _require(_sizes(getattr(self, name)), name, f"a whole number from 1 to {MAX_COUNT}", getattr(self, name))
        for name, axes in (("shape", 3), ("codes", 2)):
            sizes = getattr(self, name)
            _require(len(sizes) == axes and _sizes(*sizes), name, f"{axes} sizes, each at least 1", sizes)
        _require(all(isinstance(name, str) for name in self.class_names), "class_names", "strings", self.class_names)
        _require(self.shards <= MAX_SHARDS, "shard_images", f"so large that {MAX_SHARDS} shards do", self.shard_images)
        _require(isinstance(self.labelled, bool), "labelled", "true or false", self.labelled)
        _require(self.container in get_args(Container), "container", "npy or parquet", self.container)
        return self

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
        there = self._there()
        return [shard for shard in range(self.index.shards) if self._file("codes", shard).name not in there]

    def damaged(self) -> list[int]:
        """Shards that are there, but whose headers and sizes are not those of whole ones."""
        there = self._there()
        shards = [shard for shard in range(self.index.shards) if self._file("codes", shard).name in there]
        return [shard for shard in shards if not self._seems_whole(shard)]

    def _there(self) -> set[str]:
        return {file.name for file in self.path.iterdir()}

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
            file = self._file("codes", shard)
            write_atomically(file, lambda out: pq.write_table(table, out, write_page_checksum=True))
            return
        if labels is not None:
            write_atomically(self._file("labels", shard), lambda out: _save(out, labels.numpy()))
        write_atomically(self._file("codes", shard), lambda out: _save(out, array))

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
            if self.index.container == "npy":
                for kind in ("codes", "labels") if self.index.labelled else ("codes",):
                    _check_seal(self._file(kind, shard))
            codes, labels = self._load(shard)
        except UserError:
            raise
        except Exception as error:  # a damaged file fails in any way
            raise UserError(
                f"{file} is damaged and cannot be read: {' '.join(str(error).split())}; delete it and encode again"
            ) from error
        wrong = codes.shape != (end - first, *self.index.codes) or codes.dtype.kind not in "iu"
        wrong = wrong or codes.max(initial=0) >= self.index.codebook_size or codes.min(initial=0) < 0
        if labels is not None and not wrong:
            wrong = labels.shape != (end - first,) or labels.dtype.kind not in "iu"
            wrong = wrong or labels.min(initial=0) < 0 or labels.max(initial=0) >= len(self.index.class_names)
        if wrong:
            raise self._unlike(file)
        grids = torch.from_numpy(codes.astype(np.int64))
        return Codes(grids, None if labels is None else torch.from_numpy(labels.astype(np.int64)))

    def _load(self, shard: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Codes and labels as they are in the files; an array is mapped, and nothing is unpacked that is too large."""
        file = self._file("codes", shard)
        if self.index.container == "parquet":
            pq, _ = _pyarrow()
            first, end = self.index.bounds(shard)
            with pq.ParquetFile(file, page_checksum_verification=True) as opened:
                metadata = opened.metadata
                groups = [metadata.row_group(group) for group in range(metadata.num_row_groups)]
                most = (end - first) * (math.prod(self.index.codes) + 1) * 16 + (1 << 20)  # of plain int64, twice
                if metadata.num_rows != end - first or sum(group.total_byte_size for group in groups) > most:
                    raise self._unlike(file)
                table = opened.read()
            flat = table.column("codes").combine_chunks().flatten().to_numpy()
            labels = table.column("label").to_numpy() if self.index.labelled else None
            return flat.reshape(table.num_rows, *self.index.codes), labels
        labels = None
        if self.index.labelled:
            labels = np.load(self._file("labels", shard), allow_pickle=False, mmap_mode="r")
        return np.load(file, allow_pickle=False, mmap_mode="r"), labels

    def _seems_whole(self, shard: int) -> bool:
        first, end = self.index.bounds(shard)
        file = self._file("codes", shard)
        pq = _pyarrow()[0] if self.index.container == "parquet" else None
        try:
            if pq is not None:
                return pq.read_metadata(file).num_rows == end - first
            codes, labels = self._load(shard)
        except Exception:  # a damaged file fails in any way
            return False
        whole = codes.shape == (end - first, *self.index.codes) and codes.dtype == self.index.dtype
        return whole and (labels is None or labels.shape == (end - first,))

    def _unlike(self, file: Path) -> UserError:
        return UserError(f"{file} is not what index.json says; delete it and encode again")

    def _file(self, kind: str, shard: int) -> Path:
        return self.path / f"{kind}-{shard:06d}.{self.index.container}"


def _save(file: BinaryIO, array: np.ndarray) -> None:
    content = BytesIO()
    np.save(content, array)
    file.write(content.getbuffer())
    file.write(SEAL + zlib.crc32(content.getbuffer()).to_bytes(4, "little"))


def _check_seal(path: Path) -> None:
    """Raise ValueError if the bytes before the checksum of a file have changed; other programs write no checksum."""
    size = path.stat().st_size - len(SEAL) - 4
    if size < 0:
        return
    with path.open("rb") as file:
        file.seek(size)
        seal, sum_of = file.read(len(SEAL)), 0
        expected = int.from_bytes(file.read(4), "little")
        file.seek(0)
        while seal == SEAL and file.tell() < size:
            sum_of = zlib.crc32(file.read(min(size - file.tell(), 1 << 20)), sum_of)
    if seal == SEAL and sum_of != expected:
        raise ValueError(f"the checksum of {path.name} is not that of its bytes")


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
        return CodesIndex(**table).check()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file} is no index of codes: {error}") from error


def _sizes(*values: Any) -> bool:
    return all(isinstance(x, int) and not isinstance(x, bool) and 1 <= x <= MAX_COUNT for x in values)


def _require(met: bool, name: str, expected: str, found: Any) -> None:
    if not met:
        raise ValueError(f"{name} must be {expected}, but is {found!r}")


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError("Parquet needs pyarrow: pip install 'vqkernels[data]'") from error
    return pyarrow.parquet, pyarrow
