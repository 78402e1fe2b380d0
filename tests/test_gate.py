"""The gate through which a coupling goes: its data, its verdict, and the head's own backbone going through."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import gate
from data.config import load_data_config
from data.dataset import LoadOptions, build_dataset


def test_it_measures_on_the_pictures_that_it_trains_on(tmp_path: Path):
    config = load_data_config(str(gate.draw_set(tmp_path)))
    train, val = (build_dataset(config, s, LoadOptions(imgsz=(160, 160))) for s in ("train", "val"))
    assert len(train) == gate.IMAGES and list(train.paths) == list(val.paths)
    assert sorted(set(train.labels.tolist())) == [0, 1, 2, 3, 4]


def test_the_table_has_a_row_a_backbone_and_a_dash_for_what_is_not_measured():
    results = {"own x yolo11n": {"map": 0.9312}, "EMO_1M x yolov5n": {"status": "fails"}}
    lines = gate.format_table(results, ["own", "EMO_1M"], ["yolov5n", "yolo11n"]).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert cells[0] == ["backbone", "yolov5n", "yolo11n"]
    assert cells[2:] == [["own", "-", "0.931"], ["EMO_1M", "-", "-"]]


@pytest.mark.slow
def test_sixteen_pictures_are_learnt_by_heart():
    assert gate.learn("own", "yolo11n", amp="bf16").map50_95 >= gate.LEAST
