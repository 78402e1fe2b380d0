"""Confidence intervals of an mAP: the same number as COCO's code on the same draw, and how often they are right."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.interval_coverage import coverage
from utils.bootstrap import (
    THRESHOLDS,
    ClassOutcomes,
    average_precisions,
    interval,
    resample,
)
from utils.metrics import CocoEvaluator
from utils.structures import Detections

IMAGES = 24


def by_hand() -> ClassOutcomes:
    """Two images of one object each; found in the first, a false alarm before it, missed in the second."""
    found = np.zeros((len(THRESHOLDS), 2), bool)
    found[:5, 1] = True  # the box is good up to IoU 0.7
    return ClassOutcomes(np.array([1, 0]), found, np.ones_like(found), np.array([1, 1]))


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ([1, 1], 51 / 101 / 2),  # recalls 0 to 0.5 at precision 1/2
        ([2, 0], 1.0),  # the first image twice: no false alarm, all found
        ([0, 2], 0.0),
        ([1, 2], 34 / 101 / 3),  # recalls 0 to 1/3 at precision 1/3
    ],
)
def test_average_precision_by_hand(weights: list[int], expected: float):
    found = average_precisions([by_hand()], np.array([weights], float))[0]
    assert found[:5] == pytest.approx(np.full(5, expected))
    assert (found[5:] == 0).all()


def random_split(rng: np.random.Generator) -> tuple[list[dict[str, object]], list[Detections]]:
    """Objects of three classes, some of them crowds, and detections near them and elsewhere."""
    annotations, detections = [], []
    for image in range(IMAGES):
        count = int(rng.integers(0, 6))
        boxes, labels = rng.uniform(8, 60, (count, 4)), rng.integers(0, 3, count)
        annotations += [
            {"image_id": image, "category_id": int(c), "bbox": b.tolist(), "iscrowd": int(rng.random() < 0.1)}
            for b, c in zip(boxes, labels)
        ]  # fmt: skip
        near = np.concatenate((boxes + rng.normal(0, 2, boxes.shape), rng.uniform(8, 60, (2, 4))))
        corners = np.concatenate((near[:, :2], near[:, :2] + near[:, 2:]), 1)
        classes = np.concatenate((labels, rng.integers(0, 3, 2)))
        scores = rng.random(count + 2)
        detections.append(Detections(*map(torch.as_tensor, (corners, scores, classes))))
    return annotations, detections


def evaluator_of(
    annotations: list[dict[str, object]], detections: list[Detections]
) -> CocoEvaluator:
    truth = {"images": [{"id": i} for i in range(IMAGES)], "annotations": annotations}
    evaluator = CocoEvaluator(truth, (0, 1, 2), ("a", "b", "c"))
    evaluator.process(range(IMAGES), detections)
    return evaluator


def test_a_drawn_split_has_the_map_that_coco_gives_it():
    rng = np.random.default_rng(1)
    annotations, detections = random_split(rng)
    outcomes = evaluator_of(annotations, detections).outcomes()
    for drawn in (np.arange(IMAGES), rng.integers(0, IMAGES, IMAGES)):
        copies = [
            {**a, "image_id": new} for new, old in enumerate(drawn) for a in annotations if a["image_id"] == old
        ]  # fmt: skip
        metrics = evaluator_of(copies, [detections[old] for old in drawn]).evaluate()
        weights = np.bincount(drawn, minlength=IMAGES).astype(float)[None]
        found = average_precisions(outcomes, weights)[0]
        assert found[0] == pytest.approx(metrics.map50, abs=1e-12)
        assert found.mean() == pytest.approx(metrics.map50_95, abs=1e-12)


def test_two_models_are_measured_on_the_same_draws():
    outcomes = evaluator_of(*random_split(np.random.default_rng(2))).outcomes()
    first, second = resample(outcomes, 70, seed=3), resample(outcomes, 70, seed=3)
    assert first.map50_95.shape == (70,) and np.ptp(first.map50_95) > 0
    assert (first.map50_95 == second.map50_95).all()
    assert (first.map50_95 != resample(outcomes, 70, seed=4).map50_95).any()


def test_without_objects_there_is_no_map():
    empty = by_hand()._replace(objects=np.zeros(2, np.int64))
    assert np.isnan(average_precisions([empty], np.ones((1, 2)))).all()


def test_an_interval_by_hand():
    low, high = interval(
        0.5, np.array([0.5, 0.6])
    )  # halves 0.05 too high, standard deviation 0.0707
    centre = 0.5 - 0.05 / (2 ** (2 / 3) - 1)
    assert (low, high) == pytest.approx((centre - 0.13859, centre + 0.13859), abs=1e-4)


def test_halves_of_a_mean_tell_how_sure_it_is():
    found = np.zeros((len(THRESHOLDS), 100), bool)
    found[:, :50] = True
    images = np.arange(100)  # half of a hundred objects are found, without false alarms
    outcome = ClassOutcomes(images, found, np.ones_like(found), np.ones(100, np.int64))
    samples = resample([outcome], 2000).map50_95
    assert samples.std() == pytest.approx(0.05, rel=0.1)  # sqrt(0.5 * 0.5 / 100)
    assert samples.mean() == pytest.approx(0.5, abs=0.06)


def test_an_interval_stays_within_what_an_map_can_be():
    assert interval(0.99, np.linspace(0.9, 1.0, 101)).high == 1.0
    assert interval(0.01, np.linspace(0.0, 0.1, 101)).low == 0.0


@pytest.mark.slow
def test_of_a_hundred_intervals_about_ninety_five_hold_the_true_value():
    assert 0.93 <= coverage(images=200, trials=600, resamples=200) <= 0.97
