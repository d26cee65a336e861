"""IDX files, as MNIST and its family come: a big-endian header and raw bytes, possibly gzipped.

An unzipped file is mapped; a zipped one is unpacked into memory, and never beyond the size that its header states.
"""

import gzip
import math
import re
import struct
import zlib
from pathlib import Path

import numpy as np

from vqkernels.training.errors import UserError
from vqkernels.training.images import ArraySource, Splits

IMAGES = re.compile(r"images[-.]idx3-ubyte(\.gz)?$")
TEST = re.compile(r"(t10k|test)[^/]*$")
MAX_BYTES = 1 << 36
MAX_UNZIPPED = 1 << 32  # what a zipped file may grow to in memory


def idx_files(folder: Path) -> list[Path]:
    """The IDX files of images in a folder, sorted by name."""
    return sorted(path for path in folder.iterdir() if path.is_file() and IMAGES.search(path.name))


def open_idx(files: list[Path]) -> Splits:
    """Train images and, where there are two files, test images (t10k, test); labels lie beside them or nowhere.

    Raises:
        UserError: a file is damaged or too large, or it is unclear which of them is which.
    """
    test = [path for path in files if TEST.match(path.name)]
    train = [path for path in files if path not in test]
    if len(files) == 1:
        train, test = files, []
    if len(train) != 1 or len(test) > 1:
        names = ", ".join(path.name for path in files)
        raise UserError(f"{files[0].parent} must hold the IDX files of one data set, but holds {names}")
    sources = [_source(path) for path in (*train, *test)]
    labels = [source.labels for source in sources if source.labels is not None]
    if len(labels) not in (0, len(sources)) or len({source.shape for source in sources}) != 1:
        raise UserError(f"{files[0].parent}: the IDX files differ in image size, or only one of them has labels")
    class_names = tuple(str(label) for label in range(max((int(x.max()) for x in labels), default=-1) + 1))
    return Splits(sources[0], sources[1] if len(sources) == 2 else None, class_names)


def _source(path: Path) -> ArraySource:
    stem = path.with_name(path.name.removesuffix(".gz").replace("images", "labels").replace("idx3", "idx1"))
    beside = next((x for x in (stem, stem.with_name(f"{stem.name}.gz")) if x.is_file()), None)
    return ArraySource(_read(path, 3), None if beside is None else _read(beside, 1), str(path), str(beside))


def _read(path: Path, axes: int) -> np.ndarray:
    header = 4 + 4 * axes
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            start = file.read(header)
            if len(start) < header or start[:4] != bytes((0, 0, 8, axes)):
                raise UserError(f"{path} is no IDX file of bytes with {axes} {'axis' if axes == 1 else 'axes'}")
            shape = struct.unpack(f">{axes}I", start[4:])
            size = math.prod(shape)
            most = MAX_UNZIPPED if path.suffix == ".gz" else MAX_BYTES
            if size > most:
                raise UserError(f"{path} states a size of {size} bytes, more than the {most} that are read")
            if path.suffix != ".gz":
                if path.stat().st_size != header + size:
                    raise UserError(f"{path} must have {header + size} bytes, but has {path.stat().st_size}")
                return np.memmap(path, dtype=np.uint8, mode="r", offset=header, shape=shape)
            content = file.read(size + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if len(content) != size:
        raise UserError(
            f"{path} must unpack to {header + size} bytes, but has {'more' if len(content) > size else 'less'}"
        )
    return np.frombuffer(content, dtype=np.uint8).reshape(shape)
