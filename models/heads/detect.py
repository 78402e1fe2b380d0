"""The name `Detect`: with `[nc, anchors]` the anchor head of YOLOv5, with `[nc]` the DFL head of YOLO11."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from models.heads.anchor import AnchorDetect, anchor_rule
from models.heads.dfl import DFLDetect
from models.registry import LayerError, Plan, Scaling, register, single


def _rule(in_channels: Sequence[Any], args: Sequence[Any], scaling: Scaling) -> Plan:
    if not args or isinstance(args[0], bool) or not isinstance(args[0], int):
        raise LayerError(f"got {list(args)}, expected [nc, anchors] (YOLOv5) or [nc] (YOLO11)")
    if len(args) == 2:
        return anchor_rule(in_channels, args, scaling)
    if len(args) == 1:
        levels = [single([channels]) for channels in in_channels]
        return Plan([args[0], 16, None, levels], levels)
    raise LayerError(
        f"got {len(args)} arguments {list(args)}, expected [nc, anchors] (YOLOv5) or [nc] (YOLO11)"
    )


@register(_rule, "Detect")
def build_detect(num_classes: int, *rest: Any) -> nn.Module:
    """The head that the row's arguments mean."""
    return (
        AnchorDetect(num_classes, *rest)
        if isinstance(rest[0], list)
        else DFLDetect(num_classes, *rest)
    )
