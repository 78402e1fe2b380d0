"""Precision and recall over confidence, at IoU 0.5, with COCO's matching.

Letters: C classes, T = 1000 confidence thresholds, R = 101 recall points, K detections, G objects.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


class Curves(NamedTuple):
    """What the curve plots show, at IoU 0.5, for the classes that have objects.

    Attributes:
        names: the classes, C of them.
        recall_axis: 0, 0.01, ..., 1, (R,).
        precision_at_recall: interpolated as COCO does, (C, R).
        confidence_axis: thresholds from 0 to 1, (T,).
        precision: of detections at or above each threshold, (C, T); above a class's best score it
            is 1.
        recall: (C, T).
        f1: (C, T).
    """

    names: tuple[str, ...]
    recall_axis: Array
    precision_at_recall: Array
    confidence_axis: Array
    precision: Array
    recall: Array
    f1: Array


def best_thresholds(curves: Curves) -> Array:
    """The confidence of the best F1 of each class that has objects, (C,).

    F1 is averaged over 0.05 of confidence first: the highest point of a few objects is chance. Of a plateau the middle.
    """
    width = len(curves.confidence_axis) // 20 | 1
    padded = np.pad(curves.f1, ((0, 0), (width // 2, width // 2)), mode="edge")
    smooth = np.lib.stride_tricks.sliding_window_view(padded, width, axis=1).mean(-1)
    tops = [np.flatnonzero(row >= row.max() - 1e-9) for row in smooth]
    places = np.array([top[len(top) // 2] for top in tops], np.int64)
    best: Array = curves.confidence_axis[places]
    return best


class ImageDetections(NamedTuple):
    """Detections of one image, best score first: xyxy (K, 4), (K,), (K,)."""

    boxes: Array
    scores: Array
    labels: NDArray[np.int64]


class Outcomes(NamedTuple):
    """What became of the detections of a split, (K,) each; those that hit a crowd are left out.

    Attributes:
        scores: confidence.
        labels: class index.
        found: whether the detection found an object of its class at IoU 0.5.
    """

    scores: Array
    labels: NDArray[np.int64]
    found: NDArray[np.bool_]


def confidence_curves(
    outcomes: Outcomes, classes: Sequence[int], instances: Sequence[int]
) -> tuple[Array, Array, Array, Array]:
    """Precision, recall and F1 of some classes over confidence thresholds.

    Args:
        outcomes: of all detections.
        classes: the class indices wanted, C of them.
        instances: how many objects each has, C numbers from 1.

    Returns:
        The thresholds (T,), precision, recall and F1, (C, T) each.
    """
    axis = np.linspace(0, 1, 1000)
    precision, recall = np.zeros((2, len(classes), axis.size))
    for row, (c, count) in enumerate(zip(classes, instances, strict=True)):
        mine = outcomes.labels == c
        order = np.argsort(-outcomes.scores[mine], kind="stable")
        descending = outcomes.scores[mine][order]
        hits = np.concatenate(([0], np.cumsum(outcomes.found[mine][order])))
        above = np.searchsorted(-descending, -axis, side="right")
        nothing_left = 1.0 if descending.size else 0.0
        precision[row] = np.where(above > 0, hits[above] / np.maximum(above, 1), nothing_left)
        recall[row] = hits[above] / count
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-16)
    return axis, precision, recall, f1


def overlaps(boxes: Array, truth: Array, crowd: NDArray[np.bool_] | None = None) -> Array:
    """Overlaps (K, G) of xyxy boxes; with a crowd the divisor is the box's own area, as in COCO."""
    low = np.maximum(boxes[:, None, :2], truth[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], truth[None, :, 2:])
    intersection = np.clip(high - low, 0, None).prod(-1)
    area = np.clip(boxes[:, 2:] - boxes[:, :2], 0, None).prod(-1)[:, None]
    union = area + np.clip(truth[:, 2:] - truth[:, :2], 0, None).prod(-1)[None] - intersection
    if crowd is not None:
        union = np.where(crowd[None], area, union)
    result: Array = intersection / np.maximum(union, 1e-12)
    return result
