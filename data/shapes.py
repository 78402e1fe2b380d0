"""The built-in data set: coloured shapes on cluttered ground, drawn on first use.

    python data/shapes.py [folder]        python -m data.shapes [folder]

Nothing is downloaded. The pictures depend on the seed and the version below alone. Four hundred
for training, eighty for validation, forty for test, in YOLO form, with one to eight objects each;
objects overlap a little and some reach over the edge; every twentieth picture is empty.
"""

from __future__ import annotations

import math
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple, TypeAlias

import cv2
import numpy as np
from numpy.typing import NDArray

Image: TypeAlias = NDArray[np.uint8]
VERSION = "1"
SEED = 20
NAMES = ("circle", "square", "triangle", "star", "ring")
COUNTS = {"train": 400, "val": 80, "test": 40}
SIZES = ((240, 320), (320, 320), (320, 240), (256, 320))
STAMP = "VERSION"
EMPTY_EVERY = 20
MAX_OVERLAP = 0.3
MIN_INSIDE = 0.7
DEFAULT_FOLDER = Path(__file__).resolve().parents[1] / "datasets" / "shapes"


class Drawn(NamedTuple):
    """A shape's place on a picture.

    Attributes:
        label: index into `NAMES`.
        mask: True where the shape is, (H, W).
        box: xyxy pixels around the mask.
    """

    label: int
    mask: NDArray[np.bool_]
    box: tuple[int, int, int, int]


def draw_if_absent(folder: Path = DEFAULT_FOLDER) -> bool:
    """Draw the set unless this version of it is there already.

    It is drawn into a temporary folder and renamed, so that a broken run leaves no half set, and
    of two processes that draw at once one wins.

    Returns:
        True if it was drawn.
    """
    stamp = folder / STAMP
    if stamp.is_file() and stamp.read_text(encoding="utf-8").strip() == VERSION:
        return False
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".shapes-", dir=folder.parent))
    try:
        _draw_set(temporary)
        if stamp.is_file():
            shutil.rmtree(folder)
        temporary.chmod(0o755)
        os.rename(temporary, folder)
    except OSError:
        if not stamp.is_file():
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return True


def _draw_set(folder: Path) -> None:
    for number, (split, count) in enumerate(COUNTS.items()):
        images, labels = folder / "images" / split, folder / "labels" / split
        images.mkdir(parents=True)
        labels.mkdir(parents=True)
        for index in range(count):
            image, shapes = draw_picture(number, index)
            rows = [label_row(shape, image.shape[:2]) for shape in shapes]
            (labels / f"{index:04d}.txt").write_text("".join(rows), encoding="utf-8")
            encoded = cv2.imencode(".jpg", image[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, 90])[1]
            (images / f"{index:04d}.jpg").write_bytes(encoded.tobytes())
    (folder / STAMP).write_text(f"{VERSION}\n", encoding="utf-8")


def label_row(shape: Drawn, size: tuple[int, ...]) -> str:
    """The line of a YOLO label file."""
    left, top, right, bottom = shape.box
    x, y = (left + right) / 2 / size[1], (top + bottom) / 2 / size[0]
    width, height = (right - left) / size[1], (bottom - top) / size[0]
    return f"{shape.label} {x:.6f} {y:.6f} {width:.6f} {height:.6f}\n"


def draw_picture(split: int, index: int) -> tuple[Image, list[Drawn]]:
    """One picture of the set and what is on it."""
    rng = np.random.default_rng((SEED, split, index))
    size = SIZES[int(rng.integers(len(SIZES)))]
    image = _ground(size, rng)
    _clutter(image, rng)
    shapes: list[Drawn] = []
    is_empty = index % EMPTY_EVERY == EMPTY_EVERY - 1
    wanted = 0 if is_empty else int(rng.integers(1, 9))
    for _ in range(wanted * 6):
        if len(shapes) == wanted:
            break
        shape = _place(size, rng)
        if shape is not None and not any(_overlap(shape, other) for other in shapes):
            shapes.append(shape)
            _paint(image, shape, rng)
    noise = rng.normal(0, rng.uniform(2, 8), image.shape)
    return np.clip(image + noise, 0, 255).astype(np.uint8), shapes


def _ground(size: tuple[int, int], rng: np.random.Generator) -> Image:
    """A soft texture: coarse colours, blown up."""
    cells = rng.integers(2, 9, 2)
    centre = rng.uniform(50, 205, 3)
    coarse = centre + rng.normal(0, rng.uniform(5, 28), (int(cells[0]), int(cells[1]), 3))
    smooth = cv2.resize(coarse.astype(np.float32), size[::-1], interpolation=cv2.INTER_CUBIC)
    return np.clip(smooth, 0, 255).astype(np.uint8)


def _clutter(image: Image, rng: np.random.Generator) -> None:
    """Lines, scribble that looks like writing, and specks: what is no object."""
    height, width = image.shape[:2]
    for _ in range(int(rng.integers(0, 9))):
        ends = rng.uniform(-20, 340, 4).astype(int)
        cv2.line(image, ends[:2].tolist(), ends[2:].tolist(), _colour(rng), int(rng.integers(1, 4)))
    for _ in range(int(rng.integers(0, 4))):
        letters = rng.integers(33, 127, int(rng.integers(2, 9)))
        text = "".join(chr(letter) for letter in letters)
        corner = (int(rng.uniform(0, width * 0.7)), int(rng.uniform(10, height)))
        scale = float(rng.uniform(0.3, 0.8))
        cv2.putText(image, text, corner, cv2.FONT_HERSHEY_SIMPLEX, scale, _colour(rng), 1)
    for _ in range(int(rng.integers(0, 30))):
        spot = (int(rng.uniform(0, width)), int(rng.uniform(0, height)))
        cv2.circle(image, spot, int(rng.integers(1, 4)), _colour(rng), -1)


def _colour(rng: np.random.Generator) -> tuple[float, float, float]:
    red, green, blue = rng.uniform(0, 255, 3)
    return float(red), float(green), float(blue)


def _place(size: tuple[int, int], rng: np.random.Generator) -> Drawn | None:
    """A shape somewhere on the picture; None if too much of it lies outside."""
    label = int(rng.integers(len(NAMES)))
    # Even in the logarithm: small ones are as frequent as large ones.
    radius = math.exp(rng.uniform(math.log(14), math.log(64)))
    centre = rng.uniform(0, 1, 2) * (size[1], size[0])
    margin = 130
    whole = np.zeros((size[0] + 2 * margin, size[1] + 2 * margin), dtype=np.uint8)
    _outline(whole, label, centre + margin, radius, rng)
    mask = whole[margin:-margin, margin:-margin] > 0
    if mask.sum() < MIN_INSIDE * (whole > 0).sum():
        return None
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
    return Drawn(label, mask, box)


def _outline(
    canvas: Image, label: int, centre: NDArray[np.float64], radius: float, rng: np.random.Generator
) -> None:
    """Draw the filled form of a shape with value 255."""
    turn, stretch = rng.uniform(0, 2 * math.pi), rng.uniform(0.8, 1.0)
    name = NAMES[label]
    if name in ("circle", "ring"):
        points = _polygon(64, radius, radius)
    elif name == "star":
        points = _polygon(10, radius, radius * 0.45)
    else:
        points = _polygon(4 if name == "square" else 3, radius, radius)
    points = points * (1.0, stretch)
    rotation = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
    turned = points @ rotation.T
    cv2.fillPoly(canvas, [np.rint(turned + centre).astype(np.int32)], 255)
    if name == "ring":
        inner = turned * rng.uniform(0.5, 0.65)
        cv2.fillPoly(canvas, [np.rint(inner + centre).astype(np.int32)], 0)


def _polygon(corners: int, radius: float, inner_radius: float) -> NDArray[np.float64]:
    """Corners on a circle; every second one on the inner circle, (corners, 2)."""
    angles = np.arange(corners) * (2 * math.pi / corners)
    radii = np.where(np.arange(corners) % 2 == 0, radius, inner_radius)
    return np.stack([np.cos(angles) * radii, np.sin(angles) * radii], axis=1)


def _overlap(first: Drawn, second: Drawn) -> bool:
    """True if the box of one covers too much of the other's."""
    left, top = max(first.box[0], second.box[0]), max(first.box[1], second.box[1])
    right, bottom = min(first.box[2], second.box[2]), min(first.box[3], second.box[3])
    shared = max(0, right - left) * max(0, bottom - top)
    areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in (first.box, second.box)]
    return shared > MAX_OVERLAP * min(areas)


def _paint(image: Image, shape: Drawn, rng: np.random.Generator) -> None:
    """Fill a shape with a colour that stands out, shaded, some with an edge line."""
    ground = image[shape.mask].mean(axis=0)
    colour = np.array(_colour(rng))
    while np.abs(colour - ground).max() < 70:
        colour = np.array(_colour(rng))
    left, top, right, bottom = shape.box
    slope = rng.uniform(-25, 25, 2)
    rows = np.linspace(-1, 1, bottom - top)[:, None] * slope[0]
    columns = np.linspace(-1, 1, right - left)[None, :] * slope[1]
    shaded = np.clip(colour + (rows + columns)[:, :, None], 0, 255)
    inside = shape.mask[top:bottom, left:right]
    region = image[top:bottom, left:right]
    region[inside] = shaded[inside].astype(np.uint8)
    if rng.random() < 0.3:
        outline = cv2.findContours(
            shape.mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE
        )[0]
        cv2.drawContours(image, outline, -1, (colour * 0.4).tolist(), 1)


def main() -> None:
    """Draw the set into the folder named on the command line, or the usual one."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else DEFAULT_FOLDER
    done = "drawn" if draw_if_absent(folder) else "already there"
    print(f"{folder}: {sum(COUNTS.values())} pictures of {', '.join(NAMES)}, {done}")


if __name__ == "__main__":
    main()
