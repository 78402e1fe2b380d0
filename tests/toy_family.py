"""A family of its own: one point a cell, four distances and class scores; the nearest points of an object learn it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.head import Head
from models.heads.dfl import anchor_points, channels_first_layout, distances_to_boxes
from models.losses.box import BoxLoss, Frame
from models.losses.epochs import SameEveryEpoch
from models.registry import detection_head, register
from utils.structures import Decoded, Targets


class ToyRaw(NamedTuple):
    """Raw predictions (B, 4 + C, A) and their points in pixels (A, 2)."""

    values: Tensor
    points: Tensor


@register(detection_head)
class ToyHead(Head[ToyRaw]):
    """One convolution a level."""

    family = "toy"
    postprocess = "nms"
    layout = "channels"
    class_outputs = ()

    def __init__(self, num_classes: int, channels: Sequence[int]) -> None:
        super().__init__(num_classes, len(channels))
        self.levels = nn.ModuleList(nn.Conv2d(c, 4 + num_classes, 1) for c in channels)

    def initialize(self, strides: Sequence[int]) -> None:
        self.strides = tuple(strides)

    def forward(self, features: Sequence[Tensor], targets: Targets | None = None) -> ToyRaw:
        maps = [level(x) for level, x in zip(self.levels, features, strict=True)]
        points, _ = anchor_points(features, self.strides)
        return ToyRaw(torch.cat([m.flatten(2) for m in maps], 2), points)

    def decode(self, raw: ToyRaw) -> Decoded:
        values = raw.values.transpose(1, 2).float()
        boxes = distances_to_boxes(raw.points, F.softplus(values[..., :4]) * self.strides[0])
        return Decoded(boxes, values[..., 4:].sigmoid())

    def export_layout(self, raw: ToyRaw) -> Tensor:
        return channels_first_layout(self.decode(raw))


class ToyLoss(SameEveryEpoch):
    """`box` of the point nearest to each object's centre, `cls` of all points."""

    times_batch = True

    def __init__(self, head: ToyHead, hyp: Mapping[str, Any], *, allow_code: bool = False) -> None:
        self.head, self.weight = head, hyp["box"]
        self.box_loss = BoxLoss("giou", hyp)

    def __call__(self, raw: ToyRaw, targets: Targets) -> dict[str, Tensor]:
        decoded = self.head.decode(raw)
        centres = (targets.boxes[:, :2] + targets.boxes[:, 2:]) / 2
        place = (targets.image_index, torch.cdist(centres, raw.points).argmin(1))
        wanted = torch.zeros_like(decoded.scores)
        wanted[(*place, targets.labels)] = 1
        boxes = self.box_loss(decoded.boxes[place], targets.boxes, Frame((96, 96)))
        logits = raw.values[:, 4:].transpose(1, 2).float()
        scores = F.binary_cross_entropy_with_logits(logits, wanted)
        return {"box": self.weight * boxes.sum() / max(len(boxes), 1), "cls": scores}
