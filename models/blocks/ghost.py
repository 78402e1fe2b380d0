"""Ghost blocks: half of every map is made from the other half by cheap operations (GhostNet, arXiv 1911.11907, figure 3).

Letters: B batch, C channels, H height, W width.
"""

from __future__ import annotations

from torch import Tensor, nn

from models.common import C3, Conv, DWConv, GhostConv, short_names
from models.registry import convolution, register, stacked


@register(convolution)
@short_names
class GhostBottleneck(nn.Module):
    """Two ghost convolutions, the second without activation; at stride 2 a depthwise convolution between them.

    The shortcut of a block that changes the shape is a depthwise and a pointwise convolution, as in figure 3.

    Args:
        in_channels: C of the input.
        out_channels: C of the output; the inner width is half of it.
        kernel_size: of the depthwise convolutions.
        stride: 1 or 2.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int = 3, stride: int = 1
    ) -> None:
        super().__init__()
        hidden = out_channels // 2
        self.cv1 = GhostConv(in_channels, hidden)
        self.dw: nn.Module = nn.Identity()
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1:
            self.dw = DWConv(hidden, hidden, kernel_size, stride, activation=False)
        if stride > 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                DWConv(in_channels, in_channels, kernel_size, stride, activation=False),
                Conv(in_channels, out_channels, activation=False),
            )
        self.cv2 = GhostConv(hidden, out_channels, activation=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.cv2(self.dw(self.cv1(x))) + self.shortcut(x)


@register(stacked)
class C3Ghost(C3):
    """`C3` over ghost bottlenecks."""

    def path(self, hidden: int, repeats: int, shortcut: bool, groups: int) -> nn.Module:
        return nn.Sequential(*(GhostBottleneck(hidden, hidden) for _ in range(repeats)))
