"""YOLO11's head: an anchor point a cell, distances to four sides as distributions, class scores.

Sources: DFL (Generalized Focal Loss, Li et al., arXiv 2006.04388, eq. 3-5) for distances as
distributions, FCOS (arXiv 1904.01355) for points and sides.
Letters: B batch, H, W size of a level, A = sum over levels of H * W, C classes, R bins of a
distance.
The functions here are shared with the YOLOv9 heads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from models.common import Conv, DWConv
from models.head import Head
from models.registry import LayerError
from utils.boxes import widen, xyxy_to_cxcywh
from utils.logger import get_logger
from utils.structures import Decoded, Targets

OBJECTS_PER_IMAGE = 5  # prior behind the class biases: so many objects in an image of 640 x 640


class DFLRaw(NamedTuple):
    """Raw predictions, levels one after the other.

    Attributes:
        distances: logits over the R bins of left, top, right and bottom, (B, A, 4R); with one bin the distances
            themselves, in strides.
        logits: class logits, (B, A, C).
        points: xy of the anchor points in pixels, (A, 2), float32.
        strides: pixels of one bin, (A, 1), float32.
    """

    distances: Tensor
    logits: Tensor
    points: Tensor
    strides: Tensor


class DFL(nn.Module):
    """Expected distance of a distribution over R bins, in bins; the fixed weight is 0 to R - 1."""

    def __init__(self, reg_max: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(reg_max, 1, 1, bias=False).requires_grad_(False)
        self.conv.weight.data = torch.arange(reg_max, dtype=torch.float32).view(1, reg_max, 1, 1)

    def forward(self, distances: Tensor) -> Tensor:
        """(..., 4R) logits to (..., 4) bins."""
        return expected_distance(distances, widen(self.conv.weight.flatten()))


class Distances(nn.Module):
    """Distances as they are predicted, in strides, without a distribution: `reg_max` 1 (YOLO26, arXiv 2606.03748)."""

    def forward(self, distances: Tensor) -> Tensor:
        """(..., 4) of any type to (..., 4) in float32 or wider."""
        return widen(distances)


def distance_reader(reg_max: int) -> DFL | Distances:
    """What makes distances of a box tower's outputs."""
    return DFL(reg_max) if reg_max > 1 else Distances()


def expected_distance(distances: Tensor, bins: Tensor) -> Tensor:
    """Mean of `bins` (R,) under each side's softmax, (..., 4R) to (..., 4) in float32 or wider."""
    sides = widen(distances).reshape(*distances.shape[:-1], 4, bins.shape[0])
    # Not a matrix product: autocast would run that in half precision, too coarse for a pixel.
    return (sides.softmax(-1) * bins).sum(-1)


def distances_to_boxes(points: Tensor, distances: Tensor) -> Tensor:
    """xyxy boxes (..., 4) reaching left, top, right, bottom `distances` from `points` (..., 2)."""
    low, high = distances.split(2, -1)
    return torch.cat((points - low, points + high), -1)


def anchor_points(maps: Sequence[Tensor], strides: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Cell centres (A, 2) in pixels and the stride of each (A, 1), for maps (B, *, H, W).

    Sizes are read from the maps, so that a traced graph computes them anew for every input.
    """
    points, sizes = [], []
    for level, stride in zip(maps, strides, strict=True):
        height, width = level.shape[-2:]
        y = (torch.arange(height, device=level.device, dtype=torch.float32) + 0.5) * stride
        x = (torch.arange(width, device=level.device, dtype=torch.float32) + 0.5) * stride
        grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).reshape(-1, 2)
        points.append(grid)
        sizes.append(torch.full_like(grid[:, :1], float(stride)))
    return torch.cat(points), torch.cat(sizes)


def predict(
    features: Sequence[Tensor],
    box_towers: nn.ModuleList,
    class_towers: nn.ModuleList,
    strides: Sequence[int],
) -> DFLRaw:
    """Run one tower of each kind on each feature map (B, *, H, W)."""
    distances = [tower(x) for tower, x in zip(box_towers, features, strict=True)]
    logits = [tower(x) for tower, x in zip(class_towers, features, strict=True)]
    return DFLRaw(_flat(distances), _flat(logits), *anchor_points(features, strides))


def _flat(maps: Sequence[Tensor]) -> Tensor:
    """(B, K, H, W) of every level to (B, A, K)."""
    return torch.cat([level.flatten(2) for level in maps], 2).transpose(1, 2)


def decode_raw(raw: DFLRaw, dfl: DFL | Distances) -> Decoded:
    """Boxes (B, A, 4) in xyxy pixels and class probabilities (B, A, C), float32 or wider."""
    boxes = distances_to_boxes(raw.points, dfl(raw.distances) * raw.strides)
    if isinstance(
        dfl, Distances
    ):  # a box turned inside out is none: runtimes differ in what NMS makes of it
        low, high = boxes.split(2, -1)
        boxes = torch.cat((low, torch.maximum(low, high)), -1)
    return Decoded(boxes, widen(raw.logits).sigmoid())


def channels_first_layout(decoded: Decoded) -> Tensor:
    """(B, 4 + C, A): cxcywh in pixels, then class probabilities."""
    return torch.cat((xyxy_to_cxcywh(decoded.boxes), decoded.scores), -1).transpose(1, 2)


def set_biases(
    box_towers: nn.ModuleList, class_towers: nn.ModuleList, strides: Sequence[int]
) -> None:
    """Start every distance level and every class at the score of a rare object.

    The class prior spreads a few objects over the cells of an image of 640 x 640.
    """
    for box, scores, stride in zip(box_towers, class_towers, strides, strict=True):
        box_output, class_output = _last_layer(box), _last_layer(scores)
        prior = OBJECTS_PER_IMAGE / class_output.out_channels / (640 / stride) ** 2
        for layer, value in ((box_output, 1.0), (class_output, math.log(prior))):
            assert layer.bias is not None
            nn.init.constant_(layer.bias, value)


def _last_layer(tower: nn.Module) -> nn.Conv2d:
    layer = list(tower.children())[-1]
    assert isinstance(layer, nn.Conv2d)
    return layer


def tell_thin_objects(sizes: np.ndarray, strides: Sequence[int]) -> None:
    """Log how many of `sizes` (N, 2) are thinner than the grid of anchor points."""
    thin = int((sizes.min(axis=1, initial=np.inf) < min(strides)).sum())
    if thin:
        get_logger().info(
            f"objects thinner than the finest stride of {min(strides)}, learned only where a point of its grid lies in "
            f"them: {thin} of {len(sizes)}"
        )


def check_levels(channels: Sequence[int], reg_max: int) -> None:
    """Refuse a head without inputs or without distances to choose from."""
    if not channels:
        raise LayerError("got no feature maps, expected at least one")
    if reg_max < 1:
        raise LayerError(f"got reg_max {reg_max}, expected 1 or more bins of distance")


class DFLHead(Head[DFLRaw]):
    """What heads of distances to four sides have in common; each builds its own towers, of boxes and of classes.

    Args:
        num_classes: C.
        channels: channels of each feature map.
        reg_max: R, bins of each distance; 1: the distance itself, in strides.

    Attributes:
        cv2, cv3: towers of distances and of classes, one a level.
    """

    postprocess = "nms"
    layout = "channels"
    class_outputs = ("cv3.*.2.*",)
    cv2: nn.ModuleList
    cv3: nn.ModuleList
    dfl: DFL | Distances

    def __init__(self, num_classes: int, channels: Sequence[int], reg_max: int) -> None:
        super().__init__(num_classes, len(channels))
        check_levels(channels, reg_max)
        self.reg_max = reg_max

    def initialize(self, strides: Sequence[int]) -> None:
        """Set the biases, which depend on the stride of each level."""
        self.strides = tuple(strides)
        set_biases(self.cv2, self.cv3, self.strides)

    def forward(self, features: Sequence[Tensor], targets: Targets | None = None) -> DFLRaw:
        """Raw predictions for one feature map (B, *, H, W) a level."""
        return predict(features, self.cv2, self.cv3, self.strides)

    def decode(self, raw: DFLRaw) -> Decoded:
        """Boxes (B, A, 4) in xyxy pixels and class probabilities (B, A, C)."""
        return decode_raw(raw, self.dfl)

    def export_layout(self, raw: DFLRaw) -> Tensor:
        """(B, 4 + C, A): cxcywh in pixels, then class probabilities."""
        return channels_first_layout(self.decode(raw))

    def tell_limits(self, sizes: np.ndarray, per_image: np.ndarray) -> None:
        """Objects between the anchor points."""
        tell_thin_objects(sizes, self.strides)


class DFLDetect(DFLHead):
    """YOLO11's decoupled head: plain convolutions for distances, depthwise ones for classes; see `DFLHead`."""

    family = "yolo11"

    def __init__(self, num_classes: int, reg_max: int = 16, channels: Sequence[int] = ()) -> None:
        super().__init__(num_classes, channels, reg_max)
        box_width = max(16, channels[0] // 4, 4 * reg_max)
        class_width = max(channels[0], min(num_classes, 100))
        self.cv2 = nn.ModuleList(_box_tower(c, box_width, 4 * reg_max) for c in channels)
        self.cv3 = nn.ModuleList(_class_tower(c, class_width, num_classes) for c in channels)
        self.dfl = distance_reader(reg_max)


def _box_tower(in_channels: int, width: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        Conv(in_channels, width, 3), Conv(width, width, 3), nn.Conv2d(width, outputs, 1)
    )


def _class_tower(in_channels: int, width: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Sequential(DWConv(in_channels, in_channels, 3), Conv(in_channels, width)),
        nn.Sequential(DWConv(width, width, 3), Conv(width, width)),
        nn.Conv2d(width, outputs, 1),
    )
