"""Objects that keep their numbers from frame to frame."""

from __future__ import annotations

import csv
import json
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from shell import TINY_MODEL

import detect
from data.videos import Frame, VideoInfo
from engine.options import Thresholds
from engine.tracking import LOW, Tracker
from models.yolo import build_model
from utils.boxes import pairwise_iou
from utils.checkpoint import save_checkpoint
from utils.config import parse_yaml
from utils.errors import ConfigError
from utils.structures import Detections

FRAMES, SIDE = 120, 320
THRESHOLDS = Thresholds(conf=0.5)


def clip(path: str = "a.mp4", fps: float = 30.0):
    """Frames of a clip, with the boxes of four objects that cross, and what a detector sees of them.

    One box in twenty-four is missed, one in six has a low score, all tremble by a pixel.
    """
    rng, info = np.random.default_rng(0), VideoInfo(fps, SIDE, SIDE, FRAMES)
    paths = [((20, 40), (2.2, 0.3)), ((290, 60), (-2.2, 0.3)), ((150, 20), (0.2, 2.0)), ((60, 280), (1.5, -1.5))]  # fmt: skip
    for number in range(FRAMES):
        centres = np.array([np.add(start, np.multiply(step, number)) for start, step in paths])
        truth = np.concatenate([centres - (14, 20), centres + (14, 20)], 1)
        scores = np.where((rng.random(len(paths)) < 1 / 6) & (number > 1), 0.2, 0.9)
        seen = rng.random(len(paths)) >= 1 / 24
        seen |= number < 2
        boxes = torch.tensor(truth + rng.normal(0, 1, truth.shape), dtype=torch.float32)[seen]
        labels = torch.tensor([0, 0, 1, 1])[seen]
        found = Detections(boxes, torch.tensor(scores, dtype=torch.float32)[seen], labels)
        frame = Frame(path, np.zeros((SIDE, SIDE, 3), np.uint8), number, info)
        yield frame, torch.tensor(truth, dtype=torch.float32), found


def identity_f1(rows: list[tuple[torch.Tensor, torch.Tensor, list[int]]]) -> float:
    """IDF1 (Ristani et al. 2016, arXiv 1609.01775): truths, boxes and numbers of each frame, at an overlap of one half."""
    shared: Counter[tuple[int, int]] = Counter()
    for truth, boxes, numbers in rows:
        for column, number in enumerate(numbers):
            for row in torch.where(pairwise_iou(truth, boxes[column : column + 1])[:, 0] > 0.5)[0]:
                shared[int(row), number] += 1
    tracks = sorted({number for *_, numbers in rows for number in numbers})
    table = np.array([[shared[row, number] for number in tracks] for row in range(len(rows[0][0]))])
    matched = table[linear_sum_assignment(-table)].sum()
    return 2 * matched / sum(len(truth) + len(numbers) for truth, _, numbers in rows)


def test_identity_f1_by_hand():
    boxes = torch.tensor([[0.0, 0, 10, 10], [50, 0, 60, 10]])
    assert identity_f1([(boxes, boxes, [1, 2]), (boxes, boxes, [1, 2])]) == 1
    assert identity_f1([(boxes, boxes, [1, 2]), (boxes, boxes, [2, 1])]) == 0.5


def test_objects_that_cross_keep_their_numbers():
    pytest.importorskip("trackers")
    tracker, rows = Tracker(THRESHOLDS), []
    assert tracker.thresholds.conf == LOW
    for frame, truth, found in clip():
        kept, numbers = tracker(frame, found)
        assert len(kept.labels) == len(numbers) == len(set(numbers))
        rows.append((truth, kept.boxes, numbers))
    assert rows[0][2] == [] and rows[1][2] == [1, 2, 3, 4]
    assert {number for *_, numbers in rows for number in numbers} == {1, 2, 3, 4}
    assert identity_f1(rows) >= 0.95


def test_no_track_begins_with_a_low_score_and_another_clip_has_other_numbers():
    pytest.importorskip("trackers")
    tracker = Tracker(THRESHOLDS)
    frame, _, found = next(clip())
    low, high = (found._replace(scores=found.scores * 0 + score) for score in (0.3, 0.9))
    assert [tracker(frame, found)[1] for found in (low, low, high)] == [[], [], []]
    assert [tracker(frame, found)[1] for found in (high, low)] == [[1, 2, 3, 4]] * 2
    other = frame._replace(path="b.mp4")
    assert [tracker(other, high)[1] for _ in range(2)] == [[], [5, 6, 7, 8]]
    nothing = Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    assert tracker(other, nothing)[1] == [] and tracker(frame, nothing)[1] == []


def test_a_track_begins_with_the_threshold_of_its_class():
    pytest.importorskip("trackers")
    tracker = Tracker(THRESHOLDS._replace(conf=0.3, by_class=(0.3, 0.8)))
    assert tracker.thresholds.by_class == ()
    frame, _, found = next(clip())
    found = found._replace(scores=torch.full((4,), 0.5))  # classes 0, 0, 1, 1
    tracker(frame, found)
    kept, numbers = tracker(frame, found)
    assert kept.labels.tolist() == [0, 0] and numbers == [1, 2]
    assert kept.scores.tolist() == [0.5, 0.5]


def test_files_have_the_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Counting(Tracker):
        def __init__(self, thresholds: Thresholds, stride: int = 1) -> None:
            self.thresholds, self.calls = thresholds, 0

        def __call__(self, frame: Frame, found: Detections) -> tuple[Detections, list[int]]:
            self.calls += 1
            return found, [10 * self.calls + k for k in range(len(found.labels))]

    monkeypatch.setattr(detect, "Tracker", Counting)
    model = build_model({**parse_yaml(TINY_MODEL, "tiny").data, "nc": 2}, imgsz=(64, 64))
    save_checkpoint(tmp_path / "two.pt", {"model": model.state_dict(), "config": model.config, "names": ["a", "b"]})  # fmt: skip
    for name in ("1.png", "2.png"):
        cv2.imwrite(str(tmp_path / name), np.full((64, 64, 3), 90, np.uint8))
    words = ["--weights", tmp_path / "two.pt", "--source", tmp_path, "--project", tmp_path / "out"]
    words += ["--conf-thres", 0.0001, "--max-det", 2, "--save-txt", "--save-csv", "--track"]
    words += ["--save-json", "--save-voc"]
    detect.main([str(word) for word in [*words, "--device", "cpu"]])
    out = tmp_path / "out/exp"
    lines = [(out / f"labels/{n}.txt").read_text().splitlines() for n in (1, 2)]
    assert [line.split()[-1] for line in lines[0] + lines[1]] == ["10", "11", "20", "21"]
    with (out / "predictions.csv").open() as file:
        assert [row["track"] for row in csv.DictReader(file)] == ["10", "11", "20", "21"]
    told = json.loads((out / "predictions.json").read_text())
    assert [row["track"] for row in told] == [10, 11, 20, 21]
    voc = ElementTree.parse(out / "voc/2.xml").getroot()
    assert [item.findtext("track") for item in voc.findall("object")] == ["20", "21"]


def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "trackers", None)
    with pytest.raises(ConfigError, match="pip install trackers"):
        Tracker(THRESHOLDS)
