"""Images in NumPy files. A .npy file is mapped, so that it may be larger than memory; an .npz file is read whole.

Of an .npz file only the arrays with the names below are read, and none that would take more memory than `MAX_UNZIPPED`,
or whose own header promises another size than the archive: a file of kilobytes may unpack to terabytes.
"""

import math
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy

from vqkernels.training.errors import UserError
from vqkernels.training.images import ArraySource, Splits

NAMES = ("images", "labels", "x_train", "y_train", "x_test", "y_test")
MAX_UNZIPPED = 1 << 32  # bytes, of all arrays together


def open_arrays(path: Path) -> Splits:
    """A `.npy` file of images, or an `.npz` file with `images` and (optionally) `labels`, or `x_train`, `y_train`,
    `x_test`, `y_test`.

    Raises:
        UserError: the file cannot be read, or holds none of these.
    """
    try:
        if zipfile.is_zipfile(path):
            arrays, others = _unzipped(path)
        else:
            arrays, others = {"images": np.load(path, allow_pickle=False, mmap_mode="r")}, []
    except UserError:
        raise
    except Exception as error:  # a damaged file fails in any way
        raise UserError(f"{path} cannot be read as a NumPy file: {error}") from error
    test = None
    if "images" in arrays:
        train = _source(path, arrays, "images", "labels")
    elif "x_train" in arrays:
        train = _source(path, arrays, "x_train", "y_train")
        if "x_test" in arrays:
            test = _source(path, arrays, "x_test", "y_test")
            if test.shape != train.shape or test.labelled != train.labelled:
                raise UserError(f"{path}: x_test and x_train differ in image size, or only one of them has labels")
    else:
        raise UserError(
            f"{path} has no array 'images' or 'x_train' (it has: {', '.join([*arrays, *others]) or 'nothing'})"
        )
    highest = max((int(part.labels.max()) for part in (train, test) if part and part.labels is not None), default=-1)
    return Splits(train, test, tuple(str(label) for label in range(highest + 1)))


def _unzipped(path: Path) -> tuple[dict[str, np.ndarray], list[str]]:
    """The arrays that have one of our names, and the names of the others."""
    arrays, others, left = {}, [], MAX_UNZIPPED
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            name = member.filename.removesuffix(".npy")
            if name not in NAMES:
                others.append(name)
                continue
            left -= member.file_size
            if left < 0:
                raise UserError(f"{path} would unpack to more than {MAX_UNZIPPED} bytes; .npy files may be larger")
            with archive.open(member) as file:
                size = _promised(file)
            if size != member.file_size:
                raise ValueError(f"{name} should have {size} bytes, but has {member.file_size}")
            with archive.open(member) as file:
                arrays[name] = npy.read_array(file, allow_pickle=False)
    return arrays, others


def _promised(file: Any) -> int:
    """The size of a .npy file as its header states it; the header is read."""
    version = npy.read_magic(file)
    read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}.get(version)
    if read is None:
        raise ValueError(f"the format {version} of NumPy is not read")
    shape, _, dtype = read(file)
    if dtype.hasobject:
        raise ValueError("it holds Python objects")
    return file.tell() + math.prod(shape) * dtype.itemsize


def _source(path: Path, arrays: dict[str, np.ndarray], images: str, labels: str) -> ArraySource:
    return ArraySource(arrays[images], arrays.get(labels), f"{path}: {images}", f"{path}: {labels}")
