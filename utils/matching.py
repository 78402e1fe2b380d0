"""Detections beside the objects of their image and class: how far they overlap, and which finds which, as COCO matches.

Letters: K detections, G objects, P pairs, each a detection and an object of the same image and class.
"""

from __future__ import annotations

from itertools import groupby
from operator import itemgetter
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Indices = NDArray[np.int64]


class Objects(NamedTuple):
    """Ground truth, sorted by group.

    Attributes:
        groups: a number for the image and class of each, (G,), ascending.
        boxes: xywh, (G, 4).
        is_crowd: may be hit any number of times, by what no other object claims, (G,).
    """

    groups: Indices
    boxes: Array
    is_crowd: NDArray[np.bool_]


class Pairs(NamedTuple):
    """Every detection that counts with every object of its group.

    Attributes:
        detections: those that count, by group and best score first, (K,).
        groups: of each, (K,), ascending.
        counts: objects beside each, (K,).
        objects: the object of each pair, those of a detection one behind the other, (P,).
        overlaps: IoU; with a crowd, the share of the detection inside it, (P,).
    """

    detections: Indices
    groups: Indices
    counts: Indices
    objects: Indices
    overlaps: Array


def pair_up(groups: Indices, boxes: Array, objects: Objects, limit: int) -> Pairs:
    """Put detections beside objects.

    Args:
        groups: image and class of each detection, those of a group best score first.
        boxes: of the detections, xywh.
        objects: ground truth.
        limit: how many detections of a group count.
    """
    order = np.argsort(groups, kind="stable")
    ordered = groups[order]
    rank = np.arange(len(order)) - np.searchsorted(ordered, ordered)
    order, ordered = order[rank < limit], ordered[rank < limit]
    first, end = (np.searchsorted(objects.groups, ordered, side) for side in ("left", "right"))
    counts = end - first
    behind = np.cumsum(counts) - counts
    partner = np.arange(counts.sum()) + np.repeat(first - behind, counts)
    owner = np.repeat(order, counts)
    overlaps = _overlaps(boxes[owner], objects.boxes[partner], objects.is_crowd[partner])
    return Pairs(order, ordered, counts, partner, overlaps)


def matrices_of(pairs: Pairs) -> dict[int, Array]:
    """The overlaps of each group that has both, (its detections, its objects)."""
    groups, first = np.unique(pairs.groups, return_index=True)
    begins = (np.cumsum(pairs.counts) - pairs.counts)[first]
    parts = np.split(pairs.overlaps, begins[1:])
    counts = pairs.counts[first].tolist()
    return {
        group: part.reshape(-1, count)
        for group, part, count in zip(groups.tolist(), parts, counts)
        if count
    }


def _overlaps(boxes: Array, truth: Array, is_crowd: NDArray[np.bool_]) -> Array:
    """Overlaps of pairs of xywh boxes, (P,)."""
    low = np.maximum(boxes[:, :2], truth[:, :2])
    high = np.minimum(boxes[:, :2] + boxes[:, 2:], truth[:, :2] + truth[:, 2:])
    shared = (high - low).clip(0).prod(1)
    area = boxes[:, 2:].clip(0).prod(1)
    union = np.where(is_crowd, area, area + truth[:, 2:].clip(0).prod(1) - shared)
    found: Array = shared / np.maximum(union, 1e-12)
    return found


def match(pairs: Pairs, is_crowd: NDArray[np.bool_], iou: float = 0.5) -> NDArray[np.int8]:
    """COCO's greedy matching at an IoU, in the order of `pairs.detections`.

    Returns:
        1 found an object, 0 found nothing, -1 found a crowd and does not count, (K,).
    """
    outcome = np.zeros(len(pairs.detections), dtype=np.int8)
    near = np.flatnonzero(pairs.overlaps >= iou)
    owner = np.repeat(np.arange(len(pairs.detections)), pairs.counts)[near]
    free = (~is_crowd).tolist()
    rows = zip(owner.tolist(), pairs.overlaps[near].tolist(), pairs.objects[near].tolist())
    for k, row in groupby(rows, itemgetter(0)):
        reached = [(overlap, g) for _, overlap, g in row]
        # of equal overlaps the later object wins, as in COCO's loop
        best = max(((overlap, g) for overlap, g in reached if free[g]), default=None)
        if best:
            outcome[k], free[best[1]] = 1, False
        elif any(is_crowd[g] for _, g in reached):
            outcome[k] = -1
    return outcome
