"""Blocks of RT-DETR's convolutional parts: HGNetv2's stem and block, and the neck's fusion block.

HGNetv2 was published with PP-HGNet (PaddleClas, Apache-2.0) and taken over by RT-DETR
(arXiv 2304.08069); the fusion block is RT-DETR's CSPRepLayer, made of RepVGG convolutions
(arXiv 2101.03697).

Letters: B batch, C channels, H height, W width.
Attribute names are those of the published state dicts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.blocks.rep import fold_branches
from models.common import Conv, DWConv, batch_norm, short_names
from models.registry import LayerError, Plan, Scaling, convolution, register, single, stacked


def _stem_rule(in_channels: Sequence[Any], args: Sequence[Any], scaling: Scaling) -> Plan:
    """`[mid, out]` becomes `(in, mid, out)`, unscaled: HGNetv2 brings its own widths."""
    if len(args) < 2:
        raise LayerError(f"got {list(args)}, expected [middle channels, output channels]")
    return Plan([single(in_channels), *args], args[1])


def _block_rule(in_channels: Sequence[Any], args: Sequence[Any], scaling: Scaling) -> Plan:
    """`[mid, out, kernel, ...]` becomes `(in, mid, out, kernel, repeats, ...)`, widths unscaled."""
    if len(args) < 3:
        raise LayerError(
            f"got {list(args)}, expected [middle channels, output channels, kernel size]"
        )
    ready = [single(in_channels), *args[:3], scaling.repeats, *args[3:]]
    return Plan(ready, args[1], repeats_inside=True)


@register(_stem_rule)
@short_names
class HGStem(nn.Module):
    """HGNetv2's stem: two strided convolutions, between them a max pool beside two 2x2 convolutions.

    These are padded at the bottom and the right only, so their 2x2 windows keep the size.

    Input (B, C, H, W), output (B, out, H / 4, W / 4).
    """

    def __init__(self, in_channels: int, mid_channels: int, out_channels: int) -> None:
        super().__init__()
        half = mid_channels // 2
        self.stem1 = Conv(in_channels, mid_channels, 3, 2, activation=nn.ReLU())
        self.stem2a = Conv(mid_channels, half, 2, 1, 0, activation=nn.ReLU())
        self.stem2b = Conv(half, mid_channels, 2, 1, 0, activation=nn.ReLU())
        self.stem3 = Conv(mid_channels * 2, mid_channels, 3, 2, activation=nn.ReLU())
        self.stem4 = Conv(mid_channels, out_channels, 1, 1, activation=nn.ReLU())
        self.pool = nn.MaxPool2d(kernel_size=2, stride=1)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.pad(self.stem1(x), (0, 1, 0, 1))
        convolved = self.stem2b(functional.pad(self.stem2a(x), (0, 1, 0, 1)))
        return self.stem4(self.stem3(torch.cat((self.pool(x), convolved), 1)))


@register(convolution)
@short_names
class LightConv(nn.Module):
    """Pointwise convolution without activation, then a depthwise one with ReLU."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 3) -> None:
        super().__init__()
        self.conv1 = Conv(in_channels, out_channels, 1, activation=False)
        self.conv2 = DWConv(out_channels, out_channels, kernel_size, activation=nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.conv1(x))


@register(_block_rule)
@short_names
class HGBlock(nn.Module):
    """HGNetv2's block: a chain of convolutions, all its maps squeezed and expanded.

    Args:
        in_channels: channels of the input.
        mid_channels: channels of each convolution of the chain.
        out_channels: channels of the output.
        kernel_size: of the chain's convolutions.
        repeats: length of the chain.
        light: the chain is made of `LightConv`, not of plain convolutions.
        shortcut: add the input where its channels equal the output's.
    """

    def __init__(
        self,
        in_channels: int,
        mid_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        repeats: int = 6,
        light: bool = False,
        shortcut: bool = False,
    ) -> None:
        super().__init__()
        widths = [in_channels, *[mid_channels] * (repeats - 1)]
        self.m = nn.ModuleList(
            LightConv(width, mid_channels, kernel_size)
            if light
            else Conv(width, mid_channels, kernel_size, activation=nn.ReLU())
            for width in widths
        )
        kept = in_channels + repeats * mid_channels
        self.sc = Conv(kept, out_channels // 2, 1, activation=nn.ReLU())
        self.ec = Conv(out_channels // 2, out_channels, 1, activation=nn.ReLU())
        self.has_residual = shortcut and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        maps = [x]
        for layer in self.m:
            maps.append(layer(maps[-1]))
        y = self.ec(self.sc(torch.cat(maps, 1)))
        return x + y if self.has_residual else y


@register(convolution)
@short_names
class RepConv(nn.Module):
    """A 3x3 and a 1x1 convolution in parallel, foldable into one 3x3 (arXiv 2101.03697).

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: of the larger convolution, odd.
        stride: of both.
        padding: of the larger convolution; None keeps the size at stride 1.
        groups: of both.
        dilation: of the larger convolution.
        activation: behind the sum, as in `Conv`.
        bn: a third path, BatchNorm alone, where the input has the output's shape.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        padding: int | None = None,
        groups: int = 1,
        dilation: int = 1,
        activation: bool | nn.Module = True,
        bn: bool = False,
    ) -> None:
        super().__init__()
        if kernel_size % 2 == 0:
            raise LayerError(f"got kernel size {kernel_size}, expected an odd one")
        self.conv1: Conv | None = Conv(
            in_channels, out_channels, kernel_size, stride, padding, groups, dilation, activation
        )
        self.act, self.has_default_activation = self.conv1.act, activation is True
        self.conv1.act, self.conv1.has_default_activation = nn.Identity(), False
        self.conv2: Conv | None = Conv(
            in_channels, out_channels, 1, stride, groups=groups, activation=False
        )
        has_identity = bn and in_channels == out_channels and stride == 1
        self.bn = batch_norm(in_channels) if has_identity else None
        self.conv: nn.Conv2d | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.conv is not None:
            return self.act(self.conv(x))
        assert self.conv1 is not None and self.conv2 is not None
        total = self.conv1(x) + self.conv2(x)
        return self.act(total if self.bn is None else total + self.bn(x))

    def reparameterize(self) -> None:
        """Replace the branches by the one convolution that equals them in eval mode."""
        if self.conv1 is None or self.conv2 is None:
            return
        self.conv = fold_branches((self.conv1, self.conv2), self.bn)
        self.conv1 = self.conv2 = self.bn = None


@register(stacked)
@short_names
class RepC3(nn.Module):
    """RT-DETR's fusion block: one path through `RepConv`s, one past them, added.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        repeats: number of `RepConv`s.
        expansion: inner channels as a share of the output's.
    """

    def __init__(
        self, in_channels: int, out_channels: int, repeats: int = 3, expansion: float = 1.0
    ) -> None:
        super().__init__()
        hidden = int(out_channels * expansion)
        self.cv1 = Conv(in_channels, hidden, 1)
        self.cv2 = Conv(in_channels, hidden, 1)
        self.m = nn.Sequential(*(RepConv(hidden, hidden) for _ in range(repeats)))
        self.cv3 = nn.Identity() if hidden == out_channels else Conv(hidden, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.cv3(self.m(self.cv1(x)) + self.cv2(x))
