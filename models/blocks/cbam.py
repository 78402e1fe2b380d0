"""Channel and spatial attention, one after the other (CBAM, arXiv 1807.06521, equations 1 to 3).

Letters: B batch, C channels, H height, W width. Every block maps (B, C, H, W) to the same.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.common import short_names
from models.registry import keeping_width, offer, unchanged


@offer(keeping_width)
@short_names
class ChannelAttention(nn.Module):
    """Weighs channels by one perceptron of the map's average and of its maximum (equation 2).

    Args:
        channels: C.
        reduction: C over the perceptron's inner width; the paper's is 16.
    """

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        hidden = max(channels // reduction, 1)
        self.fc = nn.Sequential(
            nn.Conv2d(channels, hidden, 1, bias=False), nn.ReLU(), nn.Conv2d(hidden, channels, 1, bias=False)
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        average, largest = x.mean((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
        return x * (self.fc(average) + self.fc(largest)).sigmoid()


@offer(unchanged)
@short_names
class SpatialAttention(nn.Module):
    """Weighs places by a convolution over the average and the maximum of all channels (equation 3)."""

    def __init__(self, kernel_size: int = 7) -> None:
        super().__init__()
        self.cv1 = nn.Conv2d(2, 1, kernel_size, padding=kernel_size // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        seen = torch.cat((x.mean(1, keepdim=True), x.amax(1, keepdim=True)), 1)
        return x * self.cv1(seen).sigmoid()


@offer(keeping_width)
@short_names
class CBAM(nn.Module):
    """Channel attention, then spatial attention (equation 1)."""

    def __init__(self, channels: int, kernel_size: int = 7, reduction: int = 16) -> None:
        super().__init__()
        self.channel_attention = ChannelAttention(channels, reduction)
        self.spatial_attention = SpatialAttention(kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.spatial_attention(self.channel_attention(x))
