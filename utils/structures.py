"""The data that passes between rooms: a batch with its targets, decoded predictions, detections.

Letters: B batch, N objects of the whole batch, A anchor points (or queries), C classes,
K detections.
Boxes are absolute xyxy pixels everywhere; sizes are (height, width).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Targets(NamedTuple):
    """Ground truth of a batch, flat over its images; N = 0 is an ordinary value.

    Attributes:
        image_index: which image of the batch each object belongs to, (N,), int64, not decreasing.
        labels: class indices from 0, (N,), int64.
        boxes: xyxy in pixels of the batch's images, (N, 4), float32.
    """

    image_index: Tensor
    labels: Tensor
    boxes: Tensor

    @classmethod
    def empty(cls, device: torch.device | str = "cpu") -> Targets:
        """Targets of a batch without objects."""
        index = torch.zeros(0, dtype=torch.int64, device=device)
        return cls(index, index.clone(), torch.zeros(0, 4, device=device))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Targets:
        """Copy to `device`."""
        return Targets(*(t.to(device, non_blocking=non_blocking) for t in self))

    def of_image(self, index: int) -> tuple[Tensor, Tensor]:
        """Labels (n,) and boxes (n, 4) of one image."""
        chosen = self.image_index == index
        return self.labels[chosen], self.boxes[chosen]


class Letterbox(NamedTuple):
    """How an image was resized and padded: `network = original * scale + (left, top)`.

    Attributes:
        height: original height in pixels.
        width: original width in pixels.
        scale_y: resized height / original height.
        scale_x: resized width / original width.
        top: rows of padding above.
        left: columns of padding to the left.
    """

    height: int
    width: int
    scale_y: float
    scale_x: float
    top: int
    left: int

    def restore(self, boxes: Tensor) -> Tensor:
        """Bring boxes (K, 4) from network pixels back to the original image, clipped to it."""
        offset = boxes.new_tensor([self.left, self.top, self.left, self.top])
        scale = boxes.new_tensor([self.scale_x, self.scale_y, self.scale_x, self.scale_y])
        limit = boxes.new_tensor([self.width, self.height, self.width, self.height])
        return torch.minimum(((boxes - offset) / scale).clamp(min=0), limit)


class Batch(NamedTuple):
    """What the loader yields.

    Attributes:
        images: RGB, (B, 3, H, W), uint8; the only conversion to float is `as_float` on the device.
        targets: ground truth in pixels of `images`.
        image_ids: ids under which the evaluator knows the images, B of them.
        letterboxes: the way back to the original pixels, B of them.
        paths: files the images came from, B of them.
    """

    images: Tensor
    targets: Targets
    image_ids: tuple[int, ...]
    letterboxes: tuple[Letterbox, ...]
    paths: tuple[str, ...]


class Decoded(NamedTuple):
    """Predictions of a head before postprocessing.

    Attributes:
        boxes: xyxy pixels, (B, A, 4).
        scores: class probabilities (objectness multiplied in where the family has one), (B, A, C).
    """

    boxes: Tensor
    scores: Tensor


class Detections(NamedTuple):
    """Final detections of one image, best score first.

    Attributes:
        boxes: xyxy pixels, (K, 4).
        scores: in [0, 1], (K,).
        labels: class indices, (K,), int64.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor

    def to(self, device: torch.device | str) -> Detections:
        """Copy to `device`."""
        return Detections(*(t.to(device) for t in self))


def as_float(
    images: Tensor, device: torch.device | str, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Move uint8 images to `device` and scale them to [0, 1]: the pipeline's one conversion."""
    return images.to(device, non_blocking=True).to(dtype).div_(255)


def as_one_class(output: Decoded | list[Detections]) -> Decoded | list[Detections]:
    """The same predictions of one class: each box counts with the best of its scores."""
    if isinstance(output, Decoded):
        return output._replace(scores=output.scores.amax(-1, keepdim=True))
    return [found._replace(labels=torch.zeros_like(found.labels)) for found in output]
