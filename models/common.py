"""Blocks that the YOLO families share.

Letters: B batch, C channels, H height, W width. Every block maps (B, C, H, W) to (B, C', H', W').
Attribute names are those of the published state dicts (`cv1`, `m`, `conv`, `bn`), so that public weights load.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from models.registry import (
    LayerError,
    Plan,
    Scaling,
    channels_first,
    convolution,
    register,
    single,
    stacked,
    unchanged,
    unscaled,
)


def autopad(kernel_size: int, padding: int | None = None, dilation: int = 1) -> int:
    """Padding that keeps the size at stride 1, unless one is given."""
    return dilation * (kernel_size - 1) // 2 if padding is None else padding


def batch_norm(channels: int) -> nn.BatchNorm2d:
    """BatchNorm with the constants all YOLO families are published with."""
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.03)


@register(convolution)
class Conv(nn.Module):
    """Convolution without bias, BatchNorm, activation (SiLU unless told otherwise)."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 1,
        stride: int = 1,
        padding: int | None = None,
        groups: int = 1,
        dilation: int = 1,
        activation: bool | nn.Module = True,
    ) -> None:
        super().__init__()
        pad = autopad(kernel_size, padding, dilation)
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, pad, dilation, groups, bias=False
        )
        self.bn = batch_norm(out_channels)
        self.has_default_activation = activation is True
        self.act: nn.Module
        if isinstance(activation, nn.Module):
            self.act = activation
        else:
            self.act = nn.SiLU() if activation else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


@register(convolution)
class DWConv(Conv):
    """Depthwise `Conv`: as many groups as input and output channels allow."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 1,
        stride: int = 1,
        dilation: int = 1,
        activation: bool | nn.Module = True,
    ) -> None:
        groups = _common_divisor(in_channels, out_channels)
        super().__init__(
            in_channels, out_channels, kernel_size, stride, None, groups, dilation, activation
        )


def _common_divisor(a: int, b: int) -> int:
    while b:
        a, b = b, a % b
    return a


def _concat_rule(in_channels: Sequence[Any], args: Sequence[Any], scaling: Scaling) -> Plan:
    """Inputs are joined along the channels; they must share one stride."""
    total = sum(single([channels]) for channels in in_channels)
    if len(in_channels) < 2:
        raise LayerError(f"got {len(in_channels)} input, expected two or more, such as [-1, 6]")
    if len(set(scaling.strides)) > 1:
        sizes = ", ".join(
            f"{c} channels at stride {s}" for c, s in zip(in_channels, scaling.strides)
        )
        raise LayerError(f"got inputs that do not fit each other ({sizes}), expected one stride")
    return Plan(list(args), total)


@register(_concat_rule)
class Concat(nn.Module):
    """Join feature maps along `dimension`."""

    def __init__(self, dimension: int = 1) -> None:
        super().__init__()
        self.dimension = dimension

    def forward(self, xs: list[Tensor]) -> Tensor:
        return torch.cat(xs, self.dimension)


def aggregate(x: Tensor, first: nn.Module, stages: Iterable[nn.Module], last: nn.Module) -> Tensor:
    """Layer aggregation (arXiv 2211.04800): halve `first(x)`, run a half through the stages, join all maps."""
    maps = list(first(x).chunk(2, 1))
    for stage in stages:
        maps.append(stage(maps[-1]))
    return last(torch.cat(maps, 1))


@register(convolution)
class Bottleneck(nn.Module):
    """Two convolutions with a residual where the widths agree."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        shortcut: bool = True,
        groups: int = 1,
        kernels: Sequence[int] = (1, 3),
        expansion: float = 0.5,
    ) -> None:
        super().__init__()
        hidden = int(out_channels * expansion)
        self.cv1 = Conv(in_channels, hidden, kernels[0], 1)
        self.cv2 = Conv(hidden, out_channels, kernels[1], 1, groups=groups)
        self.has_residual = shortcut and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        y = self.cv2(self.cv1(x))
        return x + y if self.has_residual else y


@register(stacked)
class C3(nn.Module):
    """Cross-stage partial block: one path through bottlenecks, one past them (arXiv 1911.11929)."""

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
        self.cv2 = Conv(in_channels, hidden)
        self.cv3 = Conv(2 * hidden, out_channels)
        self.m = nn.Sequential(
            *(Bottleneck(hidden, hidden, shortcut, groups, expansion=1.0) for _ in range(repeats))
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.cv3(torch.cat((self.m(self.cv1(x)), self.cv2(x)), 1))


@register(convolution)
class SPP(nn.Module):
    """Spatial pyramid pooling with parallel max pools of several sizes (arXiv 1406.4729)."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_sizes: Sequence[int] = (5, 9, 13)
    ) -> None:
        super().__init__()
        hidden = in_channels // 2
        self.cv1 = Conv(in_channels, hidden)
        self.cv2 = Conv(hidden * (len(kernel_sizes) + 1), out_channels)
        self.m = nn.ModuleList(nn.MaxPool2d(k, stride=1, padding=k // 2) for k in kernel_sizes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.cv1(x)
        return self.cv2(torch.cat([x, *(pool(x) for pool in self.m)], 1))


@register(convolution)
class SPPF(nn.Module):
    """SPP with one pool applied three times in a row: the same windows for less work."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 5) -> None:
        super().__init__()
        hidden = in_channels // 2
        self.cv1 = Conv(in_channels, hidden)
        self.cv2 = Conv(hidden * 4, out_channels)
        self.m = nn.MaxPool2d(kernel_size, stride=1, padding=kernel_size // 2)

    def forward(self, x: Tensor) -> Tensor:
        maps = [self.cv1(x)]
        for _ in range(3):
            maps.append(self.m(maps[-1]))
        return self.cv2(torch.cat(maps, 1))


@register(convolution)
class Focus(nn.Module):
    """Fold each 2x2 neighbourhood into channels, then convolve: a stride-2 stem without loss."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int = 1, stride: int = 1
    ) -> None:
        super().__init__()
        self.conv = Conv(in_channels * 4, out_channels, kernel_size, stride)

    def forward(self, x: Tensor) -> Tensor:
        rows = (x[..., ::2, :], x[..., 1::2, :])
        return self.conv(torch.cat([row[..., start::2] for start in (0, 1) for row in rows], 1))


@register(convolution)
class GhostConv(nn.Module):
    """Half the channels by a convolution, the other half by a cheap depthwise one (arXiv 1911.11907)."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 1,
        stride: int = 1,
        groups: int = 1,
        activation: bool = True,
    ) -> None:
        super().__init__()
        half = out_channels // 2
        self.cv1 = Conv(in_channels, half, kernel_size, stride, None, groups, 1, activation)
        self.cv2 = Conv(half, half, 5, 1, None, half, 1, activation)

    def forward(self, x: Tensor) -> Tensor:
        x = self.cv1(x)
        return torch.cat((x, self.cv2(x)), 1)


# The torch.nn layers that a YAML may name; each is safe to build from plain numbers.
_UNCHANGED: tuple[type[nn.Module], ...] = (
    nn.Upsample, nn.Identity, nn.MaxPool2d, nn.AvgPool2d, nn.ZeroPad2d, nn.Dropout, nn.ReLU, nn.ReLU6,
    nn.SiLU, nn.GELU, nn.Hardswish, nn.LeakyReLU, nn.Mish, nn.Sigmoid,
)  # fmt: skip
for _layer in _UNCHANGED:
    register(unchanged, f"nn.{_layer.__name__}")(_layer)
register(channels_first, "nn.BatchNorm2d")(nn.BatchNorm2d)
register(unscaled, "nn.Conv2d")(nn.Conv2d)
register(unscaled, "nn.ConvTranspose2d")(nn.ConvTranspose2d)
