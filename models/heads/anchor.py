"""YOLOv5's head: three anchor boxes a cell, each with a box, an objectness and class scores.

Letters: B batch, K anchors a level, H, W size of a level, C classes, A = sum over levels of K * H * W.
The decoding is that of the published architecture: centres `(2 s - 0.5 + cell) * stride`, sizes `(2 s)^2 * anchor`, with s
the sigmoid of the prediction, so a box reaches up to half a cell beyond its own and up to four times its anchor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.head import Head
from models.registry import LayerError, Plan, Scaling, single
from utils.boxes import widen
from utils.structures import Decoded, Targets

OBJECTS_PER_IMAGE = 7.7  # of COCO (arXiv 1405.0312, section 5): what a cell's objectness starts from, spread over its level
CERTAIN = 17.0  # a logit whose probability is 1 in float32: a single class is not trained, its score is the objectness


class AnchorRaw(NamedTuple):
    """Raw predictions.

    Attributes:
        levels: per level (B, K, H, W, 5 + C): x, y, w, h, objectness, classes, before the sigmoid.
    """

    levels: tuple[Tensor, ...]


def anchor_rule(in_channels: Sequence[int], args: Sequence[object], scaling: Scaling) -> Plan:
    """`[nc, anchors]` becomes `(nc, anchors of each level, channels of each level)`; a number asks for that many, fitted later."""
    levels = [single([channels]) for channels in in_channels]
    num_classes, anchors = args[0], args[1]
    if isinstance(anchors, int):
        anchors = [_default_anchors(anchors, stride) for stride in scaling.strides]
    if not isinstance(anchors, list) or not all(
        isinstance(row, list) and len(row) % 2 == 0 for row in anchors
    ):
        raise LayerError(
            f"got anchors {anchors!r}, expected a number or one list of widths and heights a level"
        )
    if len(anchors) != len(levels):
        raise LayerError(
            f"got {len(levels)} inputs and {len(anchors)} rows of anchors, expected one row an input"
        )
    return Plan([num_classes, anchors, levels], levels)


def _default_anchors(count: int, stride: int) -> list[float]:
    """Squares between 2 and 8 strides: a start for the fit that `train.py` makes."""
    sizes = [stride * 2 ** (1 + 2 * (k + 0.5) / count) for k in range(count)]
    return [round(size, 1) for size in sizes for _ in range(2)]


class AnchorDetect(Head[AnchorRaw]):
    """Anchor head: a 1x1 convolution a level.

    Attributes:
        anchors: widths and heights in strides of their level, (levels, K, 2); 0 until `initialize`.
    """

    family = "yolov5"
    postprocess = "nms"
    layout = "anchors"
    class_outputs = ("m.*",)
    anchors: Tensor

    def __init__(
        self, num_classes: int, anchors: Sequence[Sequence[float]], channels: Sequence[int]
    ) -> None:
        super().__init__(num_classes, len(channels))
        self.anchor_pixels = anchors
        self.num_anchors = len(anchors[0]) // 2
        self.register_buffer("anchors", torch.zeros(len(anchors), self.num_anchors, 2))
        outputs = self.num_anchors * (5 + num_classes)
        self.m = nn.ModuleList(nn.Conv2d(width, outputs, 1) for width in channels)

    def initialize(self, strides: Sequence[int]) -> None:
        """Set the anchors, and the biases: objectness starts at its share of cells, all classes alike."""
        self.strides = tuple(strides)
        pixels = self.anchors.new_tensor(self.anchor_pixels).view_as(self.anchors)
        self.anchors.copy_(pixels / self.anchors.new_tensor(self.strides).view(-1, 1, 1))
        for convolution, stride in zip(self.m, self.strides, strict=True):
            bias: Tensor = convolution.bias.detach().view(self.num_anchors, -1)  # type: ignore[operator, union-attr]
            share = OBJECTS_PER_IMAGE * (stride / 640) ** 2
            bias[:, 4] += math.log(share / (1 - share)) if share < 1 else 0.0
            bias[:, 5:] += CERTAIN if self.num_classes == 1 else -math.log(self.num_classes - 1)

    def forward(self, features: Sequence[Tensor], targets: Targets | None = None) -> AnchorRaw:
        """Raw predictions for one feature map (B, C, H, W) a level."""
        return AnchorRaw(
            tuple(self._split(conv(x)) for conv, x in zip(self.m, features, strict=True))
        )

    def _split(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        return (
            x.view(batch, self.num_anchors, 5 + self.num_classes, height, width)
            .permute(0, 1, 3, 4, 2)
            .contiguous()
        )

    def decode(self, raw: AnchorRaw) -> Decoded:
        """Boxes (B, A, 4) in xyxy pixels, scores (B, A, C) = objectness times class."""
        flat = self._sigmoid_boxes(raw)
        centre, half = flat[..., :2], flat[..., 2:4] / 2
        return Decoded(
            torch.cat((centre - half, centre + half), -1), flat[..., 5:] * flat[..., 4:5]
        )

    def export_layout(self, raw: AnchorRaw) -> Tensor:
        """(B, A, 5 + C): cxcywh in pixels, objectness, class probabilities."""
        return self._sigmoid_boxes(raw)

    def _sigmoid_boxes(self, raw: AnchorRaw) -> Tensor:
        return torch.cat([self._decode_level(x, i) for i, x in enumerate(raw.levels)], 1)

    def _decode_level(self, x: Tensor, level: int) -> Tensor:
        batch, _, height, width, outputs = x.shape
        stride, anchors = self.strides[level], self.anchors[level]
        prediction = widen(x).sigmoid()
        rows = torch.arange(height, device=x.device, dtype=prediction.dtype)
        cols = torch.arange(width, device=x.device, dtype=prediction.dtype)
        grid = torch.stack(torch.meshgrid(cols, rows, indexing="xy"), -1)
        centre = (prediction[..., :2] * 2 - 0.5 + grid) * stride
        size = (prediction[..., 2:4] * 2) ** 2 * (anchors * stride)[:, None, None]
        return torch.cat((centre, size, prediction[..., 4:]), -1).view(batch, -1, outputs)
