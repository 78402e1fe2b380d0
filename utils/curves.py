"""Precision and recall over confidence, at IoU 0.5, with COCO's matching.

Letters: C classes, T = 1000 confidence thresholds, R = 101 recall points, K detections, G objects.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Annotations = Sequence[Mapping[str, Any]]


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


def match_detections(
    detections: Mapping[int, ImageDetections],
    annotations: Annotations,
    category_ids: Sequence[int],
    max_detections: int,
) -> Outcomes:
    """Match every image's detections to its objects, class by class, as COCO does.

    Args:
        detections: by image id.
        annotations: COCO annotations of all images.
        category_ids: category id of each class index.
        max_detections: how many count per image and class.
    """
    index = {category: c for c, category in enumerate(category_ids)}
    objects: dict[tuple[int, int], list[Mapping[str, Any]]] = {}
    for annotation in annotations:
        key = (annotation["image_id"], index.get(annotation["category_id"], -1))
        objects.setdefault(key, []).append(annotation)
    scores, labels, found = [np.zeros(0)], [np.zeros(0, np.int64)], [np.zeros(0, np.bool_)]
    for image_id, (boxes, image_scores, image_labels) in detections.items():
        for label in np.unique(image_labels):
            chosen = np.flatnonzero(image_labels == label)[:max_detections]
            outcome = match_class(boxes[chosen], objects.get((image_id, int(label)), []))
            counted = outcome >= 0
            scores.append(image_scores[chosen][counted])
            labels.append(image_labels[chosen][counted])
            found.append(outcome[counted] > 0)
    return Outcomes(np.concatenate(scores), np.concatenate(labels), np.concatenate(found))


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


def match_class(boxes: Array, objects: Annotations, iou: float = 0.5) -> NDArray[np.int8]:
    """COCO's greedy matching within one image and class.

    Args:
        boxes: xyxy, (K, 4), best score first.
        objects: annotations; a crowd may be hit any number of times, by what no object claims.
        iou: least overlap.

    Returns:
        1 found an object, 0 found nothing, -1 found a crowd and does not count, (K,).
    """
    outcome = np.zeros(len(boxes), dtype=np.int8)
    if not objects or not len(boxes):
        return outcome
    crowd = np.array([bool(o["iscrowd"]) for o in objects])
    truth = np.array([o["bbox"] for o in objects], dtype=np.float64)
    truth[:, 2:] += truth[:, :2]
    overlap = overlaps(boxes, truth, crowd)
    free = ~crowd
    for k in np.flatnonzero((overlap >= iou).any(1)):
        candidates = np.where(free, overlap[k], -1.0)
        # of equal overlaps the later object wins, as in COCO's loop
        best = len(candidates) - 1 - int(candidates[::-1].argmax())
        if candidates[best] >= iou:
            outcome[k], free[best] = 1, False
        elif (overlap[k][crowd] >= iou).any():
            outcome[k] = -1
    return outcome


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
