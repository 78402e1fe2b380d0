"""YOLOv5's loss: CIoU of matched boxes, binary cross entropy of objectness (target: the IoU) and of classes.

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
from utils.boxes import complete_iou, cxcywh_to_xyxy, xyxy_to_cxcywh
from utils.structures import Targets


def scaled_gains(
    hyp: Mapping[str, Any], num_classes: int, levels: int, imgsz: tuple[int, int]
) -> dict[str, Any]:
    """The recipe's gains are for 80 classes, three levels and 640 pixels; bring them to this model and size."""
    side = (imgsz[0] * imgsz[1]) ** 0.5
    return {
        **hyp,
        "box": hyp["box"] * 3 / levels,
        "cls": hyp["cls"] * num_classes / 80 * 3 / levels,
        "obj": hyp["obj"] * (side / 640) ** 2 * 3 / levels,
    }


class AnchorLoss:
    """(raw, targets) -> `box`, `obj`, `cls`, each weighted; their sum is multiplied by the batch size."""

    times_batch = True

    def __init__(self, head: AnchorDetect, hyp: Mapping[str, Any]) -> None:
        self.head = head
        self.hyp = hyp
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
        iou = self._iou(chosen, boxes, anchors, matches)
        _put_largest(wanted, index, iou.detach().clamp(min=0))
        objectness = self._bce(prediction[..., 4], wanted, self.hyp["obj_pw"])
        return (
            (1 - iou).mean(),
            objectness,
            self._class_loss(chosen, targets.labels[matches.objects]),
        )

    def _iou(
        self, chosen: Tensor, boxes: Tensor, anchors: Tensor, matches: AnchorMatches
    ) -> Tensor:
        """CIoU (P,) of predictions and their objects, both in cells relative to the matched cell."""
        cell = torch.stack((matches.cols, matches.rows), -1)
        centre = chosen[:, :2].sigmoid() * 2 - 0.5
        size = (chosen[:, 2:4].sigmoid() * 2) ** 2 * anchors[matches.anchors]
        goal = boxes[matches.objects]
        goal = torch.cat((goal[:, :2] - cell, goal[:, 2:]), -1)
        return complete_iou(cxcywh_to_xyxy(torch.cat((centre, size), -1)), cxcywh_to_xyxy(goal))

    def _class_loss(self, chosen: Tensor, labels: Tensor) -> Tensor:
        if self.head.num_classes == 1:  # one class: objectness says it all
            return chosen.new_zeros(())
        wanted = torch.full_like(chosen[:, 5:], self.negative)
        wanted[torch.arange(len(labels), device=labels.device), labels] = self.positive
        return self._bce(chosen[:, 5:], wanted, self.hyp["cls_pw"])

    def _bce(self, logits: Tensor, wanted: Tensor, positive_weight: float) -> Tensor:
        weight = logits.new_tensor(positive_weight)
        gamma = self.hyp.get("fl_gamma", 0.0)
        if gamma == 0:
            return F.binary_cross_entropy_with_logits(logits, wanted, pos_weight=weight)
        loss = F.binary_cross_entropy_with_logits(
            logits, wanted, pos_weight=weight, reduction="none"
        )
        probability = logits.sigmoid()
        agreement = wanted * probability + (1 - wanted) * (1 - probability)
        alpha = wanted * 0.25 + (1 - wanted) * 0.75
        return (loss * alpha * (1 - agreement) ** gamma).mean()


def _put_largest(wanted: Tensor, index: tuple[Tensor, ...], values: Tensor) -> None:
    """Write `values` at `index`; where several objects claim one prediction the largest stays, whatever their order."""
    strides = wanted.stride()
    flat = torch.stack([i * s for i, s in zip(index, strides, strict=True)]).sum(0)
    wanted.view(-1).scatter_reduce_(0, flat, values.to(wanted.dtype), "amax")
