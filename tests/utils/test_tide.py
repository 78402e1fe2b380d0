"""Kinds of errors by hand, and what they cost as the authors' own package finds it."""

from __future__ import annotations

import numpy as np
import pytest

from utils.curves import ImageDetections
from utils.tide import KINDS, RIGHT, Errors, costs, judge

BOX = (10, 10, 30, 30)


def judged(detections: list[tuple], objects: list[tuple], crowd: tuple = ()) -> Errors:
    """One image; rows are (class, score, box) and (class, box), boxes xyxy."""
    boxes = np.array([row[2] for row in detections], np.float64).reshape(-1, 4)
    scores = np.array([row[1] for row in detections], np.float64)
    labels = np.array([row[0] for row in detections], np.int64)
    annotations = [
        {
            "image_id": 1,
            "category_id": label,
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "iscrowd": int(is_crowd),
        }
        for rows, is_crowd in ((objects, False), (crowd, True))
        for label, (x1, y1, x2, y2) in rows
    ]
    return judge({1: ImageDetections(boxes, scores, labels)}, annotations, range(3))


@pytest.mark.parametrize(
    ("detection", "kind"),
    [
        ((0, 0.9, BOX), None),
        ((1, 0.9, BOX), "classification"),
        ((0, 0.9, (10, 10, 30, 19)), "localisation"),  # covers 0.45
        ((1, 0.9, (10, 10, 30, 19)), "both"),
        ((1, 0.9, (50, 50, 60, 60)), "background"),
        ((0, 0.9, (29, 29, 49, 49)), "background"),
    ],
)
def test_a_detection_is_of_the_first_kind_that_fits(detection, kind):
    errors = judged([detection], [(0, BOX)])
    assert errors.detections.kind.tolist() == [RIGHT if kind is None else KINDS.index(kind)]
    is_missed = kind in ("both", "background")
    assert errors.objects.is_missed.tolist() == [is_missed]
    assert errors.objects.is_found.tolist() == [kind is None]


def test_the_surest_of_two_detections_finds_the_object_and_the_other_is_a_duplicate():
    errors = judged([(0, 0.9, (11, 10, 30, 30)), (0, 0.8, BOX)], [(0, BOX)])
    assert errors.detections.kind.tolist() == [RIGHT, KINDS.index("duplicate")]
    assert errors.counts()["missed"] == 0


def test_of_two_errors_that_mean_one_object_mending_finds_it_once_with_the_surest():
    errors = judged([(1, 0.9, BOX), (0, 0.8, (10, 10, 30, 19))], [(0, BOX)])
    assert errors.detections.mends.tolist() == [True, False]
    # Mended, the classification error finds the object behind nothing: AP 1 of the one class with an object, and
    # class 1 is gone; with the localisation error alone gone, nothing is found.
    found = costs(errors, 3)
    assert found["mAP"] == 0
    assert found["classification"] == pytest.approx(1.0)
    assert found["localisation"] == 0


def test_what_lies_on_a_crowd_neither_helps_nor_harms():
    errors = judged(
        [(0, 0.9, BOX), (0, 0.8, (50, 50, 60, 60))], [(0, BOX)], ((0, (50, 50, 60, 60)),)
    )
    assert errors.detections.counts.tolist() == [True, False]
    assert costs(errors, 3)["mAP"] == pytest.approx(1)


def test_costs_by_hand():
    # Best first: wrong (background), right; one object missed. AP: recall 1/2 at precision 1/2, so 51 of 101 recalls.
    errors = judged([(0, 0.9, (50, 50, 60, 60)), (0, 0.8, BOX)], [(0, BOX), (0, (70, 70, 80, 80))])
    found = costs(errors, 1)
    assert found["mAP"] == pytest.approx(51 / 101 / 2)
    assert found["background"] == pytest.approx(51 / 101 / 2)
    assert found["missed"] == pytest.approx(1 / 2 - 51 / 101 / 2)
    assert found["false positives"] == pytest.approx(51 / 101 / 2)
    assert found["false negatives"] == pytest.approx(1 / 2 - 51 / 101 / 2)


def random_split(seed: int) -> tuple[dict[int, ImageDetections], list[dict]]:
    """Twenty images: objects, crowds among them, and detections at, near and beside them, some of equal scores."""
    rng = np.random.default_rng(seed)
    detections, annotations = {}, []
    for number in range(1, 21):
        corners = rng.uniform(0, 80, (int(rng.integers(0, 9)), 2))
        boxes = np.concatenate([corners, corners + rng.uniform(8, 30, corners.shape)], 1)
        labels = rng.integers(0, 3, len(boxes))
        for box, label in zip(boxes, labels):
            row = {
                "image_id": number,
                "category_id": int(label),
                "iscrowd": int(rng.random() < 0.1),
            }
            annotations.append({**row, "bbox": [*box[:2], *(box[2:] - box[:2])]})
        near = np.repeat(boxes, 3, 0) + rng.normal(0, 4, (3 * len(boxes), 4))
        away = rng.uniform(0, 60, (4, 2))
        found = np.concatenate([near, np.concatenate([away, away + 20], 1)])
        guess = np.where(
            rng.random(len(near)) < 0.7, np.repeat(labels, 3), rng.integers(0, 3, len(near))
        )
        classes = np.concatenate([guess, rng.integers(0, 3, 4)])
        scores = np.round(rng.beta(2, 2, len(found)), 2)
        order = np.argsort(-scores, kind="stable")
        detections[number] = ImageDetections(found[order], scores[order], classes[order])
    return detections, annotations


# What tidecv 1.0.1 prints for `random_split(8)`, costs in points: `python benchmarks/tide_agreement.py`.
RECORDED_COUNTS = dict(zip(KINDS, (23, 93, 45, 41, 67, 1)))
RECORDED_COSTS = {
    "mAP": 26.33331051344052,
    "classification": 3.0385041213772794,
    "localisation": 21.921234786436695,
    "both": 6.032961776376002,
    "duplicate": 0.4688276883429161,
    "background": 3.768932031266523,
    "missed": 0,
    "false positives": 52.214544272038026,
    "false negatives": 6.479160300115058,
}


def test_costs_are_those_of_the_authors_package():
    errors = judge(*random_split(8), range(3))
    found = {name: 100 * value for name, value in costs(errors, 3).items()}
    assert errors.counts() == RECORDED_COUNTS
    assert found == pytest.approx(RECORDED_COSTS, abs=1e-9)
