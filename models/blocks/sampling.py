"""Layers that change the size of a map, convolutions of several kernels, and picking one map of several.

Sources: sub-pixel shuffling (arXiv 1609.05158), MixConv (arXiv 1907.09595), the documentation of the YOLO projects for signatures.
Letters: B batch, C channels, H height, W width, g gain.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.common import batch_norm, short_names
from models.registry import LayerError, Plan, Scaling, convolution, offer, register, single


@register(convolution)
@short_names
class DWConvTranspose2d(nn.ConvTranspose2d):
    """Transposed convolution with as many groups as input and output channels allow.

    Args:
        in_channels: C of the input.
        out_channels: C of the output.
        kernel_size: of the convolution.
        stride: how often larger the output is.
        p1: padding of the input.
        p2: padding of the output.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 1,
        stride: int = 1,
        p1: int = 0,
        p2: int = 0,
    ) -> None:
        groups = math.gcd(in_channels, out_channels)
        super().__init__(in_channels, out_channels, kernel_size, stride, p1, p2, groups)


@register(convolution)
@short_names
class ConvTranspose(nn.Module):
    """Transposed convolution, BatchNorm, activation; doubles the size unless told otherwise."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 2,
        stride: int = 2,
        padding: int = 0,
        bn: bool = True,
        activation: bool | nn.Module = True,
    ) -> None:
        super().__init__()
        self.conv_transpose = nn.ConvTranspose2d(
            in_channels, out_channels, kernel_size, stride, padding, bias=not bn
        )
        self.bn: nn.Module = batch_norm(out_channels) if bn else nn.Identity()
        self.has_default_activation = activation is True
        default: nn.Module = nn.SiLU() if activation else nn.Identity()
        self.act = activation if isinstance(activation, nn.Module) else default

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv_transpose(x)))


@register(convolution)
@short_names
class MixConv2d(nn.Module):
    """Output channels shared out among convolutions of several kernels (arXiv 1907.09595, section 3.1).

    Args:
        in_channels: C of the input.
        out_channels: C of the output.
        kernel_sizes: one for each share.
        stride: of all.
        equal_ch: shares of one width; if not, of about as many weights, so that large kernels are narrow.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_sizes: Sequence[int] = (1, 3),
        stride: int = 1,
        equal_ch: bool = True,
    ) -> None:
        super().__init__()
        widths = _shares(out_channels, [1.0 if equal_ch else 1.0 / k**2 for k in kernel_sizes])
        self.m = nn.ModuleList(
            nn.Conv2d(
                in_channels,
                width,
                k,
                stride,
                k // 2,
                groups=math.gcd(in_channels, width),
                bias=False,
            )  # fmt: skip
            for width, k in zip(widths, kernel_sizes, strict=True)
        )
        self.bn = batch_norm(out_channels)
        self.act, self.has_default_activation = nn.SiLU(), True

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(torch.cat([conv(x) for conv in self.m], 1)))


def _shares(total: int, weights: Sequence[float]) -> list[int]:
    """`total` in whole parts proportional to `weights`, at least 1 each; the first takes what is left."""
    parts = [max(int(total * weight / sum(weights)), 1) for weight in weights]
    parts[0] += total - sum(parts)
    if parts[0] < 1:
        raise LayerError(f"got {total} output channels for {len(weights)} kernels, expected more")
    return parts


def _contract_rule(in_channels: Sequence[Any], args: Sequence[Any], scaling: Scaling) -> Plan:
    """`[gain]`: channels grow by its square."""
    gain = int(args[0]) if args else 2
    return Plan([gain], single(in_channels) * gain**2)


def _expand_rule(in_channels: Sequence[Any], args: Sequence[Any], scaling: Scaling) -> Plan:
    """`[gain]`: channels are divided by its square."""
    gain, channels = int(args[0]) if args else 2, single(in_channels)
    if channels % gain**2:
        raise LayerError(f"got {channels} channels, expected a multiple of {gain**2}")
    return Plan([gain], channels // gain**2)


@offer(_contract_rule)
class Contract(nn.Module):
    """(B, C, H, W) to (B, C g^2, H / g, W / g): places become channels."""

    def __init__(self, gain: int = 2) -> None:
        super().__init__()
        self.gain = gain

    def forward(self, x: Tensor) -> Tensor:
        return functional.pixel_unshuffle(x, self.gain)


@offer(_expand_rule)
class Expand(nn.Module):
    """(B, C, H, W) to (B, C / g^2, H g, W g): channels become places."""

    def __init__(self, gain: int = 2) -> None:
        super().__init__()
        self.gain = gain

    def forward(self, x: Tensor) -> Tensor:
        return functional.pixel_shuffle(x, self.gain)


def _index_rule(in_channels: Sequence[Any], args: Sequence[Any], scaling: Scaling) -> Plan:
    """`[index]` or `[width, index]`: one map of an input that has several, such as CBLinear's."""
    if len(in_channels) != 1 or not isinstance(in_channels[0], (list, tuple)):
        raise LayerError(
            f"got {list(in_channels)}, expected one input with several maps, such as CBLinear's"
        )
    widths = in_channels[0]
    index = args[-1] if args else 0
    if not isinstance(index, int) or not -len(widths) <= index < len(widths):
        raise LayerError(f"got index {index!r}, expected one from 0 to {len(widths) - 1}")
    return Plan([index], widths[index])


@offer(_index_rule)
class Index(nn.Module):
    """Picks one map of several."""

    def __init__(self, index: int = 0) -> None:
        super().__init__()
        self.index = index

    def forward(self, x: Sequence[Tensor]) -> Tensor:
        return x[self.index]
