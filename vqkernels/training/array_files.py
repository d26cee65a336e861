"""Images in NumPy files. A .npy file is mapped, so that it may be larger than memory; an .npz file is read whole."""

import zipfile
from pathlib import Path

import numpy as np

from vqkernels.training.errors import UserError
from vqkernels.training.images import ArraySource, Splits


def open_arrays(path: Path) -> Splits:
    """A `.npy` file of images, or an `.npz` file with `images` and (optionally) `labels`, or `x_train`, `y_train`,
    `x_test`, `y_test`.

    Raises:
        UserError: the file cannot be read, or holds none of these.
    """
    try:
        loaded = np.load(path, allow_pickle=False, mmap_mode="r")
        arrays = {"images": loaded} if isinstance(loaded, np.ndarray) else {name: loaded[name] for name in loaded}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
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
        raise UserError(f"{path} has no array 'images' or 'x_train' (it has: {', '.join(arrays) or 'nothing'})")
    highest = max((int(part.labels.max()) for part in (train, test) if part and part.labels is not None), default=-1)
    return Splits(train, test, tuple(str(label) for label in range(highest + 1)))


def _source(path: Path, arrays: dict[str, np.ndarray], images: str, labels: str) -> ArraySource:
    return ArraySource(arrays[images], arrays.get(labels), f"{path}: {images}", f"{path}: {labels}")
