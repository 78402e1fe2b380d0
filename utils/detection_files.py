"""Files of what was found in pictures, as detect.py and the hub write them: names that are safe, and crops."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from utils.visualize import save_image

LONGEST_STEM = 200  # bytes of a file name, which may have 255 with what is put behind it
CROP_MARGIN = 1.02  # of a box's sides
CROP_PAD = 10  # pixels


def safe_name(text: str, otherwise: str) -> str:
    """`text` as the name of a file or folder: letters, digits and `- _ . space`, never `..`."""
    safe = "".join(c if c.isalnum() or c in "-_. " else "_" for c in text).strip(". ")
    return safe or otherwise


def fitting_stem(path: str) -> str:
    """The stem of a file's name, so short that endings fit behind it, and more than dots."""
    stem = Path(path).stem
    short = os.fsdecode(os.fsencode(stem)[:LONGEST_STEM]) if len(stem) > LONGEST_STEM // 4 else stem
    return short if short.strip(".") else "image"


def cut_boxes(image: NDArray[np.uint8], boxes: Tensor) -> list[NDArray[np.uint8]]:
    """The parts of a picture (H, W, 3) under boxes (K, 4), xyxy in its pixels, at least one pixel each.

    Each is cut 2 % and 10 pixels wider and higher than its box, as far as the picture goes.
    """
    parts = []
    height, width = image.shape[:2]
    for x1, y1, x2, y2 in boxes.tolist():
        across, down = (side * CROP_MARGIN / 2 + CROP_PAD / 2 for side in (x2 - x1, y2 - y1))
        centre_x, centre_y = (x1 + x2) / 2, (y1 + y2) / 2
        left = min(max(int(centre_x - across), 0), width - 1)
        top = min(max(int(centre_y - down), 0), height - 1)
        right = min(max(round(centre_x + across), left + 1), width)
        bottom = min(max(round(centre_y + down), top + 1), height)
        parts.append(image[top:bottom, left:right].copy())
    return parts


def save_crops(
    folder: Path, stem: str, crops: Sequence[NDArray[np.uint8]], names: Sequence[str]
) -> None:
    """Write crops to `<folder>/crops/<class>/<stem>_<number>.jpg`; `names` are those of their classes."""
    for number, (crop, name) in enumerate(zip(crops, names, strict=True)):
        save_image(folder / "crops" / safe_name(name, "class") / f"{stem}_{number}.jpg", crop)
