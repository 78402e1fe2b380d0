"""A healthy data set of small pictures, and faults to plant in it."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

SIDE = 128
NAMES = ("cat", "dog", "Dogs", "lynx", "bear", "wolf")
Rows = list[tuple[int, float, float, float, float]]
"""Class and xyxy in pixels."""


def picture(seed: int, height: int = SIDE, width: int = SIDE) -> NDArray[np.uint8]:
    """Coloured patches with some noise, other ones for every seed."""
    rng = np.random.default_rng(seed)
    patches = rng.integers(0, 255, (7, 7, 3), dtype=np.uint8)
    whole = cv2.resize(patches, (width, height), interpolation=cv2.INTER_CUBIC)
    return np.clip(whole + rng.normal(0, 3, whole.shape), 0, 255).astype(np.uint8)


def objects(seed: int) -> Rows:
    """Two objects of 30 to 50 pixels in the left and the right half; classes cat, dog and Dogs in turn."""
    rng = np.random.default_rng(seed)
    rows: Rows = []
    for left in (0, SIDE / 2):
        width, height = rng.uniform(30, 50, 2)
        x, y = left + rng.uniform(0, SIDE / 2 - width), rng.uniform(0, SIDE - height)
        rows.append((seed % 3, x, y, x + width, y + height))
    return rows


def yolo_text(rows: Rows, height: int = SIDE, width: int = SIDE) -> str:
    """Lines of a label file."""
    lines = []
    for label, left, top, right, bottom in rows:
        x, y = (left + right) / 2 / width, (top + bottom) / 2 / height
        size = f"{(right - left) / width:.6f} {(bottom - top) / height:.6f}"
        lines.append(f"{label} {x:.6f} {y:.6f} {size}\n")
    return "".join(lines)


class Planter:
    """Writes a YOLO data set, and remembers what a check has to find in it.

    Attributes:
        folder: of the data set.
        expected: kind and stem of the file, or name of the class or split, of every planted fault.
    """

    def __init__(self, folder: Path, counts: tuple[int, int] = (42, 9)) -> None:
        self.folder, self.seed = folder, 0
        self.expected: set[tuple[str, str]] = set()
        for split, count in zip(("train", "val"), counts):
            (folder / "images" / split).mkdir(parents=True)
            (folder / "labels" / split).mkdir(parents=True)
            for k in range(count):
                self.add(split, f"{split}{k:02d}")

    def add(
        self,
        split: str,
        name: str,
        text: str | None = None,
        image: NDArray[np.uint8] | bytes | None = None,
        suffix: str = ".png",
        kinds: str | None = None,
    ) -> None:
        """A picture with its labels; `kinds`, parted by commas, is what is wrong with it."""
        self.seed += 1
        path = self.folder / "images" / split / f"{name}{suffix}"
        image = picture(self.seed) if image is None else image
        data = image if isinstance(image, bytes) else cv2.imencode(suffix, image)[1].tobytes()
        path.write_bytes(data)
        text = yolo_text(objects(self.seed)) if text is None else text
        (self.folder / "labels" / split / f"{name}.txt").write_text(text)
        self.expected |= {(kind, name) for kind in (kinds.split(",") if kinds else ())}

    def read(self, split: str, name: str) -> tuple[NDArray[np.uint8], str]:
        """Picture and labels as they stand."""
        image = cv2.imread(str(self.folder / "images" / split / f"{name}.png"))
        return image, (self.folder / "labels" / split / f"{name}.txt").read_text()

    def yaml(self, names: tuple[str, ...] = ("cat", "dog", "fox"), **splits: str) -> Path:
        """The data YAML."""
        given = {"train": "images/train", "val": "images/val", **splits}
        lines = [*(f"{key}: {value}" for key, value in given.items()), f"names: {list(names)}"]
        path = self.folder / "data.yaml"
        path.write_text("\n".join(lines))
        return path

    def plant_files(self) -> None:
        """Eight faults of files."""
        whole = cv2.imencode(".jpg", picture(900))[1].tobytes()
        self.add("train", "cut", image=whole[:-400], suffix=".jpg", kinds="unreadable")
        self.add("train", "text", image=b"no image", suffix=".jpg", kinds="unreadable")
        self.add("val", "nothing", image=b"", kinds="unreadable")
        for suffix in (".png", ".bmp"):
            self.add("train", "both", "0 .5 .5 .3 .3\n", suffix=suffix, kinds="shared")
        (self.folder / "labels/train/alone.txt").write_text("0 .5 .5 .3 .3\n")
        (self.folder / "images/train/raw.xyz").write_bytes(b"?")
        self.add("train", "unlabelled", kinds="background")
        (self.folder / "labels/train/unlabelled.txt").unlink()
        self.expected |= {("unused", "alone"), ("suffix", "raw")}
        (self.folder / "images/test").mkdir()
        (self.folder / "labels/test").mkdir()
        self.add("test", "listed", kinds="repeated")
        (self.folder / "test.txt").write_text("images/test/listed.png\n" * 2)

    def plant_pictures(self) -> None:
        """Ten faults of pictures."""
        self.add("train", "flat", "", np.full((SIDE, SIDE, 3), 7, np.uint8), kinds="flat")
        small = picture(901, 24, 40)
        self.add("train", "tiny", "", small, kinds="tiny")
        self.add("train", "strip", "", picture(902, 40, 400), kinds="strip")
        grey = picture(903)
        grey[:] = grey.mean(2, keepdims=True)
        self.add("train", "grey", image=grey, kinds="grey")
        image, text = self.read("train", "train00")
        self.add("val", "same", text, image, kinds="leak")
        bright = np.clip(image * 0.8 + 40, 0, 255).astype(np.uint8)
        self.add("val", "bright", text, bright, ".jpg", kinds="near leak")
        self.add("val", "mirrored", image=np.ascontiguousarray(image[:, ::-1]), kinds="near leak")
        moved = cv2.resize(self.read("train", "train01")[0][3:, 3:], (200, 200))
        self.add("val", "moved", image=moved, kinds="near leak")
        image, text = self.read("train", "train02")
        self.add("train", "twin", text, image, kinds="twin")
        self.add("train", "z-other", "0 .3 .3 .3 .3\n", image, kinds="twin,conflict")
        image = cv2.resize(self.read("train", "train03")[0], (180, 180))
        self.add("train", "z-larger", image=image, kinds="near twin")

    def plant_rows(self) -> None:
        """Fourteen faults of rows and boxes."""
        for name, text, kind in (
            ("class", "9 .5 .5 .3 .3\n", "broken"),
            ("word", "0 .5 half .3 .3\n", "broken"),
            ("pixels", "0 64 64 40 40\n", "broken"),
            ("columns", "0 .5 .5 .3\n", "broken"),
            ("nan", "0 .5 .5 nan .3\n", "broken"),
            ("edge", "0 .9 .5 .4 .3\n", "outside"),
            ("beyond", "0 1.009 .5 .01 .3\n", "away,outside"),
            ("none", "0 .5 .5 0 .3\n", "empty"),
            ("again", "0 .5 .5 .3 .3\n" * 2, "duplicate"),
            ("double", "0 .5 .5 .3 .3\n0 .503 .5 .3 .3\n", "double"),
            ("contested", "0 .5 .5 .3 .3\n1 .503 .5 .3 .3\n", "contested"),
            ("whole", "0 .5 .5 1 1\n", "whole"),
            ("sliver", "0 .5 .5 .3 .01\n", "sliver"),
            ("speck", "1 .5 .5 .03 .03\n", "outlier"),
        ):
            self.add("train", name, text, kinds=kind)
        self.expected -= {("outside", "beyond")}
        self.add("train", "z-copied", self.read("train", "train05")[1], kinds="copied")

    def plant_classes(self) -> tuple[str, ...]:
        """Four faults of classes; gives the names."""
        self.add("train", "a-lynx", "3 .4 .4 .3 .3\n")
        self.add("val", "a-lynx", "3 .6 .6 .3 .3\n")
        self.add("val", "a-bear", "4 .4 .6 .3 .3\n")
        pairs = (
            ("rare", "lynx"),
            ("unlearned", "bear"),
            ("unused class", "wolf"),
            ("alike", "Dogs"),
        )
        self.expected |= set(pairs)
        return NAMES
