"""Cross-stage partial blocks beside C3, what stands in their paths, and YOLO11's attention over positions.

Sources: CSPNet (arXiv 1911.11929), ELAN (arXiv 2211.04800), scaled dot-product attention (arXiv 1706.03762).
Letters: B batch, C channels, H height, W width, K heads. Attribute names are those of the published state dicts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.common import C3, SPP, Bottleneck, Conv, aggregate, batch_norm, short_names
from models.registry import LayerError, Plan, Scaling, convolution, offer, register, stacked

HEAD_CHANNELS = 64
SIZES_WITH_C3K = ("m", "l", "x")


@register(stacked)
@short_names
class C2f(nn.Module):
    """Splits its input, runs one half through a chain of bottlenecks, keeps every output of it."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        repeats: int = 1,
        shortcut: bool = False,
        groups: int = 1,
        expansion: float = 0.5,
    ) -> None:
        super().__init__()
        self.c = hidden = int(out_channels * expansion)  # pasted subclasses read it
        self.cv1 = Conv(in_channels, 2 * hidden)
        self.cv2 = Conv((2 + repeats) * hidden, out_channels)
        self.m = nn.ModuleList(
            Bottleneck(hidden, hidden, shortcut, groups, (3, 3), 1.0) for _ in range(repeats)
        )

    def forward(self, x: Tensor) -> Tensor:
        return aggregate(x, self.cv1, self.m, self.cv2)


@register(stacked)
@short_names
class C3k(C3):
    """`C3` whose bottlenecks use two kernels of one size (3 unless told otherwise)."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        repeats: int = 1,
        shortcut: bool = True,
        groups: int = 1,
        expansion: float = 0.5,
        kernel_size: int = 3,
    ) -> None:
        super().__init__(in_channels, out_channels, 0, shortcut, groups, expansion)
        hidden, kernels = int(out_channels * expansion), (kernel_size, kernel_size)
        self.m = nn.Sequential(
            *(Bottleneck(hidden, hidden, shortcut, groups, kernels, 1.0) for _ in range(repeats))
        )


def _c3k2_rule(in_channels: Sequence[Any], args: Sequence[Any], scaling: Scaling) -> Plan:
    """Like `stacked`; the sizes m, l and x use C3k whatever the row says, as they are published."""
    plan = stacked(in_channels, args, scaling)
    if scaling.size in SIZES_WITH_C3K:
        plan.args[3:4] = [True]
    return plan


@register(_c3k2_rule)
@short_names
class C3k2(nn.Module):
    """`C2f` whose stages are C3k blocks of two bottlenecks, or narrow bottlenecks.

    Args:
        in_channels: C of the input.
        out_channels: C of the output.
        repeats: stages.
        c3k: stages are C3k blocks; if not, bottlenecks of half the width.
        expansion: width of a stage as a share of `out_channels`.
        groups: groups of the stages' second convolutions.
        shortcut: stages have a residual.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        repeats: int = 1,
        c3k: bool = False,
        expansion: float = 0.5,
        groups: int = 1,
        shortcut: bool = True,
    ) -> None:
        super().__init__()
        self.c = hidden = int(out_channels * expansion)  # pasted subclasses read it
        self.cv1 = Conv(in_channels, 2 * hidden)
        self.cv2 = Conv((2 + repeats) * hidden, out_channels)
        self.m = nn.ModuleList(
            C3k(hidden, hidden, 2, shortcut, groups)
            if c3k
            else Bottleneck(hidden, hidden, shortcut, groups, (3, 3))
            for _ in range(repeats)
        )

    def forward(self, x: Tensor) -> Tensor:
        return aggregate(x, self.cv1, self.m, self.cv2)


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


@short_names
class Attention(nn.Module):
    """Self-attention over all positions; a depthwise convolution of the values adds the place.

    Args:
        channels: C, a multiple of `num_heads`.
        num_heads: K.
        key_ratio: width of queries and keys as a share of the values' width.
    """

    def __init__(self, channels: int, num_heads: int = 8, key_ratio: float = 0.5) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.value_channels = channels // num_heads
        self.key_channels = int(self.value_channels * key_ratio)
        qkv_channels = channels + 2 * self.key_channels * num_heads
        self.qkv = Conv(channels, qkv_channels, activation=False)
        self.proj = Conv(channels, channels, activation=False)
        self.pe = Conv(channels, channels, 3, groups=channels, activation=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        # (B, K, 2 * key + value, H * W): each head's query, key and value channels stand together.
        widths = [self.key_channels, self.key_channels, self.value_channels]
        heads = self.qkv(x).reshape(batch, self.num_heads, sum(widths), height * width)
        query, key, value = heads.split(widths, 2)
        mixed = F.scaled_dot_product_attention(
            query.transpose(2, 3), key.transpose(2, 3), value.transpose(2, 3)
        )
        mixed = mixed.transpose(2, 3).reshape(batch, channels, height, width)
        return self.proj(mixed + self.pe(value.reshape(batch, channels, height, width)))


@short_names
class PSABlock(nn.Module):
    """Attention and a two-layer perceptron of 1x1 convolutions, each with a residual unless told otherwise."""

    def __init__(
        self, channels: int, key_ratio: float = 0.5, num_heads: int = 4, shortcut: bool = True
    ) -> None:
        super().__init__()
        self.attn = Attention(channels, num_heads, key_ratio)
        self.ffn = nn.Sequential(
            Conv(channels, 2 * channels), Conv(2 * channels, channels, activation=False)
        )
        self.add = shortcut

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x) if self.add else self.attn(x)
        return x + self.ffn(x) if self.add else self.ffn(x)


def _same_width(in_channels: Sequence[Any], args: Sequence[Any], scaling: Scaling) -> Plan:
    """Like `stacked`, for blocks that keep their width."""
    plan = stacked(in_channels, args, scaling)
    given, out = plan.args[:2]
    if given != out:
        raise LayerError(f"got {given} input channels for {out} output channels, expected the same")
    return plan


@register(_same_width)
@short_names
class C2PSA(nn.Module):
    """Splits its input and runs one half through attention blocks."""

    def __init__(
        self, in_channels: int, out_channels: int, repeats: int = 1, expansion: float = 0.5
    ) -> None:
        super().__init__()
        self.c = hidden = int(in_channels * expansion)
        num_heads = max(hidden // HEAD_CHANNELS, 1)
        self.cv1 = Conv(in_channels, 2 * hidden)
        self.cv2 = Conv(2 * hidden, out_channels)
        self.m = nn.Sequential(*(PSABlock(hidden, num_heads=num_heads) for _ in range(repeats)))

    def forward(self, x: Tensor) -> Tensor:
        kept, attended = self.cv1(x).chunk(2, 1)
        return self.cv2(torch.cat((kept, self.m(attended)), 1))
