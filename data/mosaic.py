"""Putting several pictures into one: mosaics of four and nine, and mixing two.

Mosaic is from YOLOv4 (Bochkovskiy et al. 2020, arXiv 2004.10934, section 3.3), mixup from Zhang
et al. 2017 (arXiv 1710.09412). Sizes are (height, width); boxes are xyxy pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from data.images import Image
from data.transforms import FILL, Picture, clip_boxes, keep_visible

MIX_CONCENTRATION = 32.0
"""Parameter of the Beta distribution that mixup draws its share from: near one half."""


def mosaic4(
    pictures: Sequence[Picture], size: tuple[int, int], rng: np.random.Generator
) -> Picture:
    """Four pictures around a random point.

    The canvas is twice `size`; the point lies in its middle half, and every picture touches it
    with one corner.

    Args:
        pictures: four, each resized to fit into `size`.
        size: of one picture.
        rng: where the point comes from.
    """
    height, width = size
    y = int(rng.integers(height // 2, height + height // 2 + 1))
    x = int(rng.integers(width // 2, width + width // 2 + 1))
    rows, columns = (0, y, 2 * height), (0, x, 2 * width)
    return _grid(pictures, rows, columns, (2 * height, 2 * width))


def mosaic9(
    pictures: Sequence[Picture], size: tuple[int, int], rng: np.random.Generator
) -> Picture:
    """Nine pictures, three by three, seen through a window of twice `size` at a random place.

    Args:
        pictures: nine, each resized to fit into `size`; the first of them need not be the middle.
        size: of one picture.
        rng: where the window's place comes from.
    """
    height, width = size
    top, left = int(rng.integers(0, height + 1)), int(rng.integers(0, width + 1))
    rows = tuple(k * height - top for k in range(4))
    columns = tuple(k * width - left for k in range(4))
    return _grid(pictures, rows, columns, (2 * height, 2 * width))


def mixup(first: Picture, second: Picture, rng: np.random.Generator) -> Picture:
    """Blend two pictures of one size; the objects of both stay."""
    share = float(rng.beta(MIX_CONCENTRATION, MIX_CONCENTRATION))
    blended = cv2.addWeighted(
        np.ascontiguousarray(first.image), share, np.ascontiguousarray(second.image), 1 - share, 0
    )
    return Picture(
        np.asarray(blended, dtype=np.uint8),
        np.concatenate([first.labels, second.labels]),
        np.concatenate([first.boxes, second.boxes]),
    )


def _grid(
    pictures: Sequence[Picture],
    rows: Sequence[int],
    columns: Sequence[int],
    canvas_size: tuple[int, int],
) -> Picture:
    """Lay pictures into the cells between the given lines, row by row, drawn towards the middle."""
    across, down = len(columns) - 1, len(rows) - 1
    assert len(pictures) == across * down, "one picture per cell"
    canvas: Image = np.full((*canvas_size, 3), FILL, dtype=np.uint8)
    labels, boxes = [], []
    for number, picture in enumerate(pictures):
        row, column = divmod(number, across)
        top = _start(rows[row], rows[row + 1], picture.image.shape[0], row, down)
        left = _start(columns[column], columns[column + 1], picture.image.shape[1], column, across)
        cell = (rows[row], columns[column], rows[row + 1], columns[column + 1])
        placed, kept = _paste(canvas, picture, (top, left), cell)
        labels.append(picture.labels[kept])
        boxes.append(placed[kept])
    return Picture(canvas, np.concatenate(labels), np.concatenate(boxes))


def _start(low: int, high: int, length: int, place: int, count: int) -> int:
    """Where a picture begins: outer cells push it inwards, the middle one centres it."""
    if 2 * place + 1 < count:
        return high - length
    if 2 * place + 1 > count:
        return low
    return (low + high - length) // 2


def _paste(
    canvas: Image,
    picture: Picture,
    corner: tuple[int, int],
    cell: tuple[int, int, int, int],
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Copy what of a picture lies in its cell onto the canvas.

    Args:
        canvas: written to.
        picture: what is copied.
        corner: top and left of the picture on the canvas; may be negative.
        cell: top, left, bottom, right; may reach beyond the canvas.

    Returns:
        The boxes on the canvas, cut at the cell, and which of them are still worth keeping.
    """
    height, width = picture.image.shape[:2]
    top, left = max(corner[0], cell[0], 0), max(corner[1], cell[1], 0)
    bottom = max(min(corner[0] + height, cell[2], canvas.shape[0]), top)
    right = max(min(corner[1] + width, cell[3], canvas.shape[1]), left)
    rows = slice(top - corner[0], bottom - corner[0])
    columns = slice(left - corner[1], right - corner[1])
    canvas[top:bottom, left:right] = picture.image[rows, columns]

    moved = picture.boxes + np.array([corner[1], corner[0]] * 2, dtype=np.float32)
    offset = np.array([left, top] * 2, dtype=np.float32)
    cut = clip_boxes(moved - offset, bottom - top, right - left) + offset
    return cut, keep_visible(moved, cut)
