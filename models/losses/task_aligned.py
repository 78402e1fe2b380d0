"""Losses of YOLO11 and YOLOv9: classification towards alignment, a box loss, distribution focal loss.

Sources: TOOD (arXiv 2108.07755) for targets and weights, DFL (arXiv 2006.04388, eq. 6), YOLOv9 (arXiv
2402.13616) for the weighted auxiliary branch, YOLO26 (arXiv 2606.03748) for L1 where distances
have no bins. The assignment goes by CIoU whatever the box loss is.
Letters: B batch, A anchor points, C classes, R bins of a distance, P positive predictions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from models.assigners.task_aligned import Assignment, Predictions, Small, assign
from models.heads.ddetect import DualDDetect, DualRaw
from models.heads.dfl import DFLHead, DFLRaw, distances_to_boxes, expected_distance
from models.heads.one_to_one import OneToOne
from models.losses.box import BoxLoss, Frame
from models.losses.classification import ClassTargets, choose_class_loss
from models.losses.epochs import SameEveryEpoch
from utils.structures import Targets

# A distance stays this far below the last bin, so that there is always a bin above it.
LAST_BIN_MARGIN = 0.01


Measured = DFLHead | DualDDetect | OneToOne


class TaskAlignedLoss(SameEveryEpoch):
    """Loss of one branch of predictions.

    Args:
        head: gives `reg_max`.
        hyp: weights `box`, `cls`, `dfl` (`l1` where distances have no bins); assignment `tal_topk`,
            `tal_alpha`, `tal_beta`; `stal`, of how many finest strides the sides of smaller objects count (0: as
            they are); `box_loss` (CIoU if it has none), `cls_loss` (`bce`) and the numbers that these read.
        allow_code: whether `box_loss` may be a user's file.
        only_best: each object trains one prediction alone, see `assign`.
    """

    times_batch = True

    def __init__(
        self,
        head: Measured,
        hyp: Mapping[str, Any],
        *,
        allow_code: bool = False,
        only_best: bool = False,
    ) -> None:
        self.hyp, self.only_best = hyp, only_best
        self.box_loss = BoxLoss(hyp.get("box_loss", "ciou"), hyp, allow_code=allow_code)
        self.class_loss = choose_class_loss(hyp.get("cls_loss", "bce"), hyp)
        self.reg_max = head.reg_max
        self.side_term = "dfl" if self.reg_max > 1 else "l1"
        self.weights = {name: float(hyp[name]) for name in ("box", "cls", self.side_term)}
        self.topk = int(hyp["tal_topk"])
        self.alpha, self.beta = float(hyp["tal_alpha"]), float(hyp["tal_beta"])
        finest = float(min(head.strides))
        self.small = Small(finest, finest * hyp["stal"]) if hyp.get("stal") else Small()

    def __call__(self, raw: DFLRaw, targets: Targets) -> dict[str, Tensor]:
        """Weighted terms `box`, `cls` and `dfl` or `l1`, each a scalar in float32."""
        raw = raw._replace(distances=raw.distances.float(), logits=raw.logits.float())
        assignment = self._assign(raw, targets)
        normaliser = assignment.weights.sum().clamp(min=1)
        box, sides = self._localisation(raw, targets, assignment)
        self.box_loss.end_step()
        classes = self._classification(raw, targets, assignment)
        terms = {"box": box, "cls": classes, self.side_term: sides}
        return {name: self.weights[name] * term / normaliser for name, term in terms.items()}

    @torch.no_grad()
    def _assign(self, raw: DFLRaw, targets: Targets) -> Assignment:
        boxes = self._boxes(raw.distances, raw.points, raw.strides)
        predictions = Predictions(raw.logits.sigmoid(), boxes, raw.points)
        return assign(
            predictions,
            targets,
            topk=self.topk,
            alpha=self.alpha,
            beta=self.beta,
            small=self.small,
            only_best=self.only_best,
        )

    def _boxes(self, distances: Tensor, points: Tensor, strides: Tensor) -> Tensor:
        if self.reg_max > 1:
            bins = torch.arange(self.reg_max, dtype=torch.float32, device=distances.device)
            distances = expected_distance(distances, bins)
        return distances_to_boxes(points, distances * strides)

    def _classification(self, raw: DFLRaw, targets: Targets, assignment: Assignment) -> Tensor:
        """Class loss towards the alignment weight of the object's class, summed."""
        wanted = torch.zeros_like(raw.logits)
        labels = targets.labels[assignment.objects]
        images, places = _places(assignment, raw.points)
        wanted[images, places, labels] = assignment.weights
        return self.class_loss(raw.logits, ClassTargets(wanted, wanted), self.hyp).sum()

    def _localisation(
        self, raw: DFLRaw, targets: Targets, assignment: Assignment
    ) -> tuple[Tensor, Tensor]:
        """Box loss of the positives and that of their distances (focal, or L1), weighted by alignment, summed."""
        images, places = _places(assignment, raw.points)
        points, strides = raw.points[places], raw.strides[places]
        distances = raw.distances[images, places]
        truths = targets.boxes[assignment.objects].float()
        frame = Frame(_image_size(raw))
        missed = self.box_loss(self._boxes(distances, points, strides), truths, frame)
        sides = torch.cat((points - truths[:, :2], truths[:, 2:] - points), 1) / strides
        if self.reg_max > 1:
            off = distribution_focal_loss(distances.view(-1, 4, self.reg_max), sides).mean(1)
        else:
            off = (distances - sides).abs().sum(1)
        return (missed * assignment.weights).sum(), (off * assignment.weights).sum()


def _image_size(raw: DFLRaw) -> tuple[Tensor, Tensor]:
    """Height and width in pixels: where the last cells end."""
    width, height = (raw.points + raw.strides / 2).amax(0).unbind()
    return height, width


def _places(assignment: Assignment, points: Tensor) -> tuple[Tensor, Tensor]:
    """Image and anchor point of each positive prediction, (P,) and (P,)."""
    count = points.shape[0]
    return assignment.predictions // count, assignment.predictions % count


def distribution_focal_loss(logits: Tensor, distances: Tensor) -> Tensor:
    """Cross-entropy towards the two bins around a distance, each weighted by its nearness.

    Args:
        logits: (..., R).
        distances: in bins, (...); cut to the range of the bins.

    Returns:
        One value per distance, (...).
    """
    distances = distances.clamp(0, logits.shape[-1] - 1 - LAST_BIN_MARGIN)
    lower = distances.floor()
    above = distances - lower
    nearest = torch.stack((lower, lower + 1), -1).long()
    below_and_above = logits.log_softmax(-1).gather(-1, nearest)
    return -(below_and_above * torch.stack((1 - above, above), -1)).sum(-1)


class DualTaskAlignedLoss(SameEveryEpoch):
    """`TaskAlignedLoss` of the main branch plus `aux_weight` times that of the auxiliary one."""

    times_batch = True

    def __init__(self, head: Measured, hyp: Mapping[str, Any], *, allow_code: bool = False) -> None:
        self.branch = TaskAlignedLoss(head, hyp, allow_code=allow_code)
        self.box_loss = self.branch.box_loss
        self.aux_weight = float(hyp["aux_weight"])

    def __call__(self, raw: DualRaw, targets: Targets) -> dict[str, Tensor]:
        """Weighted terms `box`, `cls` and `dfl`, each a scalar in float32."""
        main, aux = self.branch(raw.main, targets), self.branch(raw.aux, targets)
        return {name: main[name] + self.aux_weight * aux[name] for name in main}
