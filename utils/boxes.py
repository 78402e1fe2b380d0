"""Box arithmetic: formats, clipping, overlaps.

Letters: N and M numbers of boxes, `...` any leading shape; leading shapes broadcast.
Formats: `xyxy` corners, `cxcywh` centre and size, `xywh` top left corner and size (COCO). The unit
is the caller's; nothing here assumes pixels. Overlaps take xyxy and are computed in float32 or
wider, whatever the inputs are, so that they hold under mixed precision.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

EPS = 1e-7


def xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """Corners to centre and size, (..., 4) to (..., 4)."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return torch.cat(((low + high) / 2, high - low), dim=-1)


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """Centre and size to corners, (..., 4) to (..., 4)."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat((centre - half, centre + half), dim=-1)


def xyxy_to_xywh(boxes: Tensor) -> Tensor:
    """Corners to top left corner and size, (..., 4) to (..., 4)."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return torch.cat((low, high - low), dim=-1)


def xywh_to_xyxy(boxes: Tensor) -> Tensor:
    """Top left corner and size to corners, (..., 4) to (..., 4)."""
    low, size = boxes[..., :2], boxes[..., 2:]
    return torch.cat((low, low + size), dim=-1)


def xywh_to_cxcywh(boxes: Tensor) -> Tensor:
    """Top left corner and size to centre and size, (..., 4) to (..., 4)."""
    low, size = boxes[..., :2], boxes[..., 2:]
    return torch.cat((low + size / 2, size), dim=-1)


def cxcywh_to_xywh(boxes: Tensor) -> Tensor:
    """Centre and size to top left corner and size, (..., 4) to (..., 4)."""
    centre, size = boxes[..., :2], boxes[..., 2:]
    return torch.cat((centre - size / 2, size), dim=-1)


def scale_boxes(boxes: Tensor, scale_y: float, scale_x: float) -> Tensor:
    """Multiply y by `scale_y` and x by `scale_x`; any of the three formats, (..., 4)."""
    return boxes * boxes.new_tensor([scale_x, scale_y, scale_x, scale_y])


def clip_boxes(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Clip xyxy boxes (..., 4) to an image of `size` (height, width)."""
    height, width = size
    limit = boxes.new_tensor([width, height, width, height])
    return torch.minimum(boxes.clamp(min=0), limit)


def box_area(boxes: Tensor) -> Tensor:
    """Area of xyxy boxes, (..., 4) to (...); a box turned inside out has area 0."""
    width, height = (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).unbind(-1)
    return width * height


def pairwise_iou(boxes1: Tensor, boxes2: Tensor, eps: float = EPS) -> Tensor:
    """Overlap of every box with every other, (..., N, 4) and (..., M, 4) to (..., N, M).

    Two boxes without area have overlap 0, never NaN.
    """
    return elementwise_iou(boxes1[..., :, None, :], boxes2[..., None, :, :], eps)


def elementwise_iou(boxes1: Tensor, boxes2: Tensor, eps: float = EPS) -> Tensor:
    """Overlap of boxes that stand at the same place, (..., 4) and (..., 4) to (...)."""
    return _overlap(_wide(boxes1), _wide(boxes2), eps).iou


def generalized_iou(boxes1: Tensor, boxes2: Tensor, eps: float = EPS) -> Tensor:
    """GIoU in (-1, 1]: IoU less the empty share of the hull (Rezatofighi et al., CVPR 2019).

    Args:
        boxes1: xyxy, (..., 4).
        boxes2: xyxy, (..., 4), broadcast against `boxes1`.
        eps: floor of the two divisors.

    Returns:
        One value per pair, (...).
    """
    boxes1, boxes2 = _wide(boxes1), _wide(boxes2)
    overlap = _overlap(boxes1, boxes2, eps)
    width, height = _hull(boxes1, boxes2)
    hull = width * height
    return overlap.iou - (hull - overlap.union) / hull.clamp(min=eps)


def complete_iou(boxes1: Tensor, boxes2: Tensor, eps: float = EPS) -> Tensor:
    """CIoU: IoU less centre distance less difference of shape (Zheng et al., AAAI 2020, eq. 7-11).

    The trade-off factor alpha takes no gradient, as in the paper.

    Args:
        boxes1: xyxy, (..., 4).
        boxes2: xyxy, (..., 4), broadcast against `boxes1`.
        eps: keeps the divisors and the heights away from 0.

    Returns:
        One value per pair, (...).
    """
    boxes1, boxes2 = _wide(boxes1), _wide(boxes2)
    iou = _overlap(boxes1, boxes2, eps).iou
    width, height = _hull(boxes1, boxes2)
    diagonal_squared = width.square() + height.square() + eps
    apart = (boxes1[..., :2] + boxes1[..., 2:] - boxes2[..., :2] - boxes2[..., 2:]) / 2
    distance_squared = apart.square().sum(-1)
    shape = (4 / math.pi**2) * (_angle(boxes1, eps) - _angle(boxes2, eps)).square()
    with torch.no_grad():
        alpha = shape / (1 - iou + shape + eps)
    return iou - distance_squared / diagonal_squared - alpha * shape


class _Overlap(NamedTuple):
    iou: Tensor
    union: Tensor


def _wide(boxes: Tensor) -> Tensor:
    """Half precision cannot hold areas in pixels; wider types stay as they are."""
    return boxes.float() if boxes.dtype in (torch.float16, torch.bfloat16) else boxes


def _overlap(boxes1: Tensor, boxes2: Tensor, eps: float) -> _Overlap:
    low = torch.maximum(boxes1[..., :2], boxes2[..., :2])
    high = torch.minimum(boxes1[..., 2:], boxes2[..., 2:])
    width, height = (high - low).clamp(min=0).unbind(-1)
    intersection = width * height
    union = box_area(boxes1) + box_area(boxes2) - intersection
    return _Overlap(intersection / union.clamp(min=eps), union)


def _hull(boxes1: Tensor, boxes2: Tensor) -> tuple[Tensor, Tensor]:
    """Width and height of the smallest box around both."""
    low = torch.minimum(boxes1[..., :2], boxes2[..., :2])
    high = torch.maximum(boxes1[..., 2:], boxes2[..., 2:])
    width, height = (high - low).unbind(-1)
    return width, height


def _angle(boxes: Tensor, eps: float) -> Tensor:
    """Angle of the diagonal, atan(width / height)."""
    width, height = (boxes[..., 2:] - boxes[..., :2]).unbind(-1)
    return torch.atan(width / height.clamp(min=eps))
