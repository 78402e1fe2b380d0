"""A tiny data set in three forms of the same boxes, made anew for each test."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest

from data.config import DataConfig, load_data_config
from utils.logger import get_logger

NAMES = ("cat", "dog")
# Per image: height, width and objects (class, x1, y1, x2, y2).
PICTURES = {
    "train": {
        "a": (40, 60, [(0, 6, 4, 30, 20), (1, 30, 20, 60, 40)]),
        "b": (64, 48, [(1, 12, 16, 36, 48)]),
        "c": (32, 32, []),
        "d": (50, 50, [(0, 0, 0, 25, 25), (0, 10, 10, 40, 45), (1, 5, 30, 15, 50)]),
    },
    "val": {"e": (48, 64, [(1, 16, 12, 48, 36)]), "f": (64, 64, [(0, 32, 32, 64, 64)])},
}


@pytest.fixture(autouse=True)
def _warnings_alone() -> Iterator[None]:
    """What `caplog` has, where a test asks for no more."""
    logger = get_logger()
    before = logger.level
    logger.setLevel(logging.WARNING)
    yield
    logger.setLevel(before)


def write_image(path: Path, height: int, width: int, seed: int = 0) -> None:
    """A noise picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    assert cv2.imwrite(str(path), pixels)


def yolo_rows(height: int, width: int, objects: list[tuple[int, ...]]) -> str:
    """The text of a YOLO label file."""
    rows = ""
    for label, left, top, right, bottom in objects:
        x, y = (left + right) / 2 / width, (top + bottom) / 2 / height
        rows += (
            f"{label} {x:.8f} {y:.8f} {(right - left) / width:.8f} {(bottom - top) / height:.8f}\n"
        )
    return rows


def voc_text(name: str, height: int, width: int, objects: list[tuple[int, ...]]) -> str:
    """The text of a VOC annotation."""
    parts = [f"<filename>{name}.png</filename>"]
    parts += [f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"]
    for label, left, top, right, bottom in objects:
        corners = f"<xmin>{left}</xmin><ymin>{top}</ymin><xmax>{right}</xmax><ymax>{bottom}</ymax>"
        parts += [f"<object><name>{NAMES[label]}</name><bndbox>{corners}</bndbox></object>"]
    return f"<annotation>{''.join(parts)}</annotation>"


def coco_document(pictures: dict[str, tuple[int, int, list[tuple[int, ...]]]]) -> dict[str, list]:
    """COCO annotations; category ids 7 (cat) and 3 (dog) are neither contiguous nor in order."""
    images, annotations = [], []
    for number, (name, (height, width, objects)) in enumerate(pictures.items(), 10):
        images.append({"id": number, "file_name": f"{name}.png", "height": height, "width": width})
        for label, left, top, right, bottom in objects:
            box = [left, top, right - left, bottom - top]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": (7, 3)[label],
                    "bbox": box,
                    "area": box[2] * box[3] / 2,
                    "iscrowd": 0,
                }
            )
    categories = [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}]
    return {"images": images, "annotations": annotations, "categories": categories}


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """Folder with images/, labels/, annotations/, voc/ and yolo.yaml, coco.yaml, voc.yaml."""
    for split, pictures in PICTURES.items():
        (tmp_path / "labels" / split).mkdir(parents=True)
        (tmp_path / "voc" / split).mkdir(parents=True)
        for seed, (name, (height, width, objects)) in enumerate(pictures.items()):
            write_image(tmp_path / "images" / split / f"{name}.png", height, width, seed)
            label = tmp_path / "labels" / split / f"{name}.txt"
            label.write_text(yolo_rows(height, width, objects))
            text = voc_text(name, height, width, objects)
            (tmp_path / "voc" / split / f"{name}.xml").write_text(text)
        (tmp_path / "annotations").mkdir(exist_ok=True)
        annotations = tmp_path / "annotations" / f"{split}.json"
        annotations.write_text(json.dumps(coco_document(pictures)))
    for form, pattern in {
        "yolo": "images/{}",
        "coco": "annotations/{}.json",
        "voc": "voc/{}",
    }.items():
        text = (
            f"train: {pattern.format('train')}\nval: {pattern.format('val')}\nnames: [cat, dog]\n"
        )
        (tmp_path / f"{form}.yaml").write_text(text)
    return tmp_path


@pytest.fixture
def config_of(tiny: Path) -> Callable[[str], DataConfig]:
    """Read the tiny set in the form `yolo`, `coco` or `voc`."""
    return lambda form: load_data_config(tiny / f"{form}.yaml")
