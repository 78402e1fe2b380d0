"""Pictures of a report: the images with most errors, and labels that the detector contradicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.images import Image, ImageError, read_image
from data.transforms import resize_to_fit
from engine.assessment import Assessment
from utils.tide import BACKGROUND, CLASSIFICATION, LOCALISATION, RIGHT
from utils.visualize import Colour, draw_boxes

MOST_IMAGES, MOST_SUSPECTS, MOST_MISSED = 20, 12, 4
GREEN, RED, ORANGE = (0, 158, 96), (214, 40, 57), (255, 159, 28)
AROUND = 0.75
"""Of a box's longer side, shown on each side of it."""
LEAST_CROP = 64  # pixels

Box = NDArray[np.float64]


class Picture(NamedTuple):
    """An image with boxes, and what is said of it."""

    image: Image
    caption: str


class Source(NamedTuple):
    """Where the images of a split are.

    Attributes:
        paths: file of each image, by its id.
        white: the value of white in images deeper than 8 bits, see `read_image`.
    """

    paths: Mapping[int, str]
    white: float | None = None


class Mark(NamedTuple):
    """A box to be drawn, xyxy in pixels of its image, (4,); no caption, no words."""

    box: Box
    caption: str
    colour: Colour


def worst_images(found: Assessment, source: Source, side: int) -> list[Picture]:
    """The images with most wrong and missing detections at the thresholds of the classes.

    Args:
        found: what is wrong.
        source: where the images are.
        side: pixels of the longer side of each picture.
    """
    judged, objects, names = found.errors.detections, found.errors.objects, found.evaluator.names
    above = judged.counts & (judged.scores > found.thresholds[judged.labels])
    wrong, right = above & (judged.kind != RIGHT), above & (judged.kind == RIGHT)
    missed = ~np.isin(np.arange(len(objects.labels)), judged.object[right])
    counts = np.bincount(np.concatenate([judged.image[wrong], objects.image[missed]]))
    pictures = []
    for number in np.argsort(-counts, kind="stable")[:MOST_IMAGES].tolist():
        own, rows = objects.image == number, np.flatnonzero(judged.image == number)
        boxes = {k: found.evaluator.detections_of(number).boxes[judged.row[k]] for k in rows}
        marks = [Mark(boxes[k], "", GREEN) for k in rows if right[k]]
        for g in np.flatnonzero(own & missed):
            marks.append(Mark(objects.boxes[g], names[objects.labels[g]], ORANGE))
        for k in rows[wrong[rows]]:
            caption = f"{names[judged.labels[k]]} {judged.scores[k]:.2f}"
            marks.append(Mark(boxes[k], caption, RED))
        told = f"{(own & missed).sum()} of {own.sum()} missed, {wrong[rows].sum()} wrong"
        if counts[number]:
            pictures += _drawn(number, marks, told, found, source, side)
    return pictures


def suspects(found: Assessment, source: Source, side: int) -> list[Picture]:
    """What the labels may lack, or have wrong: the surest detections that they contradict, and objects never found."""
    judged, objects, names = found.errors.detections, found.errors.objects, found.evaluator.names
    told = {
        BACKGROUND: "no label here",
        CLASSIFICATION: "labelled {}",
        LOCALISATION: "labelled {} otherwise",
    }
    above = judged.counts & (judged.scores > found.thresholds[judged.labels])
    chosen = np.flatnonzero(above & np.isin(judged.kind, list(told)))
    chosen = chosen[np.argsort(-judged.scores[chosen], kind="stable")][:MOST_SUSPECTS]
    pictures = []
    for k in chosen.tolist():
        number, g, name = int(judged.image[k]), int(judged.object[k]), names[judged.labels[k]]
        box = found.evaluator.detections_of(number).boxes[judged.row[k]]
        marks = [Mark(objects.boxes[g], names[objects.labels[g]], ORANGE)] if g >= 0 else []
        marks.append(Mark(box, f"{name} {judged.scores[k]:.2f}", RED))
        label = told[int(judged.kind[k])].format(names[objects.labels[g]])
        pictures += _drawn(number, marks, f"{name}, {label}", found, source, side // 2, box)
    for g in np.flatnonzero(objects.is_missed)[:MOST_MISSED].tolist():
        name, box = names[objects.labels[g]], objects.boxes[g]
        marks, number = [Mark(box, name, ORANGE)], int(objects.image[g])
        caption = f"labelled {name}, and nothing like it was found"
        pictures += _drawn(number, marks, caption, found, source, side // 2, box)
    return pictures


def _drawn(
    number: int,
    marks: Sequence[Mark],
    told: str,
    found: Assessment,
    source: Source,
    side: int,
    around: Box | None = None,
) -> list[Picture]:
    """The image of a number with marks, cut around a box if one is given; none if it cannot be read."""
    path = source.paths[found.evaluator.image_id(number)]
    try:
        image = read_image(path, source.white)
    except ImageError:
        return []
    left, top, right, bottom = _window(around, image)
    small = resize_to_fit(image[top:bottom, left:right], (side, side))
    scale = small.shape[1] / (right - left)
    for is_named in (False, True):
        shown = [mark for mark in marks if bool(mark.caption) == is_named]
        boxes = np.array([mark.box for mark in shown]).reshape(-1, 4)
        small = draw_boxes(
            small,
            (boxes - [left, top, left, top]) * scale,
            np.arange(len(shown)),
            [mark.caption for mark in shown],
            hide_labels=not is_named,
            colours=[mark.colour for mark in shown],
        )
    return [Picture(small, f"{Path(path).name}: {told}")]


def _window(around: Box | None, image: Image) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of what is shown of an image."""
    height, width = image.shape[:2]
    if around is None:
        return 0, 0, width, height
    half = max((0.5 + AROUND) * float((around[2:] - around[:2]).max()), LEAST_CROP / 2)
    x, y = ((around[:2] + around[2:]) / 2).tolist()
    left, top = max(int(x - half), 0), max(int(y - half), 0)
    return left, top, min(int(x + half) + 1, width), min(int(y + half) + 1, height)
