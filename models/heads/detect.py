"""The names `Detect`, with `[nc, anchors]` the anchor head of YOLOv5 and with `[nc]` the DFL head of YOLO11, and `DDetect`.

The file's keys say more of the last two: `reg_max: 1` for distances without bins, `end2end: true` for a one-to-one branch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from models.heads.anchor import AnchorDetect, anchor_rule
from models.heads.ddetect import DDetect
from models.heads.dfl import DFLDetect
from models.heads.one_to_one import OneToOneDDetect, OneToOneDetect
from models.registry import HeadForm, LayerError, Plan, Scaling, detection_head, register, single


def _rule(in_channels: Sequence[Any], args: Sequence[Any], scaling: Scaling) -> Plan:
    if not args or isinstance(args[0], bool) or not isinstance(args[0], int):
        raise LayerError(f"got {list(args)}, expected [nc, anchors] (YOLOv5) or [nc] (YOLO11)")
    if len(args) == 2:
        return anchor_rule(in_channels, args, scaling)
    if len(args) == 1:
        levels = [single([channels]) for channels in in_channels]
        reg_max, end2end = scaling.head
        return Plan([args[0], reg_max, end2end or None, levels], levels)
    raise LayerError(
        f"got {len(args)} arguments {list(args)}, expected [nc, anchors] (YOLOv5) or [nc] (YOLO11)"
    )


@register(_rule, "Detect")
def build_detect(num_classes: int, *rest: Any) -> nn.Module:
    """The head that the row's arguments mean."""
    if isinstance(rest[0], list):
        return AnchorDetect(num_classes, *rest)
    reg_max, end2end, channels = rest
    head = DFLDetect(num_classes, reg_max, channels)
    return OneToOneDetect(head) if end2end else head


def _ddetect_rule(in_channels: Sequence[Any], args: Sequence[Any], scaling: Scaling) -> Plan:
    plan = detection_head(in_channels, args, scaling)
    return plan if scaling.head == HeadForm() else plan._replace(args=[*plan.args, *scaling.head])


@register(_ddetect_rule, "DDetect")
def build_ddetect(
    num_classes: int, channels: Sequence[int], reg_max: int = 16, end2end: bool = False
) -> nn.Module:
    """YOLOv9's single head."""
    head = DDetect(num_classes, channels, reg_max)
    return OneToOneDDetect(head) if end2end else head
