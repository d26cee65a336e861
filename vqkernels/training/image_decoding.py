"""One encoded image, from a file or from bytes: few formats, a bounded size, a short error when it cannot be read."""

from io import BytesIO
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from vqkernels.training.errors import UserError

Color = Literal["auto", "grey", "rgb", "rgba"]

# Whatever a file is called: Pillow has formats that run other programs (PostScript).
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
MAX_PIXELS = 1 << 26  # 8192 x 8192; the header states it, so more is never decoded
GREY_MODES = frozenset({"1", "L", "LA", "La", "I;16", "I;16L", "I;16B", "I;16N", "I"})
PILLOW_MODES = {"grey": "L", "rgb": "RGB", "rgba": "RGBA"}


def is_grey(encoded: Path | bytes, name: str) -> bool:
    """Whether the image has no colours, as its header says; the pixels are not decoded.

    Raises:
        UserError: it cannot be read.
    """
    try:
        with _opened(encoded) as image:
            return image.mode in GREY_MODES
    except Exception as error:  # a damaged file fails in any way
        raise UserError(f"the image {name} cannot be read: {error}") from error


def decode_image(encoded: Path | bytes, name: str, color: Color, size: tuple[int, int] | None = None) -> np.ndarray:
    """Pixels (H, W, C) uint8 in a color, not auto.

    The image is turned upright as its EXIF data says; 16 bits are cut to 8; where the result has no transparency,
    transparent pixels are laid on white; of an animation the first frame is taken.

    Args:
        name: what to call it in errors.
        size: if the header states neither this width and height nor the image turned, nothing is decoded.

    Raises:
        UserError: it cannot be decoded, or is too large.
        WrongSize: it has another size.
    """
    try:
        with _opened(encoded) as image:
            if size is not None and sorted(image.size) != sorted(size):
                raise WrongSize(*image.size)
            whole = image.format != "PNG"
            if whole:
                image = _converted(image, color)
            else:
                image.verify()  # the checksums; decoding alone accepts a file that lacks its end
        if not whole:
            with _opened(encoded) as image:
                image = _converted(image, color)
    except WrongSize:
        raise
    except Exception as error:  # a damaged file fails in any way, its EXIF data too
        raise UserError(f"the image {name} cannot be read: {error}") from error
    if size is not None and image.size != size:
        raise WrongSize(*image.size)
    return np.asarray(image).reshape(image.height, image.width, len(image.getbands()))


class WrongSize(Exception):
    """An image has another width and height than the one that was expected."""

    def __init__(self, width: int, height: int) -> None:
        super().__init__(f"{width}x{height}")


def _opened(encoded: Path | bytes) -> Image.Image:
    """The image with its header read."""
    try:
        image = Image.open(encoded if isinstance(encoded, Path) else BytesIO(encoded), formats=FORMATS)
    except UnidentifiedImageError as error:  # it names an object in memory
        raise ValueError(f"it is none of {', '.join(FORMATS)}") from error
    if image.width * image.height > MAX_PIXELS:
        image.close()
        raise ValueError(f"its {image.width}x{image.height} pixels are more than the {MAX_PIXELS} that are read")
    return image


def _converted(image: Image.Image, color: Color) -> Image.Image:
    """The image upright, in another mode of pixels."""
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I;16") or image.mode == "I":  # Pillow would clip these at 255
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    if color != "rgba" and image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(PILLOW_MODES[color])
