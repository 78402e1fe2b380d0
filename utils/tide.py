"""What keeps a detector's average precision from 1: kinds of errors, and what each of them costs.

A detection finds the object of its class that it covers best, the surest first, each object once. One that finds none is
an error of the first kind that fits:

    localisation    it covers an object of its class by 0.1 to 0.5
    classification  it covers an object of another class by 0.5
    duplicate       it covers an object of its class that is found already
    background      it covers nothing by more than 0.1
    both            what is left: an object of another class, covered by 0.1 to 0.5

An object that is neither found nor meant by one of the first two kinds is missed. The cost of a kind is the mAP at IoU
0.5 that is gained once its errors are mended and all else stays: of those that mean one object the surest finds it, the
others go; missed objects are no longer asked for.

Letters: K detections and G objects, of an image or of all.

Source: Bolya et al., TIDE: A General Toolbox for Identifying Object Detection Errors, ECCV 2020.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from utils.curves import ImageDetections, overlaps

Array = NDArray[np.float64]
Labels = NDArray[np.int64]
Mask = NDArray[np.bool_]

KINDS = ("classification", "localisation", "both", "duplicate", "background", "missed")
CLASSIFICATION, LOCALISATION, BOTH, DUPLICATE, BACKGROUND = range(5)
RIGHT = -1
FOREGROUND, NOTHING = 0.5, 0.1
"""Overlap that finds an object, and overlap up to which there is none."""
RECALLS = np.arange(101) / 100


class Judged(NamedTuple):
    """The detections of a split, images in the order of their numbers, best score first, (K,) each.

    Attributes:
        image: number of the image.
        row: place among the detections of the image.
        scores: confidence.
        labels: class index.
        kind: index into `KINDS`, or RIGHT where it found an object.
        counts: False where it lies on a crowd, which neither helps nor harms.
        object: the object that it found, or would find if it were mended; -1: none.
        mends: whether mending it finds that object.
    """

    image: Labels
    row: Labels
    scores: Array
    labels: Labels
    kind: Labels
    counts: Mask
    object: Labels
    mends: Mask


class Truth(NamedTuple):
    """The objects of a split, crowds left out, (G,) each.

    Attributes:
        image: number of the image.
        labels: class index.
        boxes: xyxy, (G, 4).
        is_missed: whether nothing found it or nearly did.
        is_found: whether a detection found it.
    """

    image: Labels
    labels: Labels
    boxes: Array
    is_missed: Mask
    is_found: Mask


class Errors(NamedTuple):
    """Every detection and object judged; see the head of this file."""

    detections: Judged
    objects: Truth

    def counts(self) -> dict[str, int]:
        """Errors of each kind."""
        found = np.bincount(self.detections.kind[self.detections.kind >= 0], minlength=5).tolist()
        return dict(zip(KINDS, [*found, int(self.objects.is_missed.sum())], strict=True))


def judge(
    detections: Mapping[int, ImageDetections],
    annotations: Sequence[Mapping[str, Any]],
    category_ids: Sequence[int],
    max_detections: int = 100,
) -> Errors:
    """Judge all detections of a split.

    Args:
        detections: by number of the image.
        annotations: COCO annotations of all images under the same numbers.
        category_ids: category id of each class index; annotations of others are left out.
        max_detections: how many of an image count.
    """
    index = {category: label for label, category in enumerate(category_ids)}
    by_image: dict[int, list[Mapping[str, Any]]] = {number: [] for number in detections}
    for row in annotations:
        if row["category_id"] in index:
            by_image.setdefault(row["image_id"], []).append(row)
    judged, truths, first = [], [], 0
    for number in sorted(by_image):
        labels = np.array([index[row["category_id"]] for row in by_image[number]], np.int64)
        boxes = np.array([row["bbox"] for row in by_image[number]], np.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        crowd = np.array([bool(row["iscrowd"]) for row in by_image[number]], np.bool_)
        nothing = ImageDetections(np.zeros((0, 4)), np.zeros(0), np.zeros(0, np.int64))
        own = detections.get(number, nothing)
        most = slice(max_detections)
        own = ImageDetections(own.boxes[most], own.scores[most], own.labels[most])
        result, truth = _judge_image(number, own, labels, boxes, crowd)
        places = np.where(result.object >= 0, result.object + first, -1)
        judged.append(result._replace(object=places))
        truths.append(truth)
        first += len(truth.labels)
    return Errors(
        Judged(*(np.concatenate(parts) for parts in zip(*judged, strict=True))),
        Truth(*(np.concatenate(parts) for parts in zip(*truths, strict=True))),
    )


def _judge_image(
    number: int, own: ImageDetections, labels: Labels, boxes: Array, crowd: Mask
) -> tuple[Judged, Truth]:
    overlap = overlaps(own.boxes, boxes, crowd)
    is_same = own.labels[:, None] == labels
    on_crowd = (is_same & (overlap > FOREGROUND))[:, crowd].any(1)
    overlap, is_same = overlap[:, ~crowd], is_same[:, ~crowd]
    labels, boxes = labels[~crowd], boxes[~crowd]
    found = _match(overlap * is_same)
    taken = np.zeros(len(labels), np.bool_)
    taken[found[found >= 0]] = True
    kind, target = _kinds(overlap, is_same, taken)
    kind = np.where(found >= 0, RIGHT, kind)
    target = np.where(found >= 0, found, target)
    is_meant = np.isin(np.arange(len(labels)), target[kind >= 0])
    mends = np.zeros(len(kind), np.bool_)
    hopeful = np.flatnonzero((kind >= 0) & (target >= 0))
    hopeful = hopeful[~taken[target[hopeful]]]
    mends[hopeful[np.unique(target[hopeful], return_index=True)[1]]] = True
    image, counts = np.full(len(kind), number), (found >= 0) | ~on_crowd
    rows = np.arange(len(kind))
    judged = Judged(image, rows, own.scores, own.labels, kind, counts, target, mends)
    missed = ~taken & ~is_meant
    return judged, Truth(np.full(len(labels), number), labels, boxes, missed, taken)


def _match(overlap: Array) -> Labels:
    """The object that each detection finds, -1: none, (K,); `overlap` (K, G) is 0 across classes."""
    free, found = overlap.copy(), np.full(len(overlap), -1)
    for k in range(len(overlap) if overlap.shape[1] else 0):
        g = int(free[k].argmax())
        if free[k, g] >= FOREGROUND:
            found[k], free[:, g] = g, 0
    return found


def _kinds(overlap: Array, is_same: Mask, taken: Mask) -> tuple[Labels, Labels]:
    """The kind of error that each detection would be, and the object that it means, (K,) each.

    Args:
        overlap: with every object, (K, G).
        is_same: whether the classes agree, (K, G).
        taken: objects that are found, (G,).
    """
    if not overlap.shape[1]:
        return np.full(len(overlap), BACKGROUND), np.full(len(overlap), -1)
    same, other = overlap * is_same, overlap * ~is_same
    close = same.max(1)
    chosen = [
        (LOCALISATION, (close >= NOTHING) & (close <= FOREGROUND)),
        (CLASSIFICATION, other.max(1) >= FOREGROUND),
        (DUPLICATE, (same * taken).max(1) >= FOREGROUND),
        (BACKGROUND, overlap.max(1) <= NOTHING),
    ]
    kinds, masks = zip(*chosen)
    kind = np.select(masks, kinds, BOTH)
    target = np.select(masks[:2], [same.argmax(1), other.argmax(1)], -1)
    return kind, target


def costs(errors: Errors, num_classes: int) -> dict[str, float]:
    """mAP at IoU 0.5 as it is (`mAP`), and what is gained without the errors of each kind, from 0 to 1.

    Besides the kinds: `false positives`, all of them gone; `false negatives`, nothing asked for that was not found.
    Classes without objects count as 0 if something was detected as one of them. Once something is
    mended, errors come first among equal scores, as in the authors' code.
    """
    found, objects = errors.detections, errors.objects
    right, wrong = found.kind == RIGHT, found.kind != RIGHT
    wanted = np.bincount(objects.labels, minlength=num_classes)
    scored = found.counts
    base = _mean_ap(found.labels[scored], found.scores[scored], right[scored], wanted)
    result = {"mAP": base}
    meant = np.append(objects.labels, -1)[found.object]
    for number, name in enumerate(KINDS):
        gained = wrong & (found.kind == number) & found.mends
        kept = wrong & (found.kind != number) & scored | gained
        labels = np.concatenate([np.where(gained, meant, found.labels)[kept], found.labels[right]])
        scores = np.concatenate([found.scores[kept], found.scores[right]])
        is_right = np.concatenate([gained[kept], right[right]])
        left = wanted
        if name == "missed":
            left = wanted - np.bincount(objects.labels[objects.is_missed], minlength=num_classes)
        result[name] = max(_mean_ap(labels, scores, is_right, left) - base, 0.0)
    order = np.concatenate([np.flatnonzero(wrong & scored), np.flatnonzero(right)])
    labels, is_right = found.labels[order], right[order]
    asked = np.bincount(objects.labels[objects.is_found], minlength=num_classes)
    clean = _mean_ap(labels, is_right.astype(np.float64), is_right, wanted)
    whole = _mean_ap(labels, found.scores[order], is_right, asked)
    return {**result, "false positives": clean - base, "false negatives": whole - base}


def _mean_ap(labels: Labels, scores: Array, is_right: Mask, wanted: Labels) -> float:
    """COCO's average precision, mean over the classes that have a detection or an object.

    Args:
        labels, scores, is_right: of the detections, (K,).
        wanted: objects of each class, (C,).
    """
    order = np.argsort(-scores, kind="stable")
    labels, is_right = labels[order], is_right[order]
    values = []
    for label, count in enumerate(wanted.tolist()):
        mine = is_right[labels == label]
        if count and len(mine):
            hits = mine.cumsum()
            precision = np.maximum.accumulate((hits / np.arange(1, len(mine) + 1))[::-1])[::-1]
            places = np.searchsorted(hits / count, RECALLS)
            values.append(float(precision[places[places < len(mine)]].sum()) / len(RECALLS))
        elif count or len(mine):
            values.append(0.0)
    return float(np.mean(values)) if values else 0.0
