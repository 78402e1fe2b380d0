"""Boxes that are no object's, or not its only one.

Letters: N objects of a split, crowds left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from data.account import Objects, objects_of
from data.doctor.findings import Finding, Place, gathered
from data.doctor.pictures import ALIKE, Looks
from data.formats.table import Table
from utils.curves import overlaps

ONE_OBJECT = 0.9
"""IoU from which two boxes are taken for those of one object."""
WHOLE = 0.99
RARE_WHOLE = 0.1
"""Share of a class's boxes below which boxes of the whole image are odd."""
THIN, LONG = 2.0, 20.0
ENOUGH = 20
"""Boxes of a class from which its usual size is known."""
FAR, LEAST_FACTOR, RARE_SIZE = 6.0, 5.0, 0.05
"""A size is odd from so many robust standard deviations, from this factor of the side, in no more of its class."""
MOST_OBJECTS = 300


def odd_boxes(split: str, table: Table, looks: Looks, names: Sequence[str]) -> list[Finding]:
    """Boxes that are there twice, of two classes, of the whole image, slivers, far from the usual size or copied."""
    objects = objects_of(table, single_cls=False)
    places = [
        *_doubles(table, objects, names),
        *_odd_shapes(table, objects, names),
        *_copies(table, objects, looks),
    ]
    for k in np.flatnonzero(np.diff(objects.offsets) > MOST_OBJECTS).tolist():
        told = f"{objects.offsets[k + 1] - objects.offsets[k]} objects"
        places.append(("crowded", Place(table.paths[k], told)))
    return gathered(split, places)


def _doubles(table: Table, objects: Objects, names: Sequence[str]) -> Iterator[tuple[str, Place]]:
    """Boxes that lie on an earlier one, with the one that they cover best."""
    for k in range(len(table)):
        first, last = objects.offsets[k : k + 2].tolist()
        boxes = objects.boxes[first:last].astype(np.float64)
        earlier = np.triu(overlaps(boxes, boxes), 1)
        for j in np.flatnonzero(earlier.max(0, initial=0) >= ONE_OBJECT).tolist():
            i, j = first + int(earlier[:, j].argmax()), first + j
            one, other = (names[objects.labels[m]] for m in (i, j))
            kind = "double" if one == other else "contested"
            told = f"two boxes of {one}" if one == other else f"{one} and {other}"
            yield kind, _place(table, objects, k, (i, j), told)


def _odd_shapes(
    table: Table, objects: Objects, names: Sequence[str]
) -> Iterator[tuple[str, Place]]:
    image_of = np.repeat(np.arange(len(table)), np.diff(objects.offsets))
    wide = objects.boxes[:, 2:] - objects.boxes[:, :2]
    whole = (wide >= WHOLE * table.sizes[image_of][:, ::-1]).all(1)
    counts = np.bincount(objects.labels, minlength=len(names))
    share = np.bincount(objects.labels, weights=whole, minlength=len(names)) / np.maximum(counts, 1)
    short, long = wide.min(1), wide.max(1)
    sliver = (short < THIN) | (long > LONG * short)
    chosen = {
        "whole": whole & (share < RARE_WHOLE)[objects.labels],
        "sliver": sliver,
        "outlier": _far_from_usual(objects) & ~sliver & ~whole,
    }
    for kind, mask in chosen.items():
        for m in np.flatnonzero(mask).tolist():
            told = f"{names[objects.labels[m]]} of {wide[m, 0]:.0f} x {wide[m, 1]:.0f} pixels"
            yield kind, _place(table, objects, int(image_of[m]), (m,), told)


def _far_from_usual(objects: Objects) -> NDArray[np.bool_]:
    """Boxes whose size is far from the median of their class, in robust deviations of its logarithm, (N,)."""
    sides = np.log(np.maximum((objects.boxes[:, 2:] - objects.boxes[:, :2]).prod(1), 1e-6)) / 2
    far = np.zeros(len(sides), np.bool_)
    for label in np.unique(objects.labels):
        mine = objects.labels == label
        if mine.sum() >= ENOUGH:
            away = np.abs(sides[mine] - np.median(sides[mine]))
            deviation = 1.4826 * np.median(away)  # of a normal distribution
            odd = away > max(FAR * deviation, np.log(LEAST_FACTOR))
            far[mine] = odd & (odd.mean() <= RARE_SIZE)
    return far


def _copies(table: Table, objects: Objects, looks: Looks) -> Iterator[tuple[str, Place]]:
    """Images that look different and have, to the digit, the same two or more boxes."""
    first: dict[bytes, int] = {}
    for k in range(len(table)):
        own = slice(int(objects.offsets[k]), int(objects.offsets[k + 1]))
        if own.stop - own.start < 2 or not looks.digests[k]:
            continue
        key = objects.labels[own].tobytes() + np.round(objects.boxes[own], 2).tobytes()
        other = first.setdefault(key, k)
        if other != k and looks.edges[k] @ looks.edges[other] < ALIKE:
            told = f"{own.stop - own.start} boxes as in {table.paths[other]}"
            place = _place(table, objects, k, range(own.start, own.stop), told)
            yield "copied", place._replace(beside=table.paths[other])


def _place(table: Table, objects: Objects, image: int, which: Sequence[int], told: str) -> Place:
    boxes = tuple(tuple(round(v, 1) for v in objects.boxes[m].tolist()) for m in which)
    labels = tuple(int(objects.labels[m]) for m in which)
    return Place(table.paths[image], told, "", boxes, labels)  # type: ignore[arg-type]
