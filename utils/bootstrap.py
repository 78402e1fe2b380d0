"""How sure an mAP is: its confidence interval, from halves of the images that are drawn at random (half-sample bootstrap).

A half varies around the whole as the whole does around the truth (both have variance 1/I of that of an image), and unlike
draws with replacement it holds no image twice, which average precision, a maximum of precisions, takes badly.

Letters: C classes, T IoU thresholds, K detections of a class, I images, R resamples.

Source: Shao and Wu, A General Theory for Jackknife Variance Estimation, Annals of Statistics 1989.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from utils.matching import Objects, Pairs, match

Array = NDArray[np.float64]
THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0, 1, 101)
RESAMPLES = 1000
BIAS = 1 / (2 ** (2 / 3) - 1)
"""A maximum flatters small splits, by about I ** (-2 / 3): what a half has more of it, times this, is what the whole has."""
CHUNK = 50  # resamples at a time: a matrix of these by the detections of a class


class ClassOutcomes(NamedTuple):
    """What became of the detections of one class, best score first.

    Attributes:
        image: number of each one's image, from 0, (K,).
        found: whether it found an object at each IoU threshold, (T, K).
        counts: False where it hit a crowd, which neither helps nor harms, (T, K).
        objects: of the class in each image, crowds left out, (I,).
    """

    image: NDArray[np.int64]
    found: NDArray[np.bool_]
    counts: NDArray[np.bool_]
    objects: NDArray[np.int64]


class Interval(NamedTuple):
    """Between these two lies what a split of endless size would give, 95 times of 100."""

    low: float
    high: float


class Resampled(NamedTuple):
    """Metrics of halves of the split, (R,) each."""

    map50: Array
    map50_95: Array


def outcomes_of(
    pairs: Pairs, scores: Array, objects: Objects, images: int, classes: int
) -> list[ClassOutcomes]:
    """Match all detections as COCO does, at its ten thresholds, class by class.

    Args:
        pairs: detections beside objects, in groups of image number (from 1) x classes + class index.
        scores: of all detections.
        objects: ground truth, in such groups.
        images: how many there are.
        classes: likewise.
    """
    result = np.stack([match(pairs, objects.is_crowd, iou) for iou in THRESHOLDS])
    numbers, labels = np.divmod(pairs.groups, classes)
    places = objects.groups[~objects.is_crowd] - classes
    count = np.bincount(places, minlength=images * classes).reshape(images, classes)
    outcomes = []
    for label in range(classes):
        own = np.flatnonzero(labels == label)
        own = own[np.argsort(-scores[pairs.detections[own]], kind="stable")]
        outcome = result[:, own]
        outcomes.append(ClassOutcomes(numbers[own] - 1, outcome > 0, outcome >= 0, count[:, label]))
    return outcomes


def average_precisions(outcomes: Sequence[ClassOutcomes], weights: Array) -> Array:
    """COCO's average precision at each threshold of splits that have each image so many times, (R, T).

    Classes without objects do not count; nan if none has any.

    Args:
        outcomes: of each class.
        weights: how often each image is there, (R, I).
    """
    sums, present = np.zeros((len(weights), len(THRESHOLDS))), np.zeros(len(weights))
    for image, found, counts, objects in outcomes:
        total = weights @ objects
        times = weights[:, image]
        passed = times.cumsum(1)
        for t, hits in enumerate(found):
            seen = passed if counts[t].all() else (times * counts[t]).cumsum(1)
            sums[:, t] += _average_precision(times[:, hits], seen[:, hits], total)
        present += total > 0
    average: Array = np.where(present > 0, sums.T / np.maximum(present, 1), np.nan).T
    return average


def _average_precision(times: Array, passed: Array, total: Array) -> Array:
    """Mean over 101 recalls of the best precision at that recall or beyond, (R,); 0 without objects.

    Args:
        times: how often each of the P detections that found an object is there, best score first, (R, P).
        passed: how many detections stand up to it, (R, P).
        total: objects, (R,).
    """
    found = times.cumsum(1)
    precision = np.maximum.accumulate((found / np.maximum(passed, 1e-12))[:, ::-1], axis=1)[:, ::-1]
    reached = np.searchsorted(RECALLS, found / np.maximum(total, 1e-12)[:, None], side="right")
    result: Array = (precision * np.diff(reached, axis=1, prepend=0)).sum(1) / len(RECALLS)
    return result


def resample(outcomes: Sequence[ClassOutcomes], count: int = RESAMPLES, seed: int = 0) -> Resampled:
    """Metrics of halves of the images, drawn at random.

    The same seed and number of images draw the same halves, so that two models can be compared half by half.
    """
    images, generator = len(outcomes[0].objects), np.random.default_rng(seed)
    half = (images + 1) // 2
    weights = np.zeros((count, images))
    for row in weights:
        row[generator.permutation(images)[:half]] = 1
    parts = [weights[first : first + CHUNK] for first in range(0, count, CHUNK)]
    found = np.concatenate([average_precisions(outcomes, part) for part in parts])
    return Resampled(found[:, 0], found.mean(1))


def interval(value: float, samples: Array, least: float = 0.0, most: float = 1.0) -> Interval:
    """Where the true value lies, 95 times of 100: the normal interval around the value less its bias.

    How often it is right: `python benchmarks/interval_coverage.py`.

    Args:
        value: of the split itself.
        samples: of halves of it, (R,).
        least, most: what the value can be.
    """
    centre = value - BIAS * (np.nanmean(samples) - value)
    reach = 1.96 * np.nanstd(samples, ddof=1)
    return Interval(max(float(centre - reach), least), min(float(centre + reach), most))
