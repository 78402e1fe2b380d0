"""Cross-stage partial blocks beside C3 and C2f (CSPNet, arXiv 1911.11929), and what stands in their paths.

Letters: B batch, C channels, H height, W width. A block of n stages maps (B, C, H, W) to (B, C', H, W).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.common import C3, SPP, Bottleneck, Conv, batch_norm, short_names
from models.registry import convolution, offer, register, stacked


@register(convolution)
@short_names
class CrossConv(nn.Module):
    """A k x k convolution as a row and a column (arXiv 1512.00567, section 3.2), with a residual if asked.

    Args:
        in_channels: C of the input.
        out_channels: C of the output.
        kernel_size: length of the row and of the column.
        stride: along each of them.
        groups: of the second convolution.
        expansion: inner width as a share of `out_channels`.
        shortcut: add the input where its shape is the output's.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        groups: int = 1,
        expansion: float = 1.0,
        shortcut: bool = False,
    ) -> None:
        super().__init__()
        hidden = int(out_channels * expansion)
        self.cv1 = Conv(in_channels, hidden, (1, kernel_size), (1, stride))
        self.cv2 = Conv(hidden, out_channels, (kernel_size, 1), (stride, 1), groups=groups)
        self.add = shortcut and in_channels == out_channels and stride == 1

    def forward(self, x: Tensor) -> Tensor:
        y = self.cv2(self.cv1(x))
        return x + y if self.add else y


@register(stacked)
class C3x(C3):
    """`C3` over cross convolutions."""

    def path(self, hidden: int, repeats: int, shortcut: bool, groups: int) -> nn.Module:
        return nn.Sequential(
            *(CrossConv(hidden, hidden, 3, 1, groups, 1.0, shortcut) for _ in range(repeats))
        )


@register(convolution)
@short_names
class C3SPP(C3):
    """`C3` over spatial pyramid pooling (arXiv 1406.4729)."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_sizes: Sequence[int] = (5, 9, 13),
        repeats: int = 1,
        shortcut: bool = True,
        groups: int = 1,
        expansion: float = 0.5,
    ) -> None:
        super().__init__(in_channels, out_channels, 0, shortcut, groups, expansion)
        hidden = int(out_channels * expansion)
        self.m = nn.Sequential(*(SPP(hidden, hidden, kernel_sizes) for _ in range(repeats)))


@register(stacked)
@short_names
class BottleneckCSP(nn.Module):
    """CSPNet's own form (figure 3b): both paths meet before one norm and one activation, then a transition."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        repeats: int = 1,
        shortcut: bool = True,
        groups: int = 1,
        expansion: float = 0.5,
    ) -> None:
        super().__init__()
        hidden = int(out_channels * expansion)
        self.cv1 = Conv(in_channels, hidden)
        self.cv2 = nn.Conv2d(in_channels, hidden, 1, bias=False)
        self.cv3 = nn.Conv2d(hidden, hidden, 1, bias=False)
        self.cv4 = Conv(2 * hidden, out_channels)
        self.bn = batch_norm(2 * hidden)
        self.act = nn.SiLU()
        self.m = nn.Sequential(
            *(Bottleneck(hidden, hidden, shortcut, groups, expansion=1.0) for _ in range(repeats))
        )

    def forward(self, x: Tensor) -> Tensor:
        joined = torch.cat((self.cv3(self.m(self.cv1(x))), self.cv2(x)), 1)
        return self.cv4(self.act(self.bn(joined)))


@offer(stacked)
@short_names
class C1(nn.Module):
    """One pointwise convolution and a residual over a chain of 3x3 ones."""

    def __init__(self, in_channels: int, out_channels: int, repeats: int = 1) -> None:
        super().__init__()
        self.cv1 = Conv(in_channels, out_channels)
        self.m = nn.Sequential(*(Conv(out_channels, out_channels, 3) for _ in range(repeats)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.cv1(x)
        return self.m(x) + x


@offer(stacked)
@short_names
class C2(nn.Module):
    """Splits its input, runs one half through bottlenecks, joins the halves: C2f without its early outputs."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        repeats: int = 1,
        shortcut: bool = True,
        groups: int = 1,
        expansion: float = 0.5,
    ) -> None:
        super().__init__()
        self.c = hidden = int(out_channels * expansion)
        self.cv1 = Conv(in_channels, 2 * hidden)
        self.cv2 = Conv(2 * hidden, out_channels)
        self.m = nn.Sequential(
            *(Bottleneck(hidden, hidden, shortcut, groups, (3, 3), 1.0) for _ in range(repeats))
        )

    def forward(self, x: Tensor) -> Tensor:
        worked, kept = self.cv1(x).chunk(2, 1)
        return self.cv2(torch.cat((self.m(worked), kept), 1))
