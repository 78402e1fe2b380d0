"""A tiny data set and model, and the scripts as a user runs them."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("square", "disc")
SIDE = 96
LEFT = {"datasets", "runs", "__pycache__", "build", "dist"}
# A detector of 12 thousand parameters: two levels of a narrow trunk under YOLOv5's head.
TINY_MODEL = """
nc: 2
anchors:
  - [10,10, 20,20]
  - [24,24, 30,30]
backbone:
  - [-1, 1, Conv, [8, 3, 2]]
  - [-1, 1, Conv, [16, 3, 2]]
  - [-1, 1, Conv, [16, 3, 2], p3]
  - [-1, 1, C3, [24]]
  - [-1, 1, Conv, [24, 3, 2], p4]
head:
  - [-1, 1, nn.Upsample, [None, 2, nearest]]
  - [[-1, p3], 1, Concat, [1]]
  - [-1, 1, Conv, [16, 1], out3]
  - [[out3, p4], 1, Detect, [nc, anchors]]
"""


@functools.cache
def own_files() -> frozenset[Path]:
    """Paths of the project's files from its root, without what tools and runs left there."""
    found = []
    for folder, inner, names in os.walk(ROOT):
        inner[:] = [name for name in inner if name not in LEFT and not name.startswith(".")]
        found += [Path(folder, name).relative_to(ROOT) for name in names]
    return frozenset(found)


def draw_picture(rng: np.random.Generator, count: int) -> tuple[np.ndarray, list[str]]:
    """A picture with `count` bright squares and dark discs, and its rows in YOLO form."""
    picture = rng.integers(90, 130, (SIDE, SIDE, 3), dtype=np.uint8)
    rows = []
    for number in range(count):
        label, radius = number % 2, int(rng.integers(8, 18))
        x, y = (int(v) for v in rng.integers(radius, SIDE - radius, 2))
        if label == 0:
            picture[y - radius : y + radius, x - radius : x + radius] = (240, 200, 40)
        else:
            cv2.circle(picture, (x, y), radius, (20, 20, 60), -1)
        rows.append(f"{label} {x / SIDE} {y / SIDE} {2 * radius / SIDE} {2 * radius / SIDE}")
    return picture, rows


def draw_data(folder: Path, train: int = 8, val: int = 4) -> Path:
    """A data set in YOLO form, the last training image without objects; returns its YAML."""
    for split, count in (("train", train), ("val", val)):
        (folder / "images" / split).mkdir(parents=True)
        (folder / "labels" / split).mkdir(parents=True)
        for number in range(count):
            rng = np.random.default_rng((len(split), number))
            is_empty = split == "train" and number == count - 1
            picture, rows = draw_picture(rng, 0 if is_empty else 2 + number % 3)
            cv2.imwrite(str(folder / "images" / split / f"{number}.png"), picture)
            label = folder / "labels" / split / f"{number}.txt"
            label.write_text("".join(row + "\n" for row in rows))
    path = folder / "data.yaml"
    path.write_text(f"train: images/train\nval: images/val\nnames: [{', '.join(NAMES)}]\n")
    return path


def start_script(
    *words: object, cwd: Path, group: bool = False, **environment: str
) -> subprocess.Popen[str]:
    """Start `python <script> ...` from another folder, on one thread; a bare name is a script of ours.

    With `group` it and its children are a process group of their own.
    """
    script, *rest = (str(word) for word in words)
    script = str(ROOT / script) if script.endswith(".py") else script
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(
        [sys.executable, script, *rest],
        cwd=cwd,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=group,
    )
