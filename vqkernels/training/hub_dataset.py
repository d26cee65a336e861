"""Images of a data set that the `datasets` library knows: from the Hugging Face hub, or from the disk.

`hf:NAME`, `hf:NAME:SPLIT` or `hf:NAME:CONFIG:SPLIT`; NAME is that of the hub, or a path to what `save_to_disk` wrote,
to a Parquet file, or to a folder that `load_dataset` opens. The library keeps the rows in mapped files, and images are
decoded when they are read, by us: within the bounds of `image_decoding`. No code of a data set is run.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vqkernels.training.errors import UserError
from vqkernels.training.image_decoding import Color, WrongSize, decode_image, is_grey
from vqkernels.training.images import MAX_CLASSES, ImageSet, Splits

PREFIX = "hf:"
_SOURCE = re.compile(r"([^:]+)(?::([^:\[\]]+))??(?::((?:[^:\[\]]|\[[^\]]*\])+))?")
_TEST_NAMES = ("test", "validation", "valid", "val")  # the first one present is the test split
MAX_ROW_GROUP = 1 << 32  # bytes, unpacked
_CHUNK = 256  # rows looked at together


class HubSource:
    """The images of one split.

    Args:
        rows: a data set whose images are not decoded.
        image: the column of images.
        labels: (N,) int64, or None.
        color: what they are converted to, not auto.
        name: what to call the split in errors.
        size: width and height that all must have; those of the first image when None.
    """

    def __init__(
        self, rows: Any, image: str, labels: Tensor | None, color: Color, name: str, size: tuple[int, int] | None
    ) -> None:
        self.labels, self._rows, self._image, self._color, self._name = labels, rows, image, color, name
        if not len(rows):
            raise UserError(f"{name} is empty")
        encoded = _encoded(rows[0][image], f"0 of {name}")
        height, width, channels = decode_image(encoded, f"0 of {name}", color).shape
        self._size = (width, height) if size is None else size
        self.shape = channels, self._size[1], self._size[0]

    @property
    def labelled(self) -> bool:
        return self.labels is not None

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, start: int, stop: int) -> ImageSet:
        """See `images.Source.read`."""
        channels, height, width = self.shape
        cells = self._rows[start:stop][self._image]
        pixels = np.empty((len(cells), height, width, channels), dtype=np.uint8)
        for place, cell in enumerate(cells):
            name = f"{start + place} of {self._name}"
            try:
                pixels[place] = decode_image(_encoded(cell, name), name, self._color, self._size)
            except WrongSize as other:
                raise UserError(
                    f"images differ in size: the first one is {width}x{height}, but {name} is {other}"
                ) from None
        labels = None if self.labels is None else self.labels[start:stop]
        return ImageSet(torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))), labels)


def open_hub(source: str, color: Color = "auto") -> Splits:
    """A source that begins with `hf:`.

    Without a split, the training images are those of `train` (or of the only split), the test images those of `test`
    or `validation`. The image column is that of the type Image, `image` or `img` if there are several; the labels are
    the column `label` or `labels`, or else the first one of the type ClassLabel.

    Args:
        color: as in `image_folder.open_folder`.

    Raises:
        UserError: `datasets` is missing, the data set cannot be had, or it holds no images.
    """
    parsed = _SOURCE.fullmatch(source.removeprefix(PREFIX))
    if parsed is None:
        raise UserError(f"the data {source} must be hf:NAME, hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT")
    name, config, split = parsed.groups()
    found = _loaded(source, name, config, split)
    if isinstance(found, dict):
        train = "train" if "train" in found else next(iter(found))
        test = next((x for x in _TEST_NAMES if x in found and x != train), None)
        if train != "train" and len(found) > 1:
            raise UserError(f"{source} has no split 'train'; choose one of {', '.join(found)} with hf:NAME:SPLIT")
        parts = {f"{source}:{x}": found[x] for x in (train, test) if x is not None}
    else:
        parts = {source: found}
    image, label = _columns(source, next(iter(parts.values())).features)
    parts = {key: _undecoded(part, image) for key, part in parts.items()}
    labels = {key: None if label is None else _labels(key, part, label) for key, part in parts.items()}
    if color == "auto":
        color = "grey" if all(_all_grey(key, part, image) for key, part in parts.items()) else "rgb"
    sources: list[HubSource] = []
    for key, part in parts.items():
        size = None if not sources else (sources[0].shape[2], sources[0].shape[1])
        sources.append(HubSource(part, image, labels[key], color, key, size))
    highest = max((int(x.max()) for x in labels.values() if x is not None), default=-1)
    names = getattr(next(iter(parts.values())).features[label], "names", None) if label is not None else None
    class_names = tuple(names) if names and len(names) > highest else tuple(str(x) for x in range(highest + 1))
    return Splits(sources[0], sources[1] if len(sources) == 2 else None, class_names)


def resolved(source: str) -> str:
    """The source with a relative path made absolute, so that it is found again from elsewhere."""
    name, colon, rest = source.removeprefix(PREFIX).partition(":")
    return f"{PREFIX}{Path(name).resolve()}{colon}{rest}" if Path(name).exists() else source


def _loaded(source: str, name: str, config: str | None, split: str | None) -> Any:
    """A `datasets.DatasetDict`, or a `datasets.Dataset` where there is a split."""
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"{source} needs the package datasets: pip install 'vqkernels[data]'") from error
    path = Path(name)
    try:
        if path.is_dir() and any((path / x).is_file() for x in ("state.json", "dataset_dict.json")):
            saved = datasets.load_from_disk(path)
            found = saved if isinstance(saved, dict) else {str(saved.split or "train"): saved}
            return saved if split is None else found[split]
        if path.is_file() and path.suffix == ".parquet":
            _check_row_groups(path)
            return datasets.load_dataset("parquet", data_files=str(path), split=split)
        return datasets.load_dataset(str(path.resolve()) if path.exists() else name, config, split=split)
    except ConnectionError as error:
        raise UserError(
            f"the hub cannot be reached for {source}, and it is not in the cache (a path on the disk is taken too)"
        ) from error
    except KeyError as error:
        raise UserError(f"{source}: there is no split {error}") from error
    except Exception as error:  # the library and its file formats fail in any way
        raise UserError(f"{source} cannot be opened: {str(error).strip().splitlines()[0]}") from error


def _check_row_groups(path: Path) -> None:
    """Raise ValueError where one step of reading would fill the memory: the library unpacks a row group at a time."""
    import pyarrow.parquet

    metadata = pyarrow.parquet.read_metadata(path)
    largest = max((metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups)), default=0)
    if largest > MAX_ROW_GROUP:
        raise ValueError(f"it has a row group of {largest} bytes, more than the {MAX_ROW_GROUP} that are read")


def _columns(source: str, features: Any) -> tuple[str, str | None]:
    """The names of the image column, and of the label column if there is one."""
    kinds = {name: type(feature).__name__ for name, feature in features.items()}
    images = [name for name, kind in kinds.items() if kind == "Image"]
    image = next((name for name in ("image", "img", *images) if name in images), None)
    if image is None:
        raise UserError(f"{source} has no column of images (it has: {', '.join(kinds) or 'nothing'})")
    classes = [name for name, kind in kinds.items() if kind == "ClassLabel"]
    numbers = [x for x in ("label", "labels") if str(getattr(features.get(x), "dtype", "")).startswith(("int", "uint"))]
    return image, next(iter([*numbers, *classes]), None)


def _undecoded(rows: Any, image: str) -> Any:
    import datasets

    return rows.cast_column(image, datasets.Image(decode=False))


def _labels(name: str, rows: Any, label: str) -> Tensor:
    column = rows.with_format("numpy")[label][:]
    if len(column) and (column.dtype.kind not in "iu" or column.min() < 0 or column.max() >= MAX_CLASSES):
        raise UserError(
            f"the column {label} of {name} must hold whole numbers from 0 and below {MAX_CLASSES}; where a split has "
            "no labels (-1), choose another with hf:NAME:SPLIT"
        )
    return torch.from_numpy(column.astype(np.int64))


def _all_grey(name: str, rows: Any, image: str) -> bool:
    for start in range(0, len(rows), _CHUNK):
        for place, cell in enumerate(rows[start : start + _CHUNK][image]):
            called = f"{start + place} of {name}"
            if not is_grey(_encoded(cell, called), called):
                return False
    return True


def _encoded(cell: dict[str, Any] | None, name: str) -> bytes | Path:
    """What an undecoded cell holds: the bytes of a file, or the path of one."""
    if cell is not None and cell.get("bytes") is not None:
        return cell["bytes"]
    if cell is None or not cell.get("path") or not Path(cell["path"]).is_file():
        raise UserError(f"the image {name} cannot be read: there is none")
    return Path(cell["path"])
