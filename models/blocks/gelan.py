"""Blocks of YOLOv9: generalised efficient layer aggregation (GELAN), links of the auxiliary branch.

Sources: YOLOv9 (Wang et al., arXiv 2402.13616) for GELAN and the auxiliary branch, ELAN (arXiv
2211.04800), RepVGG (arXiv 2101.03697) for re-parameterization, CBNet (arXiv 1909.03625) for
composite links.
Letters: B batch, C channels, H height, W width. Attribute names are those of the published state
dicts.

`width_multiple` scales the output channels of a row; the inner widths are taken as they are
written.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.blocks.rep import RepConvN
from models.common import C3, Conv, aggregate, short_names
from models.registry import (
    LayerError,
    Plan,
    Scaling,
    convolution,
    first_argument,
    register,
    single,
    unchanged,
)


@register(unchanged)
class Silence(nn.Module):
    """Passes its input on: gives the image an index that later rows can take."""

    def forward(self, x: Tensor) -> Tensor:
        return x


@short_names
class RepNBottleneck(nn.Module):
    """A re-parameterizable and a plain 3x3 convolution, a residual where the widths agree."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        shortcut: bool = True,
        groups: int = 1,
        expansion: float = 0.5,
    ) -> None:
        super().__init__()
        hidden = int(out_channels * expansion)
        self.cv1 = RepConvN(in_channels, hidden, 3)
        self.cv2 = Conv(hidden, out_channels, 3, groups=groups)
        self.add = shortcut and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        y = self.cv2(self.cv1(x))
        return x + y if self.add else y


class RepNCSP(C3):
    """`C3` over re-parameterizable bottlenecks."""

    def path(self, hidden: int, repeats: int, shortcut: bool, groups: int) -> nn.Module:
        return nn.Sequential(
            *(RepNBottleneck(hidden, hidden, shortcut, groups, 1.0) for _ in range(repeats))
        )


@register(convolution)
@short_names
class RepNCSPELAN4(nn.Module):
    """GELAN block: layer aggregation whose stages are RepNCSP blocks (arXiv 2402.13616, figure 4).

    Args:
        in_channels: C of the input.
        out_channels: C of the output.
        stem_channels: width of the first convolution, which is halved.
        stage_channels: width of each of the two stages.
        repeats: bottlenecks in each stage.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stem_channels: int,
        stage_channels: int,
        repeats: int = 1,
    ) -> None:
        super().__init__()
        half = _half(stem_channels)
        self.cv1 = Conv(in_channels, stem_channels)
        self.cv2 = _csp_stage(half, stage_channels, repeats)
        self.cv3 = _csp_stage(stage_channels, stage_channels, repeats)
        self.cv4 = Conv(stem_channels + 2 * stage_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return aggregate(x, self.cv1, (self.cv2, self.cv3), self.cv4)


def _csp_stage(in_channels: int, out_channels: int, repeats: int) -> nn.Sequential:
    return nn.Sequential(
        RepNCSP(in_channels, out_channels, repeats), Conv(out_channels, out_channels, 3)
    )


def _half(channels: int) -> int:
    if channels % 2:
        raise LayerError(
            f"got {channels} channels, which are to be halved, expected an even number"
        )
    return channels // 2


@register(convolution)
@short_names
class ELAN1(nn.Module):
    """Layer aggregation whose two stages are plain 3x3 convolutions."""

    def __init__(
        self, in_channels: int, out_channels: int, stem_channels: int, stage_channels: int
    ) -> None:
        super().__init__()
        self.cv1 = Conv(in_channels, stem_channels)
        self.cv2 = Conv(_half(stem_channels), stage_channels, 3)
        self.cv3 = Conv(stage_channels, stage_channels, 3)
        self.cv4 = Conv(stem_channels + 2 * stage_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return aggregate(x, self.cv1, (self.cv2, self.cv3), self.cv4)


@register(convolution)
@short_names
class AConv(nn.Module):
    """Halves the size: 2x2 average against aliasing, then a 3x3 convolution at stride 2."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.cv1 = Conv(in_channels, out_channels, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.cv1(F.avg_pool2d(x, 2, 1))


@register(convolution)
@short_names
class ADown(nn.Module):
    """Halves the size twice over: half the channels by convolution, half by max pooling."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.cv1 = Conv(_half(in_channels), _half(out_channels), 3, 2)
        self.cv2 = Conv(_half(in_channels), _half(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        convolved, pooled = F.avg_pool2d(x, 2, 1).chunk(2, 1)
        return torch.cat((self.cv1(convolved), self.cv2(F.max_pool2d(pooled, 3, 2, 1))), 1)


@register(convolution)
@short_names
class SPPELAN(nn.Module):
    """Layer aggregation over a chain of three 5x5 max pools."""

    def __init__(
        self, in_channels: int, out_channels: int, hidden_channels: int, kernel_size: int = 5
    ) -> None:
        super().__init__()
        self.cv1 = Conv(in_channels, hidden_channels)
        self.pool = nn.MaxPool2d(kernel_size, stride=1, padding=kernel_size // 2)
        self.cv5 = Conv(4 * hidden_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        maps = [self.cv1(x)]
        for _ in range(3):
            maps.append(self.pool(maps[-1]))
        return self.cv5(torch.cat(maps, 1))


def _composite_outputs(in_channels: Sequence[Any], args: Sequence[Any], scaling: Scaling) -> Plan:
    """`[[c0, c1, ...], ...]`: several maps that stay together in the row's one slot."""
    widths = first_argument(args)
    if not isinstance(widths, (list, tuple)) or not widths:
        raise LayerError(f"got {widths!r}, expected a list of output channels such as [[256, 512]]")
    scaled = [scaling.channels(width) for width in widths]
    return Plan([single(in_channels), scaled, *args[1:]], scaled)


@register(_composite_outputs)
@short_names
class CBLinear(nn.Module):
    """A 1x1 convolution split into several maps, one for each level that takes them."""

    def __init__(
        self,
        in_channels: int,
        widths: Sequence[int],
        kernel_size: int = 1,
        stride: int = 1,
        padding: int | None = None,
        groups: int = 1,
    ) -> None:
        super().__init__()
        pad = kernel_size // 2 if padding is None else padding
        self.widths = list(widths)
        self.conv = nn.Conv2d(in_channels, sum(widths), kernel_size, stride, pad, groups=groups)

    def forward(self, x: Tensor) -> list[Tensor]:
        return list(self.conv(x).split(self.widths, 1))


def _composite_sum(in_channels: Sequence[Any], args: Sequence[Any], scaling: Scaling) -> Plan:
    """`[[i, j, ...]]`: which map to take from each input but the last, whose channels come out."""
    picks = first_argument(args)
    *sources, target = in_channels
    out = single([target])
    if not isinstance(picks, (list, tuple)) or len(picks) != len(sources):
        raise LayerError(f"got picks {picks!r}, expected one for each of {len(sources)} inputs")
    for source, pick in zip(sources, picks, strict=True):
        widths = list(source) if isinstance(source, (list, tuple)) else [source]
        if not isinstance(pick, int) or not 0 <= pick < len(widths):
            raise LayerError(f"got pick {pick!r} of an input with {len(widths)} maps {widths}")
        if widths[pick] != out:
            raise LayerError(f"got a map of {widths[pick]} channels to add to one of {out}")
    return Plan(list(args), out)


@register(_composite_sum)
class CBFuse(nn.Module):
    """Adds one map of each composite input, resized, to the last input."""

    def __init__(self, picks: Sequence[int]) -> None:
        super().__init__()
        self.picks = list(picks)

    def forward(self, xs: list[Any]) -> Tensor:
        *sources, total = xs
        size = total.shape[-2:]
        for source, pick in zip(sources, self.picks, strict=True):
            chosen = source[pick] if isinstance(source, (list, tuple)) else source
            total = total + F.interpolate(chosen, size=size, mode="nearest")
        return total
