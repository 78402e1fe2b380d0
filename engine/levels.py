"""What each level of a pyramid responds to, as a picture beside the annotated one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from data.images import Image
from models.yolo import DetectionModel
from utils.structures import Letterbox

BRIGHT = 99.5
"""Percentile of a level's responses that is shown brightest."""
SHARE = 0.6
"""Of the colours; the rest is the picture in grey."""


class Levels:
    """Keeps how strong the maps are that the head of a model reads, from one call of the model to the next.

    Args:
        model: as it is run.
    """

    def __init__(self, model: DetectionModel) -> None:
        self.head = model.head
        self.responses: Sequence[NDArray[np.float32]] = ()
        self.head.register_forward_pre_hook(self._keep)

    def _keep(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        maps: Sequence[Tensor] = arguments[0][self.head.main_inputs]
        self.responses = [values.detach().float().abs().mean(1).cpu().numpy() for values in maps]

    def pictures(self, place: int, image: Image, box: Letterbox) -> list[tuple[int, Image]]:
        """Stride and picture of every level, for an image of the batch that the model saw last.

        Shown is the mean size of a cell's values over its channels, from the level's weakest (dark) to its strongest.

        Args:
            place: of the image in the batch.
            image: as it was before it was fitted, RGB, (H, W, 3).
            box: how it was fitted.
        """
        grey = np.repeat(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[:, :, None], 3, axis=2)
        pictures = []
        for stride, responses in zip(self.head.strides, self.responses):
            response = responses[place]
            low, high = float(response.min()), float(np.percentile(response, BRIGHT))
            shares = np.clip((response - low) / max(high - low, 1e-9), 0, 1)
            whole = cv2.resize(shares, None, fx=stride, fy=stride, interpolation=cv2.INTER_CUBIC)
            bottom = box.top + round(box.height * box.scale_y)
            right = box.left + round(box.width * box.scale_x)
            own = cv2.resize(whole[box.top : bottom, box.left : right], (box.width, box.height))
            levels = np.rint(np.clip(own, 0, 1) * 255).astype(np.uint8)
            colours = cv2.cvtColor(
                cv2.applyColorMap(levels, cv2.COLORMAP_INFERNO), cv2.COLOR_BGR2RGB
            )
            mixed = cv2.addWeighted(colours, SHARE, grey, 1 - SHARE, 0)
            pictures.append((stride, np.asarray(mixed, dtype=np.uint8)))
        return pictures
