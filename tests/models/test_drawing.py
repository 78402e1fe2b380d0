"""Drawings of models: every row and line is there, and no line crosses a box."""

from __future__ import annotations

import functools
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch

from models.drawing import draw
from models.yolo import DetectionModel, build_model, main

SVG = "{http://www.w3.org/2000/svg}"
Point = tuple[float, float]


@functools.cache
def model_of(cfg: str) -> DetectionModel:
    with torch.device("meta"):
        return build_model(cfg)


def corners(path: str) -> list[Point]:
    """The points of `M1,2H3V4`."""
    x = y = 0.0
    points = []
    for letter, text in re.findall(r"([MHV])([-\d.,]+)", path):
        if letter == "M":
            x, y = map(float, text.split(","))
        else:
            x, y = (float(text), y) if letter == "H" else (x, float(text))
        points.append((x, y))
    return points


def crosses(start: Point, end: Point, box: tuple[float, float, float, float]) -> bool:
    """Whether a level or upright line passes inside a box, not only along its edge."""
    (left, right), (top, bottom) = sorted((start[0], end[0])), sorted((start[1], end[1]))
    return left < box[2] - 1 and right > box[0] + 1 and top < box[3] - 1 and bottom > box[1] + 1


@pytest.mark.parametrize("cfg", ["yolo11n", "yolov9-e", "rtdetr-r18"])
def test_every_row_and_line_is_drawn_and_no_line_crosses_a_box(cfg: str):
    model = model_of(cfg)
    root = ElementTree.fromstring(draw(model.rows, "a < b"))
    rects = [rect.attrib for rect in root.iter(f"{SVG}rect") if rect.get("class") == "box"]
    boxes = [tuple(float(rect[key]) for key in ("x", "y", "width", "height")) for rect in rects]
    boxes = [(x, y, x + wide, y + high) for x, y, wide, high in boxes]
    lines = [path.get("d", "") for path in root.iter(f"{SVG}path") if path.get("class") == "line"]
    assert len(boxes) == len(model.rows) + 1
    assert len(lines) == sum(len(row.inputs) for row in model.rows)
    points = [corners(line) for line in lines]
    crossed = [
        (line, box)
        for line, stops in zip(lines, points)
        for start, end in zip(stops, stops[1:])
        for box in boxes
        if crosses(start, end, box)
    ]
    assert not crossed
    width, height = (float(root.attrib[key]) for key in ("width", "height"))
    assert all(0 <= x <= width and 0 <= y <= height for stops in points for x, y in stops)
    words = [text.text or "" for text in root.iter(f"{SVG}text")]
    assert "a < b" in words
    assert all(any(row.module in word for word in words) for row in model.rows)


def test_a_backbone_of_several_maps_is_one_box_with_a_slot_for_each():
    text = draw(model_of("rtdetr-r18").rows, "r")
    for told in ("2  resnet18", "3  resnet18", "4  resnet18", "128 x 80 x 80", "512 x 20 x 20"):
        assert told in text


def test_the_command_writes_the_drawing(tmp_path: Path, tiny_cfg: Path):
    main(["--cfg", str(tiny_cfg), "--imgsz", "96", "--draw", str(tmp_path / "m.svg")])
    assert ElementTree.parse(tmp_path / "m.svg").getroot().tag == f"{SVG}svg"
