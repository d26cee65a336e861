"""CIFAR-10 as its authors publish it: binary batches, which are mapped, or Python batches.

A Python batch is a pickle. It is opened by an unpickler that makes NumPy arrays and plain containers and nothing else,
so a file from a stranger cannot run code; and no array larger than the file, so it cannot fill the memory either.
"""

import pickle
from pathlib import Path
from typing import Any

import numpy as np

from vqkernels.training.errors import UserError
from vqkernels.training.images import ArraySource, JoinedSource, Source, Splits

SIDE, CHANNELS = 32, 3
PIXELS = CHANNELS * SIDE * SIDE
MAX_PICKLE = 1 << 30  # bytes; the published batches have 31 million
NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def cifar_batches(folder: Path) -> dict[str, list[Path]]:
    """The batches in a folder: "train" and "test" files; empty if there are none."""
    for suffix in (".bin", ""):
        train = sorted(
            path for path in folder.glob(f"data_batch_*{suffix}") if path.is_file() and path.suffix == suffix
        )
        if train:
            test = folder / f"test_batch{suffix}"
            return {"train": train, "test": [test] if test.is_file() else []}
    return {}


def open_cifar(folder: Path) -> Splits:
    """CIFAR-10 in a folder; what is there of the five training batches, and the test batch if there is one.

    Raises:
        UserError: a file is damaged or no batch of CIFAR-10.
    """
    batches = cifar_batches(folder)
    parts = {split: [_source(path) for path in paths] for split, paths in batches.items()}
    train = _joined(parts["train"], folder)
    return Splits(train, _joined(parts["test"], folder) if parts["test"] else None, NAMES)


def _joined(parts: list[Source], folder: Path) -> Source:
    return parts[0] if len(parts) == 1 else JoinedSource(parts, str(folder))


def _source(path: Path) -> Source:
    pixels, labels = _binary(path) if path.suffix == ".bin" else _pickled(path)
    if labels.max(initial=0) >= len(NAMES):
        raise UserError(f"{path} has labels up to {labels.max()} and is no batch of CIFAR-10")
    return ArraySource(pixels, labels, str(path))


def _binary(path: Path) -> tuple[np.ndarray, np.ndarray]:
    record = 1 + PIXELS
    size = path.stat().st_size
    if size == 0 or size % record:
        raise UserError(f"{path} has {size} bytes and is no batch of CIFAR-10, whose images take {record} each")
    mapped = np.memmap(path, dtype=np.uint8, mode="r", shape=(size // record, record))
    # A view: the pixels of a record follow its label.
    shape, strides = (len(mapped), CHANNELS, SIDE, SIDE), (record, SIDE * SIDE, SIDE, 1)
    return np.ndarray(shape, np.uint8, buffer=mapped.data, offset=1, strides=strides), np.array(mapped[:, 0])


def _pickled(path: Path) -> tuple[np.ndarray, np.ndarray]:
    if path.stat().st_size > MAX_PICKLE:
        raise UserError(f"{path} has {path.stat().st_size} bytes, more than the {MAX_PICKLE} that are read")
    try:
        with open(path, "rb") as file:
            batch = _Unpickler(file, encoding="bytes").load()
        pixels, labels = np.asarray(batch[b"data"]), np.asarray(batch[b"labels"])
    except Exception as error:  # a damaged pickle fails in any way
        raise UserError(f"{path} cannot be read as a batch of CIFAR-10: {error}") from error
    if pixels.dtype != np.uint8 or pixels.shape != (len(labels), PIXELS):
        raise UserError(f"{path} must hold (N, {PIXELS}) bytes, but holds {pixels.dtype} of shape {pixels.shape}")
    return pixels.reshape(-1, CHANNELS, SIDE, SIDE), labels


def _empty_array(kind: object, shape: object, code: object) -> np.ndarray:
    """How the pickle of an array begins: its shape and its bytes follow, and NumPy holds one to the other."""
    if shape != (0,):
        raise pickle.UnpicklingError(f"it asks for an array of shape {shape} without its bytes")
    return np.ndarray((0,), np.uint8)


def _latin1(text: str, encoding: str) -> bytes:
    """How Python 3 pickles bytes for Python 2."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it asks for the encoding {encoding}, which no batch needs")
    return text.encode("latin1")


_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): "the kind of array, never called",
    ("numpy", "dtype"): np.dtype,
    ("numpy.core.multiarray", "_reconstruct"): _empty_array,
    ("numpy._core.multiarray", "_reconstruct"): _empty_array,
    ("_codecs", "encode"): _latin1,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no batch needs")
        return _ALLOWED[module, name]
