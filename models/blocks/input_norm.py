"""The normalisation that pretrained weights expect of an image, as a layer of the model.

Every model and every exported file takes images in [0, 1]; weights of timm were trained on `(x - mean) / std`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from models.fusing.folding import Affine
from models.timm.features import statistics_of


class InputNorm(nn.Module):
    """`(x - mean) / std` for each channel of an image (B, C, H, W); does nothing until it is told numbers.

    The numbers are buffers that travel with the weights, once there are any: a model that does not normalise has no keys for
    it, and weights without them were trained on images as they are.

    Args:
        channels: C.

    Attributes:
        mean: (C,), 0 at first.
        std: (C,), 1 at first.
        is_active: whether it does anything.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("std", torch.ones(channels))
        self.is_active = False

    @torch.no_grad()
    def set(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Take these numbers; their averages where the image has another number of channels."""
        for buffer, values in ((self.mean, mean), (self.std, std)):
            numbers = torch.tensor(values, dtype=torch.float64, device="cpu")
            numbers = numbers if len(numbers) == len(buffer) else numbers.mean()
            buffer.copy_(numbers.expand(buffer.shape))
        self.is_active = True
        self.refresh()

    def set_as_timm(self, name: str) -> str:
        """Take the numbers of timm's weights of `name`; what becomes of the images, in words."""
        statistics = statistics_of(name)
        if statistics is not None:
            self.set(*statistics)
        if statistics is None or not self.is_active:
            return "images are taken as they are, from 0 to 1"
        mean, std = (", ".join(f"{n:g}" for n in numbers) for numbers in statistics)
        return (
            f"images are normalised inside by timm's mean ({mean}) and std ({std}); normalize: false in the backbone's row "
            "leaves it out"
        )

    def refresh(self) -> None:
        """See what the numbers are after somebody has written them."""
        if not self.mean.is_meta:
            self.is_active = bool(self.mean.any()) or bool((self.std != 1).any())

    def forward(self, x: Tensor) -> Tensor:
        if not self.is_active:
            return x
        mean, std = (t.to(x.dtype).view(-1, 1, 1) for t in (self.mean, self.std))
        return (x - mean) / std

    def affine(self) -> Affine | None:
        """What it does as a scale and shift per channel; None for nothing."""
        if not self.is_active:
            return None
        scale = 1 / self.std.detach().double()
        return Affine(scale, -self.mean.detach().double() * scale, 1, None)

    def without_scale(self) -> nn.Module:
        """What is left of it where the layer behind has taken the scale."""
        return Subtract(self.mean)

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        if self.is_active:
            super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        own = {"mean": torch.zeros_like(self.mean), "std": torch.ones_like(self.std)}
        given = {**{prefix + key: value for key, value in own.items()}, **state_dict}
        super()._load_from_state_dict(given, prefix, *args, **kwargs)
        self.refresh()


class Subtract(nn.Module):
    """`x - mean` for each channel of an image (B, C, H, W)."""

    mean: Tensor

    def __init__(self, mean: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return x - self.mean.to(x.dtype).view(-1, 1, 1)
