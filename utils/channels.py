"""Images of the channels and of the depth that a network takes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from utils.errors import ConfigError

LUMA = (0.299, 0.587, 0.114)  # of red, green and blue, ITU-R BT.601


def as_channels(images: Tensor, channels: int) -> Tensor:
    """Colour images (B, 3, H, W) for a network of `channels`: as they are, or grey (B, 1, H, W).

    Raises:
        ConfigError: neither fits.
    """
    given = images.shape[1]
    if given == channels:
        return images
    if (given, channels) != (3, 1):
        raise ConfigError(
            f"images: got {given} channels, expected the model's {channels}. Files are read as 3 channels, which a model "
            "with ch: 3 or ch: 1 takes; give others to the model as tensors."
        )
    weights = images.new_tensor(LUMA).view(1, 3, 1, 1)
    return (images * weights).sum(1, keepdim=True)


def white_of(config: Mapping[str, Any]) -> float | None:
    """The value that is white in images deeper than 8 bits, as a model's mapping or a data YAML says.

    Raises:
        ConfigError: what stands there is no such number.
    """
    white = config.get("white")
    if white is None:
        return None
    is_number = isinstance(white, (int, float)) and not isinstance(white, bool)
    if not is_number or not 0 < white < math.inf:
        raise ConfigError(
            f"white: got {str(white)[:40]!r}, expected the value of white such as 4095 for 12 bits."
        )
    return float(white)
