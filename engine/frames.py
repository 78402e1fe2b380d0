"""Frames on their way through the network: fitted, put together, and their boxes brought back.

`in_batches` prepares them, which a thread may do ahead; `detect` finds what is in a batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.images import Image
from data.transforms import letterbox
from data.videos import Frame
from engine.evaluation import VALIDATION, Measurable, detections_of
from engine.options import Thresholds
from utils.structures import Detections, Letterbox, as_float


class Fitted(NamedTuple):
    """A frame, the picture (h, w, 3) that the network sees of it or of a slice, and the way back.

    `corner` is the top and left of the slice in the frame.
    """

    frame: Frame
    image: Image
    box: Letterbox
    corner: tuple[int, int] = (0, 0)

    def restore(self, boxes: Tensor) -> Tensor:
        """Bring boxes (K, 4) of the picture to the frame."""
        top, left = self.corner
        return self.box.restore(boxes) + boxes.new_tensor([left, top, left, top])


def fit(frame: Frame, imgsz: tuple[int, int], stride: int | None = None) -> Fitted:
    """Fit a frame into (height, width) `imgsz`, padded to multiples of `stride` only where that is given."""
    return Fitted(frame, *letterbox(frame.image, imgsz, stride=stride))


def in_batches(frames: Iterable[Fitted], size: int) -> Iterator[list[Fitted]]:
    """Up to `size` frames together, in order, as long as their pictures are of one shape."""
    batch: list[Fitted] = []
    for fitted in frames:
        if batch and (len(batch) == size or fitted.image.shape != batch[0].image.shape):
            yield batch
            batch = []
        batch.append(fitted)
    if batch:
        yield batch


@torch.inference_mode()
def detect(
    model: Measurable,
    batch: Sequence[Fitted],
    thresholds: Thresholds = VALIDATION,
    classes: Sequence[int] | None = None,
) -> list[Detections]:
    """Detections of each frame on the CPU, boxes in its own pixels.

    Args:
        model: the network.
        batch: frames of one shape.
        thresholds: what counts as a detection.
        classes: only these, by index.
    """
    pictures = [fitted.image for fitted in batch]
    stacked = np.stack(pictures) if len(pictures) > 1 else pictures[0][None]
    # Seen as (B, 3, H, W) without a copy, in the memory format channels_last.
    output = model(as_float(torch.from_numpy(stacked).permute(0, 3, 1, 2), model.device))
    detections = detections_of(output, model.postprocess_kind, thresholds, classes=classes)
    on_cpu = [found.to("cpu") for found in detections]
    return [
        found._replace(boxes=fitted.restore(found.boxes))
        for found, fitted in zip(on_cpu, batch, strict=True)
    ]
