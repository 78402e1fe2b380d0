"""How exported detectors lay out their output, and the way back to boxes and scores.

Letters: B batch, A anchor points (or queries), C classes, K detections an image.

    anchors   (B, A, 5 + C)  cxcywh in pixels, objectness, class probabilities   (YOLOv5 runners)
    channels  (B, 4 + C, A)  cxcywh in pixels, class probabilities               (YOLOv8 runners)
    queries   (B, A, 4 + C)  cxcywh as fractions of the image, class probabilities
    end2end   (B, K, 6)      xyxy in pixels, score, class; rows of zeros after the last detection
    raw       what the head's convolutions give, one tensor or several; for tools that decode
    themselves
"""

from __future__ import annotations

import torch
from torch import Tensor

from utils.boxes import cxcywh_to_xyxy
from utils.structures import Decoded, Detections

LAYOUTS = ("anchors", "channels", "queries", "end2end", "raw", "weights")
"""All of them; "weights" is a file without a graph."""
ANCHOR_AXES = {"anchors": 1, "channels": 2}
"""Where the number of anchor points stands, which changes with the image size."""


def read_layout(output: Tensor, layout: str, imgsz: tuple[int, int]) -> Decoded:
    """Boxes in xyxy pixels of an image of `imgsz` (height, width), and scores.

    Raises:
        ValueError: the layout is "end2end", "raw" or unknown.
    """
    output = output.float()
    if layout == "anchors":
        return Decoded(cxcywh_to_xyxy(output[..., :4]), output[..., 5:] * output[..., 4:5])
    if layout == "channels":
        output = output.transpose(1, 2)
        return Decoded(cxcywh_to_xyxy(output[..., :4]), output[..., 4:])
    if layout == "queries":
        height, width = imgsz
        size = output.new_tensor([width, height, width, height])
        return Decoded(cxcywh_to_xyxy(output[..., :4]) * size, output[..., 4:])
    raise ValueError(f"layout {layout!r} has no boxes and scores of every anchor point")


def read_detections(output: Tensor) -> list[Detections]:
    """Detections of each image from (B, K, 6), without the rows of zeros."""
    found = []
    for rows in output.float():
        rows = rows[rows[:, 4] > 0]
        found.append(Detections(rows[:, :4], rows[:, 4], rows[:, 5].round().to(torch.int64)))
    return found
