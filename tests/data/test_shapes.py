"""The built-in set: drawn once, always the same, with boxes that fit."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from data import shapes
from data.config import load_data_config
from data.label_cache import load_table

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def few(monkeypatch):
    """A set of ten pictures."""
    monkeypatch.setattr(shapes, "COUNTS", {"train": 6, "val": 2, "test": 2})


def digest(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    parts = [str(path.relative_to(folder)).encode() + path.read_bytes() for path in files]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def test_the_set_is_always_the_same(few, tmp_path):
    assert shapes.draw_if_absent(tmp_path / "a") and shapes.draw_if_absent(tmp_path / "b")
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"], "a rest was left"


def test_it_is_drawn_once_and_anew_for_another_version(few, tmp_path):
    folder = tmp_path / "shapes"
    assert shapes.draw_if_absent(folder) and not shapes.draw_if_absent(folder)
    (folder / "VERSION").write_text("0")
    (folder / "images" / "train" / "old.jpg").write_bytes(b"")
    assert shapes.draw_if_absent(folder)
    assert not (folder / "images" / "train" / "old.jpg").exists()


def test_a_broken_drawing_leaves_nothing(few, tmp_path, monkeypatch):
    def fail(folder):
        (folder / "half").write_text("")
        raise OSError("disk full")

    monkeypatch.setattr(shapes, "_draw_set", fail)
    with pytest.raises(OSError, match="disk full"):
        shapes.draw_if_absent(tmp_path / "shapes")
    assert not list(tmp_path.iterdir())


def test_boxes_bound_the_shapes_that_were_drawn():
    classes, empty, overlapping = set(), 0, 0
    for index in range(60):
        image, drawn = shapes.draw_picture(0, index)
        height, width = image.shape[:2]
        empty += not drawn
        assert len(drawn) <= 8
        for shape in drawn:
            left, top, right, bottom = shape.box
            assert 0 <= left < right <= width and 0 <= top < bottom <= height
            assert shape.mask[top:bottom, left:right].sum() == shape.mask.sum()
            assert shape.mask[top].any() and shape.mask[bottom - 1].any()
            assert shape.mask[:, left].any() and shape.mask[:, right - 1].any()
            assert max(right - left, bottom - top) >= 16
            classes.add(shape.label)
        masks = sum(shape.mask.astype(int) for shape in drawn)
        overlapping += bool(np.any(masks > 1))
    assert classes == set(range(len(shapes.NAMES)))
    assert empty == 3 and overlapping > 3


def test_the_whole_set_keeps_its_promise_of_size(tmp_path):
    """Judged from a part: 520 pictures stay under 30 MB."""
    sizes = []
    for index in range(15):
        image, _ = shapes.draw_picture(0, index)
        sizes.append(len(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 90])[1]))
    assert np.mean(sizes) * sum(shapes.COUNTS.values()) < 25e6


def test_the_data_yaml_draws_what_is_absent(few, tmp_path):
    yaml = (ROOT / "data" / "shapes.yaml").read_text()
    (tmp_path / "shapes.yaml").write_text(yaml.replace("../datasets/shapes", "drawn"))
    config = load_data_config(tmp_path / "shapes.yaml")
    assert config.names == shapes.NAMES
    for split, count in shapes.COUNTS.items():
        table = load_table(config, split)
        assert len(table) == count
        assert not [fault for fault in table.faults if fault.kind != "background"]


@pytest.mark.parametrize("command", [["data/shapes.py"], ["-m", "data.shapes"]])
def test_it_runs_as_a_script_and_as_a_module(tmp_path, command):
    (tmp_path / "VERSION").write_text(shapes.VERSION)
    result = subprocess.run(
        [sys.executable, *command, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "already there" in result.stdout


def test_the_set_is_drawn_beside_its_yaml_whatever_lies_beside_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "project" / "data").mkdir(parents=True)
    (tmp_path / "datasets" / "shapes" / "images").mkdir(parents=True)  # of another project
    monkeypatch.chdir(tmp_path / "project")
    monkeypatch.setattr("data.config.draw_if_absent", lambda folder: False)
    text = "builtin: shapes\npath: ../datasets/shapes\ntrain: images/train\nval: images/val\nnames: [a]\n"
    (tmp_path / "project" / "data" / "shapes.yaml").write_text(text)
    config = load_data_config("data/shapes.yaml")
    assert config.path.resolve() == tmp_path / "project" / "datasets" / "shapes"
