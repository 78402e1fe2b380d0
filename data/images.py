"""Reading an image as a person sees it: upright, RGB, 8 bits, H x W x 3.

What differs from a plain decode:

* EXIF orientation is applied, in JPEG and in every other format that carries it.
* Grey and palette images become RGB; of an animation the first frame counts.
* Transparent pixels are laid on white, which is what a browser's page shows.
* 16-bit grey is scaled by 1/257, its full range; 32-bit and float grey is stretched from its
  smallest to its largest value, since such files do not say what white is.
* CMYK (also Adobe's inverted form) becomes RGB.

Grey and RGB JPEG, nearly all images in practice, are decoded by OpenCV; Pillow does the rest.
"""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import TypeAlias

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image as PillowImage
from PIL import UnidentifiedImageError

from utils.errors import DatasetError

Image: TypeAlias = NDArray[np.uint8]
"""An RGB image, (H, W, 3)."""

EXTRA_DECODER = frozenset({".heic", ".heif", ".hif", ".jxl"})
"""Formats that Pillow reads with a plug-in only; without it such a file is unreadable, and told."""
IMAGE_SUFFIXES = EXTRA_DECODER | frozenset(
    {".apng", ".avif", ".bmp", ".dib", ".gif", ".j2c", ".j2k", ".jfif", ".jif", ".jp2", ".jpc"}
    | {".jpe", ".jpeg", ".jpf", ".jpg", ".jpx", ".mpo", ".pbm", ".pcx", ".pfm", ".pgm", ".png"}
    | {".pnm", ".ppm", ".qoi", ".tga", ".tif", ".tiff", ".webp"}
)
_ORIENTATION_TAG = 0x0112
_DECODE_ERRORS = (
    OSError,
    ValueError,
    TypeError,
    SyntaxError,
    EOFError,
    IndexError,
    OverflowError,
    struct.error,
    zlib.error,
    PillowImage.DecompressionBombError,
)


class ImageError(DatasetError):
    """The bytes of a file are not an image, or only a part of one."""


def is_image_path(path: str | Path) -> bool:
    """True if the suffix is one of an image format read here."""
    return Path(path).suffix.lower() in IMAGE_SUFFIXES


def read_image(path: str | Path) -> Image:
    """Read a file as an upright RGB image.

    Returns:
        RGB, (H, W, 3), uint8, owned by the caller.

    Raises:
        ImageError: the file is no image, is damaged or cut off.
        DatasetError: the file cannot be read at all (missing, no permission, disk fault).
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise _unreachable(path, error) from error
    return decode_image(data, str(path))


def decode_image(data: bytes, name: str) -> Image:
    """Decode the bytes of an image file; `name` stands in the message of an `ImageError`."""
    try:
        with PillowImage.open(io.BytesIO(data)) as image:
            if data[:2] == b"\xff\xd8" and image.mode in ("L", "RGB") and _has_jpeg_end(data):
                return _decode_with_opencv(data, _orientation(image), name)
            rgb = _to_rgb(image)
            # Asked for after loading, since Pillow turns a TIFF by itself and drops the tag.
            return _turn(rgb, _orientation(image))
    except (UnidentifiedImageError, PillowImage.DecompressionBombError):
        return _decode_with_opencv(data, None, name)
    except _DECODE_ERRORS as error:
        raise _damaged(name, error) from error


def image_size(path: str | Path) -> tuple[int, int]:
    """Height and width of the upright image, from its header, after a check that the file is whole.

    A JPEG is taken as whole when its end mark is there; one that does not end so, and every other
    format, is decoded once.

    Raises:
        ImageError: the file is no image, is damaged or cut off.
        DatasetError: the file cannot be read at all.
    """
    try:
        with PillowImage.open(path) as image:
            if not _looks_whole(path, image.format):
                image.load()
            width, height = image.size
            turned = _orientation(image) in (5, 6, 7, 8)
            return (width, height) if turned else (height, width)
    except (UnidentifiedImageError, PillowImage.DecompressionBombError):
        height, width = read_image(path).shape[:2]
        return height, width
    except _DECODE_ERRORS as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise _unreachable(path, error) from error
        raise _damaged(str(path), error) from error


def _unreachable(path: str | Path, error: OSError) -> DatasetError:
    reason = error.strerror or str(error)
    return DatasetError(f"{path}: cannot be read - got {reason}, expected an image file.")


def _damaged(name: str, error: BaseException | None) -> ImageError:
    reason = f" ({error})" if error is not None and str(error) else ""
    suffix = Path(name).suffix.lower()
    if suffix in EXTRA_DECODER:
        reason = f" (no decoder for {suffix} is installed, or it is damaged: convert it to .png)"
    return ImageError(f"{name}: not a whole image{reason} - expected a file that decodes.")


def _decode_with_opencv(data: bytes, orientation: int | None, name: str) -> Image:
    """Decode with OpenCV; `orientation` None leaves turning to OpenCV."""
    flags = cv2.IMREAD_COLOR
    if orientation is not None:
        flags |= cv2.IMREAD_IGNORE_ORIENTATION
    try:
        decoded = cv2.imdecode(np.frombuffer(data, np.uint8), flags) if data else None
    except cv2.error as error:
        raise _damaged(name, error) from error
    if decoded is None:
        raise _damaged(name, None)
    image = np.asarray(cv2.cvtColor(decoded, cv2.COLOR_BGR2RGB), dtype=np.uint8)
    return _turn(image, orientation or 1)


def _orientation(image: PillowImage.Image) -> int:
    """EXIF orientation, 1 to 8; 1 when there is none or it makes no sense."""
    value = image.getexif().get(_ORIENTATION_TAG, 1)
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _turn(image: Image, orientation: int) -> Image:
    """Undo an EXIF orientation (JEITA CP-3451, tag 274)."""
    if orientation in (5, 6, 7, 8):
        image = np.swapaxes(image, 0, 1)
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    return np.ascontiguousarray(image)


def _to_rgb(image: PillowImage.Image) -> Image:
    if image.mode.startswith(("I", "F")):
        grey = _scale_grey(np.asarray(image))
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        page = PillowImage.new("RGBA", rgba.size, "white")
        image = PillowImage.alpha_composite(page, rgba)
    return np.array(image.convert("RGB"), dtype=np.uint8)


def _scale_grey(values: NDArray[np.generic]) -> NDArray[np.uint8]:
    """Bring grey values deeper than 8 bits to 0..255 (see the head of this file)."""
    numbers = values.astype(np.float64)
    if not np.isfinite(numbers).all():
        raise ValueError("pixel values that are no numbers")
    low, high = float(numbers.min()), float(numbers.max())
    is_whole = np.issubdtype(values.dtype, np.integer)
    if is_whole and low >= 0 and high <= 65535:
        low, high = 0.0, 65535.0
    span = high - low or 1.0
    return np.rint((numbers - low) * (255.0 / span)).astype(np.uint8)


def _has_jpeg_end(data: bytes) -> bool:
    return data[-64:].rstrip(b"\x00\r\n ").endswith(b"\xff\xd9")


def _looks_whole(path: str | Path, image_format: str | None) -> bool:
    """True if the file is a JPEG with its end mark."""
    if image_format not in ("JPEG", "MPO"):
        return False
    with open(path, "rb") as file:
        size = file.seek(0, io.SEEK_END)
        file.seek(max(0, size - 64))
        return _has_jpeg_end(file.read())
