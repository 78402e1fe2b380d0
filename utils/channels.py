"""Images of the channels that a network takes."""

from __future__ import annotations

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
