"""Blocks of YOLOv10 (arXiv 2405.14458, section 3.2 and figure 3): cheap downsampling, inverted blocks, partial attention.

Written from the paper's text and figures. Attribute names are those of the published state dicts.

Letters: B batch, C channels, H height, W width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.blocks.csp import HEAD_CHANNELS, Attention, C2f, PSABlock
from models.blocks.rep import fold_branches
from models.common import Conv, short_names
from models.registry import convolution, keeping_width, offer, register, stacked


@register(convolution)
@short_names
class SCDown(nn.Module):
    """Downsampling with space and channels apart: a pointwise convolution, then a depthwise one with the stride."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int = 3, stride: int = 2
    ) -> None:
        super().__init__()
        self.cv1 = Conv(in_channels, out_channels)
        self.cv2 = Conv(
            out_channels, out_channels, kernel_size, stride, groups=out_channels, activation=False
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.cv2(self.cv1(x))


@register(keeping_width)
@short_names
class RepVGGDW(nn.Module):
    """A 7x7 and a 3x3 depthwise convolution in parallel; one 7x7 after `reparameterize()`.

    The paper trains its large kernels with the small one beside them.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv: Conv | nn.Conv2d = Conv(channels, channels, 7, groups=channels, activation=False)
        self.conv1: Conv | None = Conv(channels, channels, 3, groups=channels, activation=False)
        self.act, self.has_default_activation = nn.SiLU(), True

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.act(y if self.conv1 is None else y + self.conv1(x))

    def reparameterize(self) -> None:
        """Fold both branches into one convolution with bias, in place."""
        if self.conv1 is None:
            return
        assert isinstance(self.conv, Conv)
        self.conv = fold_branches((self.conv, self.conv1))
        self.conv1 = None


@offer(convolution)
@short_names
class CIB(nn.Module):
    """Compact inverted block (figure 3b): depthwise convolutions mix space, pointwise ones between them channels.

    Args:
        in_channels: C of the input.
        out_channels: C of the output.
        shortcut: add the input where the widths agree.
        expansion: half of the inner width as a share of `out_channels`.
        lk: the middle convolution has the large kernel.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        shortcut: bool = True,
        expansion: float = 0.5,
        lk: bool = False,
    ) -> None:
        super().__init__()
        wide = 2 * int(out_channels * expansion)
        self.cv1 = nn.Sequential(
            Conv(in_channels, in_channels, 3, groups=in_channels),
            Conv(in_channels, wide),
            RepVGGDW(wide) if lk else Conv(wide, wide, 3, groups=wide),
            Conv(wide, out_channels),
            Conv(out_channels, out_channels, 3, groups=out_channels),
        )
        self.add = shortcut and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        return x + self.cv1(x) if self.add else self.cv1(x)


@register(stacked)
@short_names
class C2fCIB(C2f):
    """`C2f` over compact inverted blocks."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        repeats: int = 1,
        shortcut: bool = False,
        lk: bool = False,
        groups: int = 1,
        expansion: float = 0.5,
    ) -> None:
        super().__init__(in_channels, out_channels, repeats, shortcut, groups, expansion)
        self.m = nn.ModuleList(CIB(self.c, self.c, shortcut, 1.0, lk) for _ in range(repeats))


def _heads(channels: int) -> int:
    return max(channels // HEAD_CHANNELS, 1)


@offer(convolution)
@short_names
class PSA(nn.Module):
    """Partial self-attention (figure 3c): one half of the channels through attention and a perceptron."""

    def __init__(self, in_channels: int, out_channels: int, expansion: float = 0.5) -> None:
        super().__init__()
        self.c = hidden = int(in_channels * expansion)
        self.cv1 = Conv(in_channels, 2 * hidden)
        self.cv2 = Conv(2 * hidden, out_channels)
        self.attn = Attention(hidden, _heads(hidden))
        self.ffn = nn.Sequential(
            Conv(hidden, 2 * hidden), Conv(2 * hidden, hidden, activation=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        kept, attended = self.cv1(x).chunk(2, 1)
        attended = attended + self.attn(attended)
        attended = attended + self.ffn(attended)
        return self.cv2(torch.cat((kept, attended), 1))


@register(stacked)
@short_names
class C2fPSA(C2f):
    """`C2f` over blocks of attention and perceptron."""

    def __init__(
        self, in_channels: int, out_channels: int, repeats: int = 1, expansion: float = 0.5
    ) -> None:
        super().__init__(in_channels, out_channels, repeats, expansion=expansion)
        self.m = nn.ModuleList(PSABlock(self.c, num_heads=_heads(self.c)) for _ in range(repeats))
