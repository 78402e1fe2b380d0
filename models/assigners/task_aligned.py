"""Task-aligned assignment: each object takes the predictions that classify and localise it best together.

Source: TOOD (Feng et al., ICCV 2021, arXiv 2108.07755, section 3.2): alignment = score^alpha * overlap^beta. As the YOLO
families have it, the overlap is CIoU cut at 0 (Zheng et al., arXiv 1911.08287), only anchor points inside an object may
serve it, and a prediction that several objects want goes to the one it overlaps most.

Letters: B batch, A anchor points, N objects of the whole batch, C classes, P positive pairs. Predictions of all images are
counted through: prediction i of image b is number b * A + i.

Work is done for as many objects at a time as `PAIRS_AT_ONCE` allows, and only on points inside them, so memory follows
neither the most crowded image nor the batch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from utils.boxes import complete_iou
from utils.structures import Targets

PAIRS_AT_ONCE = 2**21
EPS = 1e-9


class Candidates(NamedTuple):
    """Pairs of an object and a prediction that may serve it.

    Attributes:
        objects: object numbers, (P,), int64.
        predictions: prediction numbers, (P,), int64.
        alignment: score^alpha * overlap^beta, above 0, (P,).
        overlaps: CIoU cut at 0, (P,).
    """

    objects: Tensor
    predictions: Tensor
    alignment: Tensor
    overlaps: Tensor


class Assignment(NamedTuple):
    """Which prediction answers for which object; every prediction at most once.

    Attributes:
        objects: object numbers, (P,), int64.
        predictions: prediction numbers, (P,), int64.
        weights: target score of the object's class, in [0, 1], (P,).
    """

    objects: Tensor
    predictions: Tensor
    weights: Tensor


@torch.no_grad()
def assign(
    scores: Tensor,
    boxes: Tensor,
    points: Tensor,
    targets: Targets,
    *,
    topk: int,
    alpha: float,
    beta: float,
) -> Assignment:
    """Assign predictions to objects.

    Args:
        scores: class probabilities, (B, A, C), float32.
        boxes: predicted xyxy in pixels, (B, A, 4), float32.
        points: xy of the anchor points in pixels, (A, 2).
        targets: ground truth of the batch; object numbers are its rows.
        topk: predictions an object may take.
        alpha: power of the score.
        beta: power of the overlap.
    """
    order = canonical_order(targets)
    ordered = Targets(*(values[order] for values in targets))
    rows = max(PAIRS_AT_ONCE // points.shape[0], 1)
    chunks = [
        _candidates_of(ordered, start, rows, scores, boxes, points, topk, alpha, beta)
        for start in range(0, max(len(order), 1), rows)
    ]
    candidates = Candidates(*(torch.cat(parts) for parts in zip(*chunks, strict=True)))
    settled = weigh(settle(candidates), len(order))
    return settled._replace(objects=order[settled.objects])


def canonical_order(targets: Targets) -> Tensor:
    """Order of the objects by image, class and box, (N,): ties fall alike however the objects come in."""
    order = torch.arange(len(targets.labels), device=targets.labels.device)
    for key in (*reversed(targets.boxes.unbind(-1)), targets.labels, targets.image_index):
        order = order[key[order].argsort(stable=True)]
    return order


def _candidates_of(
    targets: Targets,
    start: int,
    count: int,
    scores: Tensor,
    boxes: Tensor,
    points: Tensor,
    topk: int,
    alpha: float,
    beta: float,
) -> Candidates:
    """Candidates of objects `start` to `start + count`."""
    images, labels, truths = (values[start : start + count] for values in targets)
    inside = points_inside(points, truths)
    rows, columns = inside.nonzero(as_tuple=True)
    found = complete_iou(boxes[images[rows], columns], truths[rows]).clamp(min=0)
    confidence = scores[images[rows], columns, labels[rows]]
    overlaps = torch.zeros(inside.shape, dtype=found.dtype, device=found.device)
    overlaps[rows, columns] = found
    alignment = torch.zeros_like(overlaps)
    alignment[rows, columns] = confidence.pow(alpha) * found.pow(beta)
    best = best_of_each(alignment, overlaps, topk)
    return best._replace(
        objects=best.objects + start,
        predictions=best.predictions + images[best.objects] * points.shape[0],
    )


def points_inside(points: Tensor, boxes: Tensor) -> Tensor:
    """Which of the points (A, 2) lie strictly inside which of the boxes (N, 4), (N, A), bool."""
    x, y = points.unbind(-1)
    left, top, right, bottom = boxes[..., None].unbind(1)
    return (x > left) & (y > top) & (x < right) & (y < bottom)


def best_of_each(alignment: Tensor, overlaps: Tensor, topk: int) -> Candidates:
    """The `topk` best aligned predictions of each object, those with alignment 0 left out.

    Args:
        alignment: (N, A), 0 where the point is outside the object.
        overlaps: (N, A).
        topk: predictions an object may take.
    """
    values, columns = alignment.topk(min(topk, alignment.shape[1]), dim=1)
    rows, ranks = (values > 0).nonzero(as_tuple=True)
    chosen = columns[rows, ranks]
    return Candidates(rows, chosen, values[rows, ranks], overlaps[rows, chosen])


def settle(candidates: Candidates) -> Candidates:
    """Leave each prediction to the object it overlaps most; of equals, to the first."""
    order = candidates.overlaps.argsort(descending=True, stable=True)
    order = order[candidates.predictions[order].argsort(stable=True)]
    taken = candidates.predictions[order]
    is_first = torch.ones_like(taken, dtype=torch.bool)
    is_first[1:] = taken[1:] != taken[:-1]
    return Candidates(*(values[order[is_first]] for values in candidates))


def weigh(settled: Candidates, num_objects: int) -> Assignment:
    """Scale each object's alignments so that the largest equals its largest overlap (TOOD, eq. 6)."""
    peaks = settled.alignment.new_zeros(2, num_objects)
    values = torch.stack((settled.alignment, settled.overlaps))
    peaks = peaks.scatter_reduce(1, settled.objects.expand(2, -1), values, "amax")
    alignment, overlap = peaks[:, settled.objects]
    weights = settled.alignment * overlap / (alignment + EPS)
    return Assignment(settled.objects, settled.predictions, weights)
