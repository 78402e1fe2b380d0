"""Large pictures in slices: where they lie, and what becomes of boxes that several of them found."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from shell import TINY_MODEL

import detect
from data.videos import Frame
from engine.options import Thresholds
from engine.slices import detect_slices, fit_slices, merge_covered, starts
from models.yolo import build_model
from utils.checkpoint import save_checkpoint
from utils.config import parse_yaml
from utils.errors import UserError
from utils.structures import Decoded, Detections


@pytest.mark.parametrize(
    ("length", "size", "overlap", "expected"),
    [
        (100, 200, 0.2, [0]),
        (200, 200, 0.2, [0]),
        (520, 200, 0.2, [0, 160, 320]),
        (530, 200, 0.2, [0, 160, 320, 330]),
        (201, 200, 0.0, [0, 1]),
    ],
)
def test_slices_overlap_and_end_with_the_picture(length, size, overlap, expected):
    assert starts(length, size, overlap) == expected


def found(*rows: tuple[float, ...]) -> Detections:
    table = torch.tensor(rows)
    return Detections(table[:, :4], table[:, 4], table[:, 5].long())


def test_boxes_that_cover_half_of_each_other_become_one_by_class():
    merged = merge_covered(
        found(
            (0, 0, 10, 10, 0.6, 0),
            (5, 0, 15, 10, 0.9, 0),  # shares half of either
            (6, 0, 16, 10, 0.5, 1),  # another class
            (14, 0, 24, 10, 0.4, 0),  # a tenth in common with the second
        )
    )
    assert merged.boxes.tolist() == [[0, 0, 15, 10], [6, 0, 16, 10], [14, 0, 24, 10]]
    assert merged.scores.tolist() == pytest.approx([0.9, 0.5, 0.4])
    assert merged.labels.tolist() == [0, 1, 0]


def test_classes_do_not_matter_where_they_are_not_to():
    one, other = (0.0, 0, 10, 10, 0.6, 0), (5.0, 0, 15, 10, 0.9, 1)
    assert len(merge_covered(found(one, other)).boxes) == 2
    merged = merge_covered(found(one, other), agnostic=True)
    assert merged.boxes.tolist() == [[0, 0, 15, 10]] and merged.labels.tolist() == [1]


def test_nothing_merged_is_nothing():
    nothing = Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    assert len(merge_covered(nothing).boxes) == 0


class Bright:
    """A detector that finds the bright pixels of each picture, as one box."""

    device, postprocess_kind = torch.device("cpu"), "topk"

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, images: torch.Tensor) -> Decoded:
        self.batches.append(len(images))
        boxes, scores = torch.zeros(len(images), 1, 4), torch.zeros(len(images), 1, 1)
        for number, image in enumerate(images):
            rows, columns = torch.where(image[0] > 0.9)
            if len(rows):
                low, high = (columns.min(), rows.min()), (columns.max() + 1, rows.max() + 1)
                boxes[number, 0] = torch.tensor([*low, *high])
                scores[number] = 0.8
        return Decoded(boxes, scores)


def test_an_object_on_an_edge_between_slices_is_one_box_at_its_place():
    image = np.zeros((96, 224, 3), np.uint8)
    image[40:56, 90:120] = 255  # the slices begin at 0, 96 and 128
    model, thresholds = Bright(), Thresholds(conf=0.5)
    parts = fit_slices(Frame("a.png", image, 0, None), (96, 96), 32, 96, 0.0)
    assert [part.corner for part in parts] == [(0, 0), (0, 0), (0, 96), (0, 128)]
    result = detect_slices(model, parts, thresholds)
    assert model.batches == [1, 3]  # the whole is of another shape
    assert len(result.boxes) == 1 and result.scores.tolist() == pytest.approx([0.8])
    # the slices give exact pixels, the whole picture, shrunk, the nearest few
    torch.testing.assert_close(result.boxes[0], torch.tensor([90.0, 40, 120, 56]), atol=3, rtol=0)


def test_the_script_slices_large_pictures_alone(tmp_path: Path, capsys):
    model = build_model({**parse_yaml(TINY_MODEL, "tiny").data, "nc": 2}, imgsz=(64, 64))
    content = {"model": model.state_dict(), "config": model.config, "names": ["a", "b"]}
    save_checkpoint(tmp_path / "two.pt", {**content, "imgsz": [64, 64]})
    for name, side in (("small", 60), ("large", 150)):
        pixels = np.random.default_rng(side).integers(0, 255, (side, side, 3), dtype=np.uint8)
        cv2.imwrite(str(tmp_path / f"{name}.png"), pixels)
    words = ["--weights", tmp_path / "two.pt", "--source", tmp_path, "--project", tmp_path / "out"]
    words += ["--conf-thres", 0.0001, "--max-det", 7, "--save-txt", "--nosave", "--device", "cpu"]
    labels = {}
    for flags in ([], ["--slice", 64, "--overlap", 0.1]):
        detect.main([str(word) for word in [*words, *flags, "--name", f"n{len(flags)}"]])
        folder = tmp_path / "out" / f"n{len(flags)}" / "labels"
        labels[len(flags)] = {path.stem: path.read_text() for path in folder.glob("*.txt")}
    assert labels[0]["small"] == labels[4]["small"] and labels[0]["large"] != labels[4]["large"]
    assert len(labels[4]["large"].splitlines()) == 7
    rows = np.loadtxt(labels[4]["large"].splitlines())
    assert (rows[:, 1:5] >= 0).all() and (rows[:, 1:5] <= 1).all()


def test_an_overlap_of_no_slices_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    words = ["--overlap", "0.3", "--weights", str(tmp_path / "no.pt"), "--source", "x"]
    with pytest.raises(UserError):
        detect.main(words)
    assert "--overlap: without effect without --slice" in caplog.text


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--slice", "16"], "--slice"),
        (["--slice", "64", "--overlap", "1"], "--overlap"),
        (["--slice", "64", "--visualize"], "--visualize: cannot be used with --slice"),
    ],
)
def test_mistakes_are_one_line(run_script, tmp_path: Path, words, told):
    model = build_model({**parse_yaml(TINY_MODEL, "tiny").data, "nc": 2}, imgsz=(64, 64))
    save_checkpoint(tmp_path / "two.pt", {"model": model.state_dict(), "config": model.config, "names": ["a", "b"]})  # fmt: skip
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((70, 70, 3), np.uint8))
    result = run_script("detect.py", "--weights", tmp_path / "two.pt", "--source", tmp_path / "a.png", *words)  # fmt: skip
    assert result.returncode == 2 and told in result.stderr.splitlines()[-1]
    assert not (tmp_path / "runs").exists()
