"""HGNetv2's stem and block, published with PP-HGNet (PaddleClas, Apache-2.0) and taken over by RT-DETR (arXiv 2304.08069).

Letters: B batch, C channels, H height, W width.
Attribute names are those of the published state dicts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.common import Conv, DWConv, short_names
from models.registry import LayerError, Plan, Scaling, convolution, register, single


def _stem_rule(in_channels: Sequence[Any], args: Sequence[Any], scaling: Scaling) -> Plan:
    """`[mid, out, ...]` becomes `(in, mid, out, ...)`, unscaled: HGNetv2 brings its own widths."""
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


class AffineReLU(nn.Module):
    """ReLU, then a learnt scale and shift, each one number (PaddleClas, with PP-HGNetv2's small sizes)."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.bias = nn.Parameter(torch.ones(1)), nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * functional.relu(x) + self.bias


def _relu(affine: bool) -> nn.Module:
    return AffineReLU() if affine else nn.ReLU()


@register(_stem_rule)
@short_names
class HGStem(nn.Module):
    """HGNetv2's stem: two strided convolutions, between them a max pool beside two 2x2 convolutions.

    These are padded at the bottom and the right only, so their 2x2 windows keep the size.

    Input (B, C, H, W), output (B, out, H / 4, W / 4).
    """

    def __init__(
        self, in_channels: int, mid_channels: int, out_channels: int, affine: bool = False
    ) -> None:
        super().__init__()
        half = mid_channels // 2
        self.stem1 = Conv(in_channels, mid_channels, 3, 2, activation=_relu(affine))
        self.stem2a = Conv(mid_channels, half, 2, 1, 0, activation=_relu(affine))
        self.stem2b = Conv(half, mid_channels, 2, 1, 0, activation=_relu(affine))
        self.stem3 = Conv(mid_channels * 2, mid_channels, 3, 2, activation=_relu(affine))
        self.stem4 = Conv(mid_channels, out_channels, 1, 1, activation=_relu(affine))
        self.pool = nn.MaxPool2d(kernel_size=2, stride=1)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.pad(self.stem1(x), (0, 1, 0, 1))
        convolved = self.stem2b(functional.pad(self.stem2a(x), (0, 1, 0, 1)))
        return self.stem4(self.stem3(torch.cat((self.pool(x), convolved), 1)))


@register(convolution)
@short_names
class LightConv(nn.Module):
    """Pointwise convolution without activation, then a depthwise one with ReLU."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int = 3, affine: bool = False
    ) -> None:
        super().__init__()
        self.conv1 = Conv(in_channels, out_channels, 1, activation=False)
        self.conv2 = DWConv(out_channels, out_channels, kernel_size, activation=_relu(affine))

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
        affine: `AffineReLU` for ReLU.
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
        affine: bool = False,
    ) -> None:
        super().__init__()
        widths = [in_channels, *[mid_channels] * (repeats - 1)]
        self.m = nn.ModuleList(
            LightConv(width, mid_channels, kernel_size, affine)
            if light
            else Conv(width, mid_channels, kernel_size, activation=_relu(affine))
            for width in widths
        )
        kept = in_channels + repeats * mid_channels
        self.sc = Conv(kept, out_channels // 2, 1, activation=_relu(affine))
        self.ec = Conv(out_channels // 2, out_channels, 1, activation=_relu(affine))
        self.has_residual = shortcut and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        maps = [x]
        for layer in self.m:
            maps.append(layer(maps[-1]))
        y = self.ec(self.sc(torch.cat(maps, 1)))
        return x + y if self.has_residual else y
