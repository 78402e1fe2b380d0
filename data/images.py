"""Reading an image as a person sees it: upright, RGB, 8 bits, H x W x 3.

What differs from a plain decode:

* EXIF orientation is applied, in JPEG and in every other format that carries it.
* Grey and palette images become RGB; of an animation the first frame counts.
* Transparent pixels are laid on white, which is what a browser's page shows.
* 16 bits, grey or colour, are scaled by 1/257, their full range; 32-bit and float grey is stretched
  from its smallest to its largest value, since such files do not say what white is. Where `white`
  is given, all of them run from 0 to it: 4095 for 12 bits of a camera in 16-bit files.
* CMYK (also Adobe's inverted form) becomes RGB.

Files, Pillow's images and arrays are read alike. Grey and RGB JPEG, nearly all images in practice,
are decoded by OpenCV, and so are colours of 16 bits, which Pillow cuts to 8; Pillow does the rest.
"""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path
from typing import NamedTuple, TypeAlias

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image as PillowImage
from PIL import ImageFile, TiffImagePlugin, UnidentifiedImageError

from utils.errors import DatasetError
from utils.files import refuse_special

Image: TypeAlias = NDArray[np.uint8]
"""An RGB image, (H, W, 3)."""
Pixels: TypeAlias = NDArray[np.generic]
"""Numbers of any kind, mostly (H, W, C)."""

EXTRA_DECODER = frozenset({".heic", ".heif", ".hif", ".jxl"})
"""Formats that Pillow reads with a plug-in only; without it such a file is unreadable, and told."""
IMAGE_SUFFIXES = EXTRA_DECODER | frozenset(
    {".apng", ".avif", ".bmp", ".dib", ".gif", ".j2c", ".j2k", ".jfif", ".jif", ".jp2", ".jpc"}
    | {".jpe", ".jpeg", ".jpf", ".jpg", ".jpx", ".mpo", ".pbm", ".pcx", ".pfm", ".pgm", ".png"}
    | {".pnm", ".ppm", ".qoi", ".tga", ".tif", ".tiff", ".webp"}
)
FULL_WHITE = 65535
"""White of 16 bits where nothing else is said."""
_ORIENTATION_TAG = 0x0112
_BITS_TAG = 258
_ALPHA_MODES = ("RGBA", "LA", "PA", "RGBa", "La")
PIXEL_ERRORS = (
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
"""What Pillow and NumPy raise on pixels that are damaged or none."""


class ImageError(DatasetError):
    """The bytes of a file are not an image, or only a part of one."""


def is_image_path(path: str | Path) -> bool:
    """True if the suffix is one of an image format read here."""
    name = os.path.basename(path)
    dot = name.rfind(".")
    return dot > 0 and name[dot:].lower() in IMAGE_SUFFIXES


class Header(NamedTuple):
    """What the scan of a file tells.

    Attributes:
        height: of the upright image.
        width: likewise.
        peak: the largest value in whole numbers of more than 8 bits; 0 for other images.
    """

    height: int
    width: int
    peak: int = 0


def read_image(path: str | Path, white: float | None = None) -> Image:
    """Read a file as an upright RGB image.

    Args:
        path: the file.
        white: the value that is white in images deeper than 8 bits; None for what stands above.

    Returns:
        RGB, (H, W, 3), uint8, owned by the caller.

    Raises:
        ImageError: the file is no image, is damaged or cut off.
        DatasetError: the file cannot be read at all (missing, no permission, disk fault).
    """
    try:
        refuse_special(path)
        data = Path(path).read_bytes()
    except OSError as error:
        raise _unreachable(path, error) from error
    return decode_image(data, str(path), white)


def decode_image(data: bytes, name: str, white: float | None = None) -> Image:
    """Decode the bytes of an image file; `name` stands in the message of an `ImageError`."""
    try:
        with PillowImage.open(io.BytesIO(data)) as image:
            if data[:2] == b"\xff\xd8" and image.mode in ("L", "RGB") and _has_jpeg_end(data):
                return _decode_with_opencv(data, _orientation(image), name)
            return from_pillow(image, white)
    except (UnidentifiedImageError, PillowImage.DecompressionBombError):
        return _decode_with_opencv(data, None, name)
    except PIXEL_ERRORS as error:
        raise _damaged(name, error) from error


def from_pillow(image: PillowImage.Image, white: float | None = None) -> Image:
    """An image of Pillow as `read_image` gives its file.

    Raises:
        OSError, ValueError and others of Pillow: its file is damaged, or it holds no numbers.
    """
    deep = _deep_colours(image)
    if deep is not None:
        # OpenCV turns a TIFF by itself, as Pillow does.
        orientation = 1 if image.format == "TIFF" else _orientation(image)
        return _turn(_from_channels(deep, white), orientation)
    if image.mode.startswith(("I", "F")):
        rgb = _from_channels(np.asarray(image)[:, :, None], white)
    else:
        has_alpha = image.mode in _ALPHA_MODES or "transparency" in image.info
        rgba = image.convert("RGBA") if has_alpha else image
        rgb = np.array(_on_white(rgba) if has_alpha else image.convert("RGB"), dtype=np.uint8)
    # Asked for after loading, since Pillow turns a TIFF by itself and drops the tag.
    return _turn(rgb, _orientation(image))


def from_array(array: Pixels, white: float | None = None) -> Image:
    """An array as `read_image` gives a file with these pixels.

    Args:
        array: grey, grey and alpha, RGB or RGBA, (H, W), (H, W, C) or (C, H, W); of 8 or 16 bits
            without sign, or bool; grey also of other numbers.
        white: as for `read_image`.

    Raises:
        ValueError: another shape or type, or values that are no numbers.
    """
    if array.ndim == 3 and array.shape[2] not in (1, 2, 3, 4) and array.shape[0] in (1, 2, 3, 4):
        array = array.transpose(1, 2, 0)
    array = array[:, :, None] if array.ndim == 2 else array
    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * 255
    is_grey = array.ndim == 3 and array.shape[2] == 1 and array.dtype.kind in "iuf"
    is_colour = array.ndim == 3 and array.shape[2] in (1, 2, 3, 4)
    if not array.size or not (is_grey or (is_colour and array.dtype in (np.uint8, np.uint16))):
        raise ValueError(f"got {array.dtype} {array.shape}")
    return _from_channels(array, white)


def image_header(path: str | Path) -> Header:
    """Size and depth of an image from its header, after a check that the file is whole.

    A JPEG is taken as whole when its end mark is there; one that does not end so, and every other
    format, is decoded once.

    Raises:
        ImageError: the file is no image, is damaged or cut off.
        DatasetError: the file cannot be read at all.
    """
    try:
        refuse_special(path)
        with PillowImage.open(path) as image:
            peak = 0
            if not _looks_whole(path, image.format):
                peak = _peak(image)
                image.load()
            width, height = image.size
            turned = _orientation(image) in (5, 6, 7, 8)
            return Header(*((width, height) if turned else (height, width)), peak)
    except (UnidentifiedImageError, PillowImage.DecompressionBombError):
        height, width = read_image(path).shape[:2]
        return Header(height, width)
    except PIXEL_ERRORS as error:
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


def _on_white(rgba: PillowImage.Image) -> PillowImage.Image:
    page = PillowImage.new("RGBA", rgba.size, "white")
    return PillowImage.alpha_composite(page, rgba).convert("RGB")


def _deep_colours(image: PillowImage.Image) -> Pixels | None:
    """Channels (H, W, C) of 16 bits, of which Pillow would keep the upper half; else None."""
    if not isinstance(image, ImageFile.ImageFile) or not _is_deep(image) or image.fp is None:
        return None
    file = image.fp
    place = file.tell()
    file.seek(0)
    data = file.read()
    file.seek(place)
    try:
        decoded = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error:
        return None
    if decoded is None or decoded.dtype != np.uint16:
        return None
    order = {3: [2, 1, 0], 4: [2, 1, 0, 3]}.get(decoded.shape[2] if decoded.ndim == 3 else 1)
    return None if order is None else decoded[:, :, order]


def _is_deep(image: ImageFile.ImageFile) -> bool:
    """Whether the file of a colour image that is not loaded yet has 16 bits a channel."""
    if image.mode not in ("RGB", "RGBA", "LA") or not image.tile:
        return False
    if image.format == "JPEG2000":
        return True  # its header is read by OpenCV; 8 bits are given back to Pillow
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        return max(image.tag_v2.get(_BITS_TAG, (8,))) == 16
    told = image.tile[0][3]
    white = told[-1] if image.format == "PPM" and isinstance(told, tuple) else None
    return ";16" in str(told) or white == FULL_WHITE


def _peak(image: PillowImage.Image) -> int:
    """The largest whole number of an image deeper than 8 bits; 0 for other images."""
    if image.mode.startswith("I"):
        return int(np.asarray(image).max())
    deep = _deep_colours(image)
    return 0 if deep is None else int(deep[:, :, :3].max())


def _from_channels(values: Pixels, white: float | None) -> Image:
    """Grey, grey and alpha, RGB or RGBA, (H, W, C), as RGB of 8 bits."""
    count = values.shape[2]
    colours = _to_bytes(values[:, :, : count - 1 if count in (2, 4) else count], white)
    rgb = np.repeat(colours, 3, axis=2) if colours.shape[2] == 1 else colours
    if count in (1, 3):
        return np.ascontiguousarray(rgb)
    alpha = _to_bytes(values[:, :, -1:], None)
    rgba = np.ascontiguousarray(np.concatenate([rgb, alpha], axis=2))
    return np.array(_on_white(PillowImage.fromarray(rgba)), dtype=np.uint8)


def _to_bytes(values: Pixels, white: float | None) -> Image:
    """Bring values deeper than 8 bits to 0..255 (see the head of this file)."""
    if values.dtype == np.uint8:
        return np.asarray(values, dtype=np.uint8)
    numbers = values.astype(np.float64)
    if not np.isfinite(numbers).all():
        raise ValueError("pixel values that are no numbers")
    low, high = float(numbers.min()), float(numbers.max())
    is_whole = np.issubdtype(values.dtype, np.integer)
    if white is not None:
        low, high = 0.0, float(white)
    elif is_whole and low >= 0 and high <= FULL_WHITE:
        low, high = 0.0, float(FULL_WHITE)
    scaled = (numbers - low) * (255.0 / (high - low or 1.0))
    return np.rint(np.clip(scaled, 0, 255)).astype(np.uint8)


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
