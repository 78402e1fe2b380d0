"""The normalisation that pretrained weights expect of an image, as a layer of the model.

Every model and every exported file takes images in [0, 1]; weights of timm were trained on `(x - mean) / std`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from models.fusing.folding import Affine


class InputNorm(nn.Module):
    """`(x - mean) / std` for each channel of an image (B, C, H, W); does nothing until it is told numbers.

    The numbers are buffers: they travel with the weights. Weights without them were trained on images as they are.

    Args:
        channels: C.

    Attributes:
        mean: (C,), 0 at first.
        std: (C,), 1 at first.
    """

    is_optional = True
    """Weights may lack its tensors."""
    mean: Tensor
    std: Tensor

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("std", torch.ones(channels))

    @torch.no_grad()
    def set(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Take these numbers; their averages where the image has another number of channels."""
        for buffer, values in ((self.mean, mean), (self.std, std)):
            numbers = torch.tensor(values, dtype=torch.float64)
            buffer.copy_(
                numbers if len(numbers) == len(buffer) else numbers.mean().expand_as(buffer)
            )

    @property
    def is_identity(self) -> bool:
        """Whether it does nothing."""
        return not bool(self.mean.any()) and bool((self.std == 1).all())

    def forward(self, x: Tensor) -> Tensor:
        mean, std = (t.to(x.dtype).view(-1, 1, 1) for t in (self.mean, self.std))
        return (x - mean) / std

    def affine(self) -> Affine:
        """What it does as a scale and shift per channel."""
        scale = 1 / self.std.detach().double()
        return Affine(scale, -self.mean.detach().double() * scale, 1, None)

    def without_scale(self) -> nn.Module:
        """What is left of it where the layer behind has taken the scale."""
        return Subtract(self.mean)

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        own = {
            f"{prefix}mean": torch.zeros_like(self.mean),
            f"{prefix}std": torch.ones_like(self.std),
        }
        super()._load_from_state_dict({**own, **state_dict}, prefix, *args, **kwargs)


class Subtract(nn.Module):
    """`x - mean` for each channel of an image (B, C, H, W)."""

    mean: Tensor

    def __init__(self, mean: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return x - self.mean.to(x.dtype).view(-1, 1, 1)
