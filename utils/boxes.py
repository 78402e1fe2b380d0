"""Box arithmetic: formats, clipping, overlaps.

Letters: N and M numbers of boxes, `...` any leading shape; leading shapes broadcast.
Formats: `xyxy` corners, `cxcywh` centre and size. The unit is the caller's; nothing here
assumes pixels. Overlaps take xyxy and are computed in float32 or
wider, whatever the inputs are, so that they hold under mixed precision.
"""

from __future__ import annotations

import math
from functools import cached_property

import torch
from torch import Tensor

EPS = 1e-7
LEAST_HEIGHT = 1e-4  # of a box whose diagonal has an angle; its gradient, up to 4 / pi of 1 / this, fits half precision


def xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """Corners to centre and size, (..., 4) to (..., 4)."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return torch.cat(((low + high) / 2, high - low), dim=-1)


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """Centre and size to corners, (..., 4) to (..., 4)."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat((centre - half, centre + half), dim=-1)


def clip_boxes(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Clip xyxy boxes (..., 4) to an image of `size` (height, width)."""
    height, width = size
    limit = boxes.new_tensor([width, height, width, height])
    return torch.minimum(boxes.clamp(min=0), limit)


def box_area(boxes: Tensor) -> Tensor:
    """Area of xyxy boxes, (..., 4) to (...); a box turned inside out has area 0."""
    width, height = (boxes[..., 2:] - boxes[..., :2]).relu().unbind(-1)
    return width * height


def pairwise_iou(boxes1: Tensor, boxes2: Tensor, eps: float = EPS) -> Tensor:
    """Overlap of every box with every other, (..., N, 4) and (..., M, 4) to (..., N, M).

    Two boxes without area have overlap 0, never NaN.
    """
    return elementwise_iou(boxes1[..., :, None, :], boxes2[..., None, :, :], eps)


def elementwise_iou(boxes1: Tensor, boxes2: Tensor, eps: float = EPS) -> Tensor:
    """Overlap of boxes that stand at the same place, (..., 4) and (..., 4) to (...)."""
    return BoxPair(boxes1, boxes2, eps).iou


def generalized_iou(boxes1: Tensor, boxes2: Tensor, eps: float = EPS) -> Tensor:
    """GIoU in (-1, 1]: IoU less the empty share of the hull (Rezatofighi et al., CVPR 2019).

    Args:
        boxes1: xyxy, (..., 4).
        boxes2: xyxy, (..., 4), broadcast against `boxes1`.
        eps: floor of the two divisors.

    Returns:
        One value per pair, (...).
    """
    pair = BoxPair(boxes1, boxes2, eps)
    return pair.iou - pair.empty_share


def complete_iou(boxes1: Tensor, boxes2: Tensor, eps: float = EPS) -> Tensor:
    """CIoU: IoU less centre distance less difference of shape (Zheng et al., AAAI 2020, eq. 7-11).

    The trade-off factor alpha takes no gradient, as in the paper.

    Args:
        boxes1: xyxy, (..., 4).
        boxes2: xyxy, (..., 4), broadcast against `boxes1`.
        eps: keeps the divisors away from 0.

    Returns:
        One value per pair, (...).
    """
    pair = BoxPair(boxes1, boxes2, eps)
    return pair.iou - pair.centre_distance - pair.aspect_difference


class BoxPair:
    """Two boxes that are compared, and what measures ask of them, worked out when first asked for.

    Args:
        first: xyxy, (..., 4).
        second: xyxy, (..., 4), broadcast against `first`.
        eps: keeps divisors away from 0.
    """

    def __init__(self, first: Tensor, second: Tensor, eps: float = EPS) -> None:
        self.first, self.second, self.eps = widen(first), widen(second), eps

    @cached_property
    def intersection(self) -> Tensor:
        """Area that both cover, (...)."""
        low = torch.maximum(self.first[..., :2], self.second[..., :2])
        high = torch.minimum(self.first[..., 2:], self.second[..., 2:])
        width, height = (high - low).relu().unbind(-1)
        return width * height

    @cached_property
    def union(self) -> Tensor:
        """Area that either covers, (...)."""
        return box_area(self.first) + box_area(self.second) - self.intersection

    @cached_property
    def iou(self) -> Tensor:
        """Intersection over union in [0, 1], (...); 0 of boxes without area."""
        return self.intersection / self.union.clamp(min=self.eps)

    @cached_property
    def hull(self) -> Tensor:
        """Width and height of the smallest box around both, (..., 2); never negative.

        All four corners count, so that a box turned inside out still lies in its hull.
        """
        low = torch.minimum(self.first[..., :2], self.second[..., :2])
        high = torch.maximum(self.first[..., 2:], self.second[..., 2:])
        low = torch.minimum(low, torch.minimum(self.first[..., 2:], self.second[..., 2:]))
        return torch.maximum(high, torch.maximum(self.first[..., :2], self.second[..., :2])) - low

    @cached_property
    def empty_share(self) -> Tensor:
        """Part of the hull that neither covers, in [0, 1), (...): the penalty of GIoU."""
        width, height = self.hull.unbind(-1)
        area = width * height
        return (area - self.union) / area.clamp(min=self.eps)

    @cached_property
    def diagonal_squared(self) -> Tensor:
        """Of the hull, (...); never 0."""
        width, height = self.hull.unbind(-1)
        return width.square() + height.square() + self.eps

    @cached_property
    def offset(self) -> Tensor:
        """From the second centre to the first, (..., 2)."""
        ends = self.first[..., :2] + self.first[..., 2:] - self.second[..., :2]
        return (ends - self.second[..., 2:]) / 2

    @cached_property
    def centre_distance(self) -> Tensor:
        """Squared, in squared diagonals of the hull, in [0, 1), (...): the penalty of DIoU."""
        # First, since gradients are summed in the order of the steps.
        diagonal_squared = self.diagonal_squared
        return self.offset.square().sum(-1) / diagonal_squared

    @cached_property
    def aspect_difference(self) -> Tensor:
        """Of the angles of the two diagonals, weighted, (...): the second penalty of CIoU."""
        angles = _angle(self.first) - _angle(self.second)
        shape = (4 / math.pi**2) * angles.square()
        with torch.no_grad():
            alpha = shape / (1 - self.iou + shape + self.eps)
        return alpha * shape

    @cached_property
    def sizes(self) -> tuple[Tensor, Tensor]:
        """Width and height of the first and of the second, (..., 2) each."""
        first = self.first[..., 2:] - self.first[..., :2]
        return first, self.second[..., 2:] - self.second[..., :2]


def widen(x: Tensor) -> Tensor:
    """Half precision, which holds no area in pixels, to float32; wider types stay as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _angle(boxes: Tensor) -> Tensor:
    """Angle of the diagonal, atan(width / height)."""
    width, height = (boxes[..., 2:] - boxes[..., :2]).unbind(-1)
    return torch.atan(width / height.clamp(min=LEAST_HEIGHT))
