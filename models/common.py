"""Blocks that the YOLO families share.

Letters: B batch, C channels, H height, W width. Every block maps (B, C, H, W) to (B, C', H', W').
Attribute names are those of the published state dicts (`cv1`, `m`, `conv`, `bn`), so that public weights load.
"""

from __future__ import annotations

import copy
import functools
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

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

T = TypeVar("T", bound=Callable[..., Any])
Size = int | tuple[int, int]
"""Of a kernel, a stride or a padding: one number, or (height, width)."""

SHORT_NAMES: dict[str, tuple[str, ...]] = {
    "c": ("channels",), "dim": ("channels",), "ed": ("channels",),
    "c1": ("in_channels", "channels"), "cm": ("mid_channels", "feedforward"),
    "c2": ("out_channels",), "c3": ("stem_channels", "hidden_channels"), "c4": ("stage_channels",),
    "n": ("repeats",), "k": ("kernel_size", "kernels", "kernel_sizes"), "s": ("stride",), "p": ("padding",),
    "g": ("groups",), "d": ("dilation", "dimension"), "act": ("activation",), "e": ("expansion",),
    "attn_ratio": ("key_ratio",), "lightconv": ("light",),
}  # fmt: skip
"""Parameters as pasted code calls them, and our words for each: the first that a layer has is meant."""


def short_names(build: T) -> T:
    """Let a layer of ours be called with the short keywords of pasted code: `Conv(8, 16, k=3, act=False)`."""
    call: Any = build.__init__ if inspect.isclass(build) else build
    own = inspect.signature(call).parameters
    words = {
        short: next(name for name in names if name in own)
        for short, names in SHORT_NAMES.items()
        if short not in own and any(name in own for name in names)
    }

    @functools.wraps(call)
    def renamed(*args: Any, **kwargs: Any) -> Any:
        twice = [short for short in kwargs if words.get(short) in kwargs]
        if twice:
            raise TypeError(f"got {twice[0]} and {words[twice[0]]}, expected one of them")
        return call(*args, **{words.get(name, name): value for name, value in kwargs.items()})

    if not inspect.isclass(build):
        return renamed  # type: ignore[return-value]
    setattr(build, "__init__", renamed)  # noqa: B010 - mypy refuses the assignment
    return build


def whole_names(build: Callable[..., Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of a row, short ones under the words of `build`."""
    own = inspect.signature(build).parameters
    words = {
        key: next((name for name in SHORT_NAMES.get(key, ()) if name in own), key) for key in given
    }
    return {key if key in own else words[key]: value for key, value in given.items()}


@short_names
def autopad(kernel_size: Size, padding: Size | None = None, dilation: int = 1) -> Size:
    """Padding that keeps the size at stride 1, unless one is given."""
    if padding is not None:
        return padding
    if isinstance(kernel_size, int):
        return dilation * (kernel_size - 1) // 2
    height, width = kernel_size
    return dilation * (height - 1) // 2, dilation * (width - 1) // 2


def batch_norm(channels: int) -> nn.BatchNorm2d:
    """BatchNorm with the constants all YOLO families are published with."""
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.03)


@register(convolution)
@short_names
class Conv(nn.Module):
    """Convolution without bias, BatchNorm, activation (SiLU unless told otherwise)."""

    default_act: nn.Module = nn.SiLU()
    """What `activation=True` means; a subclass may have another."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size = 1,
        stride: Size = 1,
        padding: Size | None = None,
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
            self.act = copy.deepcopy(self.default_act) if activation else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))

    def forward_fuse(self, x: Tensor) -> Tensor:
        """`forward` where the BatchNorm is folded already, as pasted code calls it."""
        return self.act(self.conv(x))


@register(convolution)
@short_names
class DWConv(Conv):
    """Depthwise `Conv`: as many groups as input and output channels allow."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size = 1,
        stride: Size = 1,
        dilation: int = 1,
        activation: bool | nn.Module = True,
    ) -> None:
        groups = math.gcd(in_channels, out_channels)
        super().__init__(
            in_channels, out_channels, kernel_size, stride, None, groups, dilation, activation
        )


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
@short_names
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
@short_names
class Bottleneck(nn.Module):
    """Two convolutions with a residual where the widths agree."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        shortcut: bool = True,
        groups: int = 1,
        kernels: Sequence[Size] = (1, 3),
        expansion: float = 0.5,
    ) -> None:
        super().__init__()
        hidden = int(out_channels * expansion)
        self.cv1 = Conv(in_channels, hidden, kernels[0], 1)
        self.cv2 = Conv(hidden, out_channels, kernels[1], 1, groups=groups)
        self.add = shortcut and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        y = self.cv2(self.cv1(x))
        return x + y if self.add else y


@register(stacked)
@short_names
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
        self.m = self.path(hidden, repeats, shortcut, groups)

    def path(self, hidden: int, repeats: int, shortcut: bool, groups: int) -> nn.Module:
        """What stands between `cv1` and the joint: `hidden` channels in and out."""
        return nn.Sequential(
            *(Bottleneck(hidden, hidden, shortcut, groups, expansion=1.0) for _ in range(repeats))
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.cv3(torch.cat((self.m(self.cv1(x)), self.cv2(x)), 1))


@register(convolution)
@short_names
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
@short_names
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
@short_names
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
@short_names
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
