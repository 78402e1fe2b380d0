"""What happens to one picture and its boxes: letterbox, warp, colours, flips.

Boxes are xyxy in continuous pixels: pixel (x, y) covers [x, x + 1) x [y, y + 1), so the right edge
of a W wide image is W. Sizes are (height, width). All chance comes from the caller's generator.
n is the number of objects of a picture.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple, TypeAlias

import cv2
import numpy as np
from numpy.typing import NDArray

from data.images import Image
from utils.structures import Letterbox

FILL = 114
"""Grey of padding and of the ground under a mosaic, in all three channels."""
MIN_SIDE = 2.0
MIN_VISIBLE = 0.1
MAX_ASPECT = 100.0
UNCUT = 0.99
"""Of an object this much of whose area is left nothing was cut but what rounding takes."""

Boxes: TypeAlias = NDArray[np.float32]
"""xyxy pixels, (n, 4)."""
Labels: TypeAlias = NDArray[np.int64]
"""Class indices, (n,)."""


class Picture(NamedTuple):
    """An image with its objects.

    Attributes:
        image: RGB, (H, W, 3), uint8.
        labels: class indices, (n,).
        boxes: xyxy in pixels of `image`, (n, 4).
    """

    image: Image
    labels: Labels
    boxes: Boxes


def fitted_size(height: int, width: int, size: tuple[int, int]) -> tuple[int, int]:
    """Height and width after `resize_to_fit`, at the largest factor at which an image still fits into `size`."""
    scale = min(size[0] / height, size[1] / width)
    new_height = min(max(round(height * scale), 1), size[0])
    new_width = min(max(round(width * scale), 1), size[1])
    return new_height, new_width


def resize_to_fit(image: Image, size: tuple[int, int]) -> Image:
    """Scale an image, keeping its shape, until it just fits into `size`.

    Shrinking averages over areas (no aliasing), enlarging is bilinear.
    """
    height, width = image.shape[:2]
    new_height, new_width = fitted_size(height, width, size)
    if (new_height, new_width) == (height, width):
        return image
    method = cv2.INTER_AREA if new_height < height else cv2.INTER_LINEAR
    resized = cv2.resize(image, (new_width, new_height), interpolation=method)
    return np.asarray(resized, dtype=np.uint8)


def pad_to(
    image: Image, size: tuple[int, int], original: tuple[int, int]
) -> tuple[Image, Letterbox]:
    """Centre a resized image on a grey ground.

    Args:
        image: already resized, no larger than `size`.
        size: of the result.
        original: size of the image before it was resized; kept in the letterbox.
    """
    height, width = image.shape[:2]
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    box = Letterbox(original[0], original[1], height / original[0], width / original[1], top, left)
    if (height, width) == tuple(size):
        return image, box
    ground = np.full((size[0], size[1], 3), FILL, dtype=np.uint8)
    ground[top : top + height, left : left + width] = image
    return ground, box


def letterbox(
    image: Image, size: tuple[int, int], *, stride: int | None = None
) -> tuple[Image, Letterbox]:
    """Resize an image to fit into `size`, keeping its shape, and pad it with grey, centred.

    Args:
        image: RGB, (H, W, 3).
        size: of the result.
        stride: if given, pad only to the next multiple of `stride`: the smallest rectangle that
            a network of that stride takes, for detection.

    Returns:
        The padded image and the way back to the original pixels.
    """
    original = (image.shape[0], image.shape[1])
    resized = resize_to_fit(image, size)
    if stride is not None:
        size = (
            math.ceil(resized.shape[0] / stride) * stride,
            math.ceil(resized.shape[1] / stride) * stride,
        )
    return pad_to(resized, size, original)


def letterbox_boxes(boxes: Boxes, box: Letterbox) -> Boxes:
    """Carry boxes from original pixels to the pixels of the letterboxed image."""
    scale = np.array([box.scale_x, box.scale_y] * 2)
    return (boxes * scale + np.array([box.left, box.top] * 2)).astype(np.float32)


def flip_horizontally(picture: Picture) -> Picture:
    """Mirror left and right."""
    boxes = picture.boxes.copy()
    boxes[:, [0, 2]] = picture.image.shape[1] - picture.boxes[:, [2, 0]]
    return Picture(picture.image[:, ::-1], picture.labels, boxes)


def flip_vertically(picture: Picture) -> Picture:
    """Mirror top and bottom."""
    boxes = picture.boxes.copy()
    boxes[:, [1, 3]] = picture.image.shape[0] - picture.boxes[:, [3, 1]]
    return Picture(picture.image[::-1], picture.labels, boxes)


def random_flips(picture: Picture, hyp: Mapping[str, float], rng: np.random.Generator) -> Picture:
    """Mirror with the probabilities `flipud` and `fliplr`."""
    upside_down, mirrored = rng.random(2)
    if upside_down < hyp.get("flipud", 0.0):
        picture = flip_vertically(picture)
    if mirrored < hyp.get("fliplr", 0.0):
        picture = flip_horizontally(picture)
    return picture


def random_colours(image: Image, hyp: Mapping[str, float], rng: np.random.Generator) -> Image:
    """Turn the hue and stretch saturation and brightness.

    The hue is turned by up to `hsv_h` of the colour circle either way; saturation and value are
    multiplied by a factor within 1 +- `hsv_s` and 1 +- `hsv_v`. One table per channel.
    """
    limits = np.array([hyp.get("hsv_h", 0.0), hyp.get("hsv_s", 0.0), hyp.get("hsv_v", 0.0)])
    draws = rng.uniform(-1.0, 1.0, 3) * limits
    if not limits.any():
        return image
    steps = np.arange(256)
    # OpenCV holds 8-bit hue in half degrees, 0 to 179.
    hue = (steps + round(draws[0] * 180)) % 180
    saturation = np.clip(steps * (1 + draws[1]), 0, 255)
    value = np.clip(steps * (1 + draws[2]), 0, 255)
    table = np.rint(np.stack([hue, saturation, value], axis=1)).astype(np.uint8)
    in_hsv = cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2HSV)
    shifted = cv2.LUT(in_hsv, table.reshape(1, 256, 3))
    return np.asarray(cv2.cvtColor(shifted, cv2.COLOR_HSV2RGB), dtype=np.uint8)


def keep_visible(before: Boxes, after: Boxes) -> NDArray[np.bool_]:
    """Which objects are still worth learning after their boxes were cut.

    Args:
        before: boxes before they were cut at an edge, (n, 4), in the same scale.
        after: the cut boxes, (n, 4).

    Returns:
        True where both sides exceed 2 pixels, a tenth of the area is left and, of what was cut, the
        longer side is under a hundred times the shorter, (n,).
    """
    sides = after[:, 2:] - after[:, :2]
    width, height = sides[:, 0], sides[:, 1]
    whole = (before[:, 2] - before[:, 0]) * (before[:, 3] - before[:, 1])
    visible = width * height / np.maximum(whole, 1e-9)
    aspect = sides.max(axis=1, initial=0) / np.maximum(sides.min(axis=1, initial=np.inf), 1e-9)
    large = (width > MIN_SIDE) & (height > MIN_SIDE)
    is_sliver = (aspect >= MAX_ASPECT) & (visible < UNCUT)
    return large & (visible >= MIN_VISIBLE) & ~is_sliver


def clip_boxes(boxes: Boxes, height: float, width: float) -> Boxes:
    """Cut boxes at the edges of an image."""
    limits = np.array([width, height, width, height], dtype=np.float32)
    return np.clip(boxes, np.float32(0), limits)


def random_affine(
    picture: Picture,
    size: tuple[int, int],
    hyp: Mapping[str, float],
    rng: np.random.Generator,
    zoom: float = 1.0,
) -> Picture:
    """Turn, scale, shear, shift and tilt a picture by chance; the result has the given size.

    Keys of `hyp`: `degrees` (+-), `scale` (factor within 1 +- it), `shear` (+- degrees on each
    axis), `translate` (+- fraction of the result's sides), `perspective` (+- per pixel). `zoom` is the
    factor at rest.
    """
    source = (picture.image.shape[0], picture.image.shape[1])
    matrix = random_matrix(source, size, hyp, rng, zoom)
    return warp(picture, matrix, size)


def random_matrix(
    source: tuple[int, int],
    size: tuple[int, int],
    hyp: Mapping[str, float],
    rng: np.random.Generator,
    zoom: float = 1.0,
) -> NDArray[np.float64]:
    """Draw a 3 x 3 matrix from source pixels to result pixels; centre goes to centre at rest."""
    draws = rng.uniform(-1.0, 1.0, 8)
    angle = math.radians(hyp.get("degrees", 0.0) * draws[0])
    scale = zoom * (1.0 + hyp.get("scale", 0.0) * draws[1])
    shear_x, shear_y = (math.tan(math.radians(hyp.get("shear", 0.0) * d)) for d in draws[2:4])
    tilt_x, tilt_y = hyp.get("perspective", 0.0) * draws[4:6]
    shift_x, shift_y = hyp.get("translate", 0.0) * draws[6:8] * (size[1], size[0])
    cos, sin = scale * math.cos(angle), scale * math.sin(angle)

    to_centre = np.array([[1, 0, -source[1] / 2], [0, 1, -source[0] / 2], [0, 0, 1]])
    tilt = np.array([[1, 0, 0], [0, 1, 0], [tilt_x, tilt_y, 1]])
    turn = np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]])
    slant = np.array([[1, shear_x, 0], [shear_y, 1, 0], [0, 0, 1]])
    place = np.array([[1, 0, size[1] / 2 + shift_x], [0, 1, size[0] / 2 + shift_y], [0, 0, 1]])
    return np.asarray(place @ slant @ turn @ tilt @ to_centre, dtype=np.float64)


def warp(picture: Picture, matrix: NDArray[np.float64], size: tuple[int, int]) -> Picture:
    """Apply a 3 x 3 matrix to image and boxes; objects that (nearly) left the image are dropped."""
    image = warp_image(picture.image, matrix, size)
    moved = warp_boxes(picture.boxes, matrix)
    cut = clip_boxes(moved, *size)
    kept = keep_visible(moved, cut)
    return Picture(image, picture.labels[kept], cut[kept])


def warp_image(image: Image, matrix: NDArray[np.float64], size: tuple[int, int]) -> Image:
    """Warp an image with a matrix that is written for continuous pixel coordinates."""
    # OpenCV puts a pixel's centre on whole numbers; half a pixel lies between that and ours.
    half = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]])
    centred = np.linalg.inv(half) @ matrix @ half
    shape, ground = (size[1], size[0]), (FILL, FILL, FILL)
    is_affine = not centred[2, :2].any()
    if is_affine and np.allclose(centred, np.eye(3)) and image.shape[:2] == tuple(size):
        return image
    if is_affine:
        return np.asarray(cv2.warpAffine(image, centred[:2], shape, borderValue=ground), np.uint8)
    return np.asarray(cv2.warpPerspective(image, centred, shape, borderValue=ground), np.uint8)


def warp_boxes(boxes: Boxes, matrix: NDArray[np.float64]) -> Boxes:
    """The upright boxes around the warped corners of `boxes`, not yet cut."""
    corners = boxes[:, [0, 1, 2, 1, 2, 3, 0, 3]].reshape(-1, 4, 2).astype(np.float64)
    ones = np.ones((len(corners), 4, 1))
    moved = np.concatenate([corners, ones], axis=2) @ matrix.T
    points = moved[:, :, :2] / moved[:, :, 2:]
    return np.concatenate([points.min(axis=1), points.max(axis=1)], axis=1).astype(np.float32)
