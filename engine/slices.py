"""Large pictures in slices: each is looked at by itself, and so is the whole; what they find is put together.

The way of SAHI (Akyon et al. 2022, arXiv 2202.06934): slices overlap, those at the far edges are moved back to full
size, and boxes of one class that cover each other are joined (greedy non-maximum merging).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from data.transforms import letterbox
from data.videos import Frame
from engine.evaluation import Measurable
from engine.frames import Fitted, detect, fit, in_batches
from engine.options import Thresholds
from utils.boxes import box_area
from utils.structures import Detections

AT_ONCE = 8
"""Slices in a batch, where `--batch-size` asks for no more."""
OVERLAP = 0.2
"""Share that a slice has in common with the next, where `--overlap` does not say; SAHI's."""
COVERED = 0.5
"""Share of the smaller of two boxes that the other one must cover for both to be one object; SAHI's."""


def starts(length: int, size: int, overlap: float) -> list[int]:
    """Where slices of `size` begin along `length` pixels; the last one is moved back to end with them."""
    if length <= size:
        return [0]
    step = size - int(overlap * size)
    return [*range(0, length - size, step), length - size]


def fit_slices(
    frame: Frame, imgsz: tuple[int, int], stride: int | None, size: int, overlap: float
) -> list[Fitted]:
    """The whole frame and its slices of `size` pixels, each fitted as `fit` does; the frame alone where one holds it all."""
    height, width = frame.image.shape[:2]
    corners = [(y, x) for y in starts(height, size, overlap) for x in starts(width, size, overlap)]
    parts = [fit(frame, imgsz, stride)]
    for top, left in corners if len(corners) > 1 else []:
        image = frame.image[top : top + size, left : left + size]
        parts.append(Fitted(frame, *letterbox(image, imgsz, stride=stride), corner=(top, left)))
    return parts


def detect_slices(
    model: Measurable,
    parts: Sequence[Fitted],
    thresholds: Thresholds,
    classes: Sequence[int] | None = None,
    at_once: int = AT_ONCE,
) -> Detections:
    """Detections of a frame, on the CPU, boxes in its pixels.

    Args:
        model: the network.
        parts: of the frame.
        thresholds: what counts as a detection.
        classes: only these, by index.
        at_once: parts in a batch.
    """
    found: list[Detections] = []
    for batch in in_batches(parts, at_once):
        found += detect(model, batch, thresholds, classes)
    if len(found) == 1:
        return found[0]
    every = Detections(*(torch.cat(tensors) for tensors in zip(*found)))
    merged = merge_covered(every, agnostic=thresholds.agnostic)
    return Detections(*(tensor[: thresholds.max_det] for tensor in merged))


def merge_covered(
    found: Detections, covered: float = COVERED, *, agnostic: bool = False
) -> Detections:
    """Join boxes of one class, or of any if `agnostic`, of which one covers at least `covered` of the smaller.

    From the best score down each box takes those that it covers, or that cover it, and grows to hold them; the rest
    goes on. One that no longer fits to what has grown is dropped.
    """
    order = found.scores.argsort(descending=True, stable=True)
    boxes, labels = found.boxes[order].clone(), found.labels[order]
    is_free = torch.ones(len(boxes), dtype=torch.bool)
    kept = []
    for number in range(len(boxes)):
        if not is_free[number]:
            continue
        kept.append(number)
        is_free[number] = False
        is_same = is_free & (agnostic | (labels == labels[number]))
        is_same[is_same.clone()] = _covered_share(boxes[number], boxes[is_same]) >= covered
        is_free &= ~is_same
        for other in boxes[is_same]:
            if _covered_share(boxes[number], other) >= covered:
                low, high = torch.minimum(boxes[number], other), torch.maximum(boxes[number], other)
                boxes[number] = torch.cat((low[:2], high[2:]))
    return Detections(boxes[kept], found.scores[order][kept], labels[kept])


def _covered_share(box: Tensor, others: Tensor) -> Tensor:
    """Area that a box (4,) shares with others (..., 4), as a share of the smaller of the two, (...)."""
    low, high = torch.maximum(box[:2], others[..., :2]), torch.minimum(box[2:], others[..., 2:])
    shared = box_area(torch.cat((low, high), dim=-1))
    return shared / torch.minimum(box_area(box), box_area(others)).clamp(min=1e-9)
