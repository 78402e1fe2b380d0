"""Task-aligned assignment: objects take the predictions that classify and localise them best.

Source: TOOD (Feng et al., ICCV 2021, arXiv 2108.07755, section 3.2): alignment = score^alpha *
overlap^beta. As the YOLO families have it, the overlap is CIoU cut at 0 (Zheng et al., arXiv
1911.08287), only anchor points inside an object may serve it, and a prediction that several objects
want goes to the one it overlaps most. Small objects may be looked for in a larger place (small-target-aware
assignment, YOLO26, arXiv 2606.03748): else none of the finest grid's points may lie in them. For a branch without
suppression each object keeps, of the predictions that are left to it, the best aligned one alone (YOLO26's 7 -> 1).

Letters: B batch, A anchor points, N objects of the whole batch, C classes, P positive pairs.
Predictions of all images are counted through: prediction i of image b is number b * A + i.

Work is done for as many objects at a time as `PAIRS_AT_ONCE` allows, and only on points inside
them, so memory follows neither the most crowded image nor the batch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from utils.boxes import complete_iou
from utils.structures import Targets

PAIRS_AT_ONCE = 2**21
EPS = 1e-9


class Small(NamedTuple):
    """Which objects are small: sides below `side` pixels count as `grown` where points inside them are sought."""

    side: float = 0.0
    grown: float = 0.0


NONE_SMALL = Small()


class Predictions(NamedTuple):
    """Decoded predictions, without gradient.

    Attributes:
        scores: class probabilities, (B, A, C), float32.
        boxes: xyxy in pixels, (B, A, 4), float32.
        points: xy of the anchor points in pixels, (A, 2).
    """

    scores: Tensor
    boxes: Tensor
    points: Tensor


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
    predictions: Predictions,
    targets: Targets,
    *,
    topk: int,
    alpha: float,
    beta: float,
    small: Small = NONE_SMALL,
    only_best: bool = False,
) -> Assignment:
    """Assign predictions to objects.

    Args:
        predictions: what the model says, counted through as the file's head tells.
        targets: ground truth of the batch; object numbers are its rows.
        topk: predictions an object may take.
        alpha: power of the score.
        beta: power of the overlap.
        small: objects that serve more points than lie in them.
        only_best: leave each object one prediction, the best aligned of those that no other object won.
    """
    order = canonical_order(targets)
    ordered = Targets(*(values[order] for values in targets))
    count = predictions.points.shape[0]
    rows = max(PAIRS_AT_ONCE // count, 1)
    found = []
    for start in range(0, max(len(order), 1), rows):
        part = Targets(*(values[start : start + rows] for values in ordered))
        best = best_of_each(*align(predictions, part, alpha, beta, small), topk)
        numbers = best.predictions + part.image_index[best.objects] * count
        found.append(best._replace(objects=best.objects + start, predictions=numbers))
    candidates = Candidates(*(torch.cat(parts) for parts in zip(*found, strict=True)))
    settled = settle(candidates)
    assignment = weigh(best_left(settled) if only_best else settled, len(order))
    return assignment._replace(objects=order[assignment.objects])


def canonical_order(targets: Targets) -> Tensor:
    """Order by image, class and box, (N,): ties fall alike however the objects come in."""
    order = torch.arange(len(targets.labels), device=targets.labels.device)
    for key in (*reversed(targets.boxes.unbind(-1)), targets.labels, targets.image_index):
        order = order[key[order].argsort(stable=True)]
    return order


def align(
    predictions: Predictions,
    targets: Targets,
    alpha: float,
    beta: float,
    small: Small = NONE_SMALL,
) -> tuple[Tensor, Tensor]:
    """Alignment and overlap of every object with its image's predictions, (N, A) and (N, A).

    Both are 0 where the anchor point is not inside the object.
    """
    inside = points_inside(predictions.points, grow_small(targets.boxes, small))
    rows, columns = inside.nonzero(as_tuple=True)
    images = targets.image_index[rows]
    found = complete_iou(predictions.boxes[images, columns], targets.boxes[rows]).clamp(min=0)
    scores = predictions.scores[images, columns, targets.labels[rows]]
    overlaps = found.new_zeros(inside.shape)
    alignment = torch.zeros_like(overlaps)
    overlaps[rows, columns] = found
    alignment[rows, columns] = scores.pow(alpha) * found.pow(beta)
    return alignment, overlaps


def grow_small(boxes: Tensor, small: Small) -> Tensor:
    """xyxy boxes (N, 4) with the same centres, short sides replaced: (2, 5, 8, 25) is (-3, 5, 13, 25) for 8 and 16."""
    centre, size = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
    half = torch.where(size < small.side, small.grown, size) / 2
    return torch.where(
        (size < small.side).repeat(1, 2), torch.cat((centre - half, centre + half), 1), boxes
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
    return _largest_of_each(candidates, candidates.predictions, candidates.overlaps)


def best_left(settled: Candidates) -> Candidates:
    """Leave each object its best aligned prediction; of equals, the first."""
    return _largest_of_each(settled, settled.objects, settled.alignment)


def _largest_of_each(candidates: Candidates, owners: Tensor, values: Tensor) -> Candidates:
    """The pair of largest value of each owner (P,), ordered by owner; of equals the first."""
    order = values.argsort(descending=True, stable=True)
    order = order[owners[order].argsort(stable=True)]
    taken = owners[order]
    is_first = torch.ones_like(taken, dtype=torch.bool)
    is_first[1:] = taken[1:] != taken[:-1]
    return Candidates(*(part[order[is_first]] for part in candidates))


def weigh(settled: Candidates, num_objects: int) -> Assignment:
    """Scale each object's alignments so that the largest equals its largest overlap."""
    peaks = settled.alignment.new_zeros(2, num_objects)
    values = torch.stack((settled.alignment, settled.overlaps))
    peaks = peaks.scatter_reduce(1, settled.objects.expand(2, -1), values, "amax")
    alignment, overlap = peaks[:, settled.objects]
    weights = settled.alignment * overlap / (alignment + EPS)
    return Assignment(settled.objects, settled.predictions, weights)
