"""YOLOv9's heads: decoupled towers, alone or with an auxiliary twin for training.

Sources: YOLOv9 (Wang et al., arXiv 2402.13616) for the auxiliary branch, DFL (arXiv 2006.04388) for
distances.
Letters: B batch, A anchor points, C classes, R bins of a distance.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from models.common import Conv
from models.head import Head
from models.heads.dfl import (
    DFL,
    DFLHead,
    DFLRaw,
    channels_first_layout,
    check_levels,
    decode_raw,
    distance_reader,
    predict,
    set_biases,
    tell_thin_objects,
)
from models.registry import HeadForm, LayerError, Plan, Scaling, detection_head, register
from utils.structures import Decoded, Targets

REG_MAX = 16
GROUPS = 4


class DDetect(DFLHead):
    """YOLOv9's head; see `DFLHead`."""

    family = "yolov9"

    def __init__(self, num_classes: int, channels: Sequence[int], reg_max: int = REG_MAX) -> None:
        super().__init__(num_classes, channels, reg_max)
        self.cv2 = _box_towers(channels, reg_max)
        self.cv3 = _class_towers(channels, num_classes)
        self.dfl = distance_reader(reg_max)


class DualRaw(NamedTuple):
    """Raw predictions of both branches; only `main` is decoded.

    Attributes:
        main: what inference uses.
        aux: what helps training.
    """

    main: DFLRaw
    aux: DFLRaw


def _dual_rule(in_channels: Sequence[Any], args: Sequence[Any], scaling: Scaling) -> Plan:
    if scaling.head != HeadForm():
        raise LayerError(
            f"got end2end {scaling.head.end2end} and reg_max {scaling.head.reg_max}, expected neither: it has two branches "
            "already. Take the gelan of the same size."
        )
    return detection_head(in_channels, args, scaling)


@register(_dual_rule)
class DualDDetect(Head[DualRaw]):
    """Two YOLOv9 heads: the first half of the inputs feeds the auxiliary one, the rest the main.

    Args:
        num_classes: C.
        channels: channels of each feature map, auxiliary levels first.
    """

    family = "yolov9"
    postprocess = "nms"
    layout = "channels"
    class_outputs = ("cv3.*.2.*", "cv5.*.2.*")

    def __init__(self, num_classes: int, channels: Sequence[int]) -> None:
        super().__init__(num_classes, len(channels) // 2)
        check_levels(channels, REG_MAX)
        if len(channels) % 2:
            raise LayerError(
                f"got {len(channels)} feature maps, expected an even number: auxiliary, then main"
            )
        self.reg_max = REG_MAX
        self.num_levels = len(channels) // 2
        self.main_inputs = slice(self.num_levels, None)
        self.aux_strides = self.strides
        aux, main = channels[: self.num_levels], channels[self.num_levels :]
        self.cv2 = _box_towers(aux)
        self.cv3 = _class_towers(aux, num_classes)
        self.cv4 = _box_towers(main)
        self.cv5 = _class_towers(main, num_classes)
        self.dfl = DFL(REG_MAX)
        self.dfl2 = DFL(REG_MAX)

    def main_head(self) -> DDetect:
        """The main branch as a head of its own, sharing its modules with this one."""
        with torch.device("meta"):
            head = DDetect(self.num_classes, [1] * self.num_levels)
        head.cv2, head.cv3, head.dfl = self.cv4, self.cv5, self.dfl2
        head.strides = self.strides
        return head.train(self.training)

    def initialize(self, strides: Sequence[int]) -> None:
        """Set the biases of both branches; `self.strides` are the main branch's."""
        self.strides = tuple(strides[self.main_inputs])
        self.aux_strides = tuple(strides[: self.num_levels])
        set_biases(self.cv2, self.cv3, self.aux_strides)
        set_biases(self.cv4, self.cv5, self.strides)

    def forward(self, features: Sequence[Tensor], targets: Targets | None = None) -> DualRaw:
        """Raw predictions of both branches for their feature maps (B, *, H, W)."""
        aux = predict(features[: self.num_levels], self.cv2, self.cv3, self.aux_strides)
        main = predict(features[self.main_inputs], self.cv4, self.cv5, self.strides)
        return DualRaw(main, aux)

    def decode(self, raw: DualRaw) -> Decoded:
        """Boxes (B, A, 4) in xyxy pixels and class probabilities (B, A, C) of the main branch."""
        return decode_raw(raw.main, self.dfl2)

    def export_layout(self, raw: DualRaw) -> Tensor:
        """(B, 4 + C, A): cxcywh in pixels, then class probabilities, of the main branch."""
        return channels_first_layout(self.decode(raw))

    def tell_limits(self, sizes: np.ndarray, per_image: np.ndarray) -> None:
        """Objects between the anchor points."""
        tell_thin_objects(sizes, self.strides)


def _box_towers(channels: Sequence[int], reg_max: int = REG_MAX) -> nn.ModuleList:
    width = max(_multiple(channels[0] // 4, GROUPS), 4 * reg_max, 16)
    return nn.ModuleList(
        nn.Sequential(
            Conv(c, width, 3),
            Conv(width, width, 3, groups=GROUPS),
            nn.Conv2d(width, 4 * reg_max, 1, groups=GROUPS),
        )
        for c in channels
    )


def _class_towers(channels: Sequence[int], num_classes: int) -> nn.ModuleList:
    width = max(channels[0], min(2 * num_classes, 128))
    return nn.ModuleList(
        nn.Sequential(Conv(c, width, 3), Conv(width, width, 3), nn.Conv2d(width, num_classes, 1))
        for c in channels
    )


def _multiple(value: int, divisor: int) -> int:
    """`value` rounded up to a multiple of `divisor`."""
    return -(-value // divisor) * divisor
