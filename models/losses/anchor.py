"""YOLOv5's loss: a box loss of matched boxes, cross entropy of objectness, a class loss.

Objectness aims at the CIoU of the matched box, whatever the box loss is: a score must tell how well a box fits,
on a scale that does not change with the loss.

Letters: B batch, N objects, P matches of a level, K anchors, H, W cells, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.assigners.anchor_ratio import AnchorMatches, assign_level
from models.heads.anchor import AnchorDetect, AnchorRaw
from models.losses.box import BoxLoss, Frame
from models.losses.classification import (
    ClassTargets,
    binary_cross_entropy,
    choose_class_loss,
    focal_loss,
)
from models.losses.epochs import SameEveryEpoch
from utils.boxes import complete_iou, cxcywh_to_xyxy, elementwise_iou, xyxy_to_cxcywh
from utils.structures import Targets

PAPERS_ALPHA = 0.25  # arXiv 1708.02002, for recipes that have a `fl_gamma` and no `focal_alpha`


def scaled_gains(hyp: dict[str, Any], head: AnchorDetect, imgsz: tuple[int, int]) -> dict[str, Any]:
    """The recipe's gains are for 80 classes, three levels and 640 pixels; bring them to this model and size."""
    side, levels = (imgsz[0] * imgsz[1]) ** 0.5, len(head.strides)
    return hyp | {
        "box": hyp["box"] * 3 / levels,
        "cls": hyp["cls"] * head.num_classes / 80 * 3 / levels,
        "obj": hyp["obj"] * (side / 640) ** 2 * 3 / levels,
    }


class AnchorLoss(SameEveryEpoch):
    """(raw, targets) -> `box`, `obj`, `cls`, each weighted; their sum is multiplied by the batch size.

    Args:
        head: the head whose raw predictions come in.
        hyp: gains `box`, `obj`, `cls`; `obj_pw`, `cls_pw`, `anchor_t`; `box_loss` (CIoU if it has
            none), `cls_loss` (`bce`) and the numbers that these read; `fl_gamma` above 0 makes the cross
            entropies of objectness and classes focal.
        allow_code: whether `box_loss` may be a user's file.
    """

    times_batch = True

    def __init__(
        self, head: AnchorDetect, hyp: Mapping[str, Any], *, allow_code: bool = False
    ) -> None:
        self.head = head
        self.hyp = hyp
        self.box_loss = BoxLoss(hyp.get("box_loss", "ciou"), hyp, allow_code=allow_code)
        self.class_loss = choose_class_loss(hyp.get("cls_loss", "bce"), hyp)
        smoothing = hyp.get("label_smoothing", 0.0)
        self.positive, self.negative = 1 - 0.5 * smoothing, 0.5 * smoothing
        balance = {3: (4.0, 1.0, 0.4), 4: (4.0, 1.0, 0.25, 0.06)}
        self.balance = tuple(
            hyp.get("balance") or balance.get(len(head.strides), (1.0,) * len(head.strides))
        )

    def __call__(self, raw: AnchorRaw, targets: Targets) -> dict[str, Tensor]:
        """Weighted terms, each a scalar."""
        zero = raw.levels[0].new_zeros((), dtype=torch.float32)
        box, objectness, classes = zero, zero, zero
        for level, prediction in enumerate(raw.levels):
            level_box, level_obj, level_cls = self._level(prediction.float(), targets, level)
            box, classes = box + level_box, classes + level_cls
            objectness = objectness + level_obj * self.balance[level]
        self.box_loss.end_step()
        hyp = self.hyp
        return {
            "box": box * hyp["box"],
            "obj": objectness * hyp["obj"],
            "cls": classes * hyp["cls"],
        }

    def _level(
        self, prediction: Tensor, targets: Targets, level: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        stride = self.head.strides[level]
        height, width = prediction.shape[2:4]
        boxes = xyxy_to_cxcywh(targets.boxes.float()) / stride
        anchors = self.head.anchors[level].float()
        matches = assign_level(boxes, anchors, (height, width), self.hyp["anchor_t"])
        index = (targets.image_index[matches.objects], matches.anchors, matches.rows, matches.cols)
        chosen = prediction[index]
        wanted = torch.zeros_like(prediction[..., 4])
        if len(chosen) == 0:  # objectness alone still gives every parameter a gradient
            nothing = prediction.new_zeros(())
            return nothing, self._bce(prediction[..., 4], wanted, self.hyp["obj_pw"]), nothing
        found, goal = self._boxes(chosen, boxes, anchors, matches)
        fit = complete_iou(found.detach(), goal)
        _put_largest(wanted, index, fit.clamp(min=0))
        frame = Frame((height * stride, width * stride), unit=float(stride))
        return (
            self.box_loss(found, goal, frame).mean(),
            self._bce(prediction[..., 4], wanted, self.hyp["obj_pw"]),
            self._class_loss(
                chosen, targets.labels[matches.objects], elementwise_iou(found.detach(), goal)
            ),
        )

    def _boxes(
        self, chosen: Tensor, boxes: Tensor, anchors: Tensor, matches: AnchorMatches
    ) -> tuple[Tensor, Tensor]:
        """Predictions and their objects, xyxy (P, 4) each, in cells relative to the matched cell."""
        cell = torch.stack((matches.cols, matches.rows), -1)
        centre = chosen[:, :2].sigmoid() * 2 - 0.5
        size = (chosen[:, 2:4].sigmoid() * 2) ** 2 * anchors[matches.anchors]
        goal = boxes[matches.objects]
        goal = torch.cat((goal[:, :2] - cell, goal[:, 2:]), -1)
        return cxcywh_to_xyxy(torch.cat((centre, size), -1)), cxcywh_to_xyxy(goal)

    def _class_loss(self, chosen: Tensor, labels: Tensor, overlaps: Tensor) -> Tensor:
        """Of the matched predictions (P, 5 + C), whose boxes overlap their objects by `overlaps` (P,)."""
        if self.head.num_classes == 1:  # one class: objectness says it all
            return chosen.new_zeros(())
        logits = chosen[:, 5:]
        is_label = torch.zeros_like(logits)
        is_label[torch.arange(len(labels), device=labels.device), labels] = 1
        wanted = torch.where(is_label > 0, self.positive, self.negative)
        if self.class_loss is binary_cross_entropy:
            return self._bce(logits, wanted, self.hyp["cls_pw"])
        aims = ClassTargets(wanted, is_label * overlaps[:, None], is_label)
        return self.class_loss(logits, aims, self.hyp).mean()

    def _bce(self, logits: Tensor, wanted: Tensor, positive_weight: float) -> Tensor:
        """Mean cross entropy; focal with a `fl_gamma` above 0."""
        gamma = self.hyp.get("fl_gamma", 0.0)
        if gamma > 0:
            alpha = self.hyp.get("focal_alpha", PAPERS_ALPHA)
            return focal_loss(logits, wanted, alpha, gamma, positive_weight).mean()
        weight = logits.new_tensor(positive_weight)
        return F.binary_cross_entropy_with_logits(logits, wanted, pos_weight=weight)


def _put_largest(wanted: Tensor, index: tuple[Tensor, ...], values: Tensor) -> None:
    """Write `values` at `index`; where several objects claim one prediction the largest stays, whatever their order."""
    strides = wanted.stride()
    flat = torch.stack([i * s for i, s in zip(index, strides, strict=True)]).sum(0)
    wanted.view(-1).scatter_reduce_(0, flat, values.to(wanted.dtype), "amax")
