"""Set matching: each object gets one query, at the least cost for all objects together.

Source: DETR (arXiv 2005.12872, eq. 1).

Letters: S stages matched independently, B batch, Q queries, C classes, N objects of the batch,
n objects of an image, P matched pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from utils.boxes import cxcywh_to_xyxy, generalized_iou

Similarity = Callable[[Tensor, Tensor], Tensor]
"""xyxy boxes (..., 4) and (..., 4), broadcast -> (...), larger for boxes that agree better."""

PAIRS_AT_ONCE = 2**21
PROBABILITY_EPS = 1e-8
WORST_COST = 1e6  # of a pair whose cost is no number: matched only if nothing else is left


class Match(NamedTuple):
    """Matched pairs, one entry each.

    Attributes:
        stage: (P,).
        image: (P,).
        query: (P,).
        object: index into the batch's objects, (P,).
    """

    stage: Tensor
    image: Tensor
    query: Tensor
    object: Tensor


@dataclass(frozen=True)
class HungarianAssigner:
    """One-to-one matching at least total cost, image by image.

    The cost of a pair is `cost_class` x focal difference of the object's class (what the query's
    focal loss changes by if the class is right) + `cost_l1` x sum of |difference| of the normalised
    cxcywh boxes - `cost_giou` x their similarity, GIoU unless another one is given. Of an image with more
    objects than queries, as many objects as there are queries are matched.

    With costs as below the answer is query 2 for object 0 and query 0 for object 1, 1 + 1 = 2,
    although query 0 is the best of object 0 too:

        query   object 0   object 1
          0        0          1
          1        5          9
          2        1          4

    Attributes:
        cost_class: weight of the class cost.
        cost_l1: weight of the L1 cost.
        cost_giou: weight of the similarity.
        alpha: balance of the focal cost.
        gamma: exponent of the focal cost.
    """

    cost_class: float
    cost_l1: float
    cost_giou: float
    alpha: float
    gamma: float

    @torch.no_grad()
    def __call__(
        self,
        logits: Tensor,
        boxes: Tensor,
        image_index: Tensor,
        labels: Tensor,
        object_boxes: Tensor,
        similarity: Similarity = generalized_iou,
    ) -> Match:
        """Match every stage and image.

        Args:
            logits: class logits, (S, B, Q, C).
            boxes: cxcywh, normalised, (S, B, Q, 4).
            image_index: image of each object, (N,), in any order.
            labels: class of each object, (N,).
            object_boxes: cxcywh, normalised, (N, 4).
            similarity: of boxes, normalised.
        """
        image_index = image_index.cpu()
        per_image = [(image_index == i).nonzero().squeeze(1) for i in range(logits.shape[1])]
        costs = [
            self.costs(
                logits[:, image],
                boxes[:, image],
                labels[objects],
                object_boxes[objects],
                similarity,
            )
            for image, objects in enumerate(per_image)
        ]
        counts = [len(objects) for objects in per_image]
        on_cpu = torch.cat(costs, -1).cpu().split(counts, -1)  # one transfer for all
        pairs = [
            _solve(cost, image, objects)
            for image, (cost, objects) in enumerate(zip(on_cpu, per_image, strict=True))
        ]
        stage, image, query, chosen = torch.cat(pairs, 1).to(logits.device)
        return Match(stage, image, query, chosen)

    def costs(
        self,
        logits: Tensor,
        boxes: Tensor,
        labels: Tensor,
        object_boxes: Tensor,
        similarity: Similarity = generalized_iou,
    ) -> Tensor:
        """Cost of each query for each object, (..., Q, n).

        Args:
            logits: (..., Q, C).
            boxes: cxcywh, (..., Q, 4).
            labels: (n,).
            object_boxes: cxcywh, (n, 4).
            similarity: of boxes; asked for as many pairs at a time as `PAIRS_AT_ONCE` allows.
        """
        probability = logits.float().sigmoid()[..., labels]
        boxes, object_boxes = boxes.float(), object_boxes.float()
        wrong = 1 - probability
        present = -self.alpha * wrong**self.gamma * (probability + PROBABILITY_EPS).log()
        absent = (self.alpha - 1) * probability**self.gamma * (wrong + PROBABILITY_EPS).log()
        distance = torch.cdist(boxes, object_boxes.expand(*boxes.shape[:-2], -1, -1), p=1)
        corners, object_corners = cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(object_boxes)
        columns = max(PAIRS_AT_ONCE // max(corners[..., 0].numel(), 1), 1)
        parts = object_corners.split(columns)
        alike = torch.cat([similarity(corners[..., :, None, :], part) for part in parts], -1)
        cost = (
            self.cost_class * (present - absent) + self.cost_l1 * distance - self.cost_giou * alike
        )
        return cost.nan_to_num(WORST_COST, WORST_COST, WORST_COST)


def solve_assignment(cost: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns of least total cost for one matrix (Q, n): min(Q, n) pairs."""
    from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(cost.numpy())
    return torch.from_numpy(rows), torch.from_numpy(columns)


def _solve(costs: Tensor, image: int, objects: Tensor) -> Tensor:
    """Pairs of one image, rows stage, image, query, object of (4, P), from costs (S, Q, n)."""
    found = [objects.new_zeros(4, 0)]
    for stage, cost in enumerate(costs):
        queries, columns = solve_assignment(cost)
        place = objects.new_tensor([[stage], [image]]).expand(2, len(queries))
        found.append(torch.cat((place, torch.stack((queries, objects[columns])))))
    return torch.cat(found, 1)
