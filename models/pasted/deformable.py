"""Deformable convolutions that pasted files take from a CUDA extension: torchvision's operator stands in its place.

Sources: deformable convolution (arXiv 1703.06211), its second version with masks (arXiv 1811.11168), the documentation of mmcv
(Apache-2.0) and DCNv2 (BSD) for names, signatures and the order of offsets, which torchvision shares: y, x of each kernel point.

Letters: B batch, C channels, H and W size of the input, h and w of the output, K points of the kernel, G groups of offsets.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

Size = int | tuple[int, int]


def pair(size: Size) -> tuple[int, int]:
    """One number for both dimensions, or the two as they are."""
    return (size[0], size[1]) if isinstance(size, (list, tuple)) else (size, size)


def modulated_deform_conv2d(
    input: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size = 0,
    dilation: Size = 1,
    groups: int = 1,
    deform_groups: int = 1,
) -> Tensor:
    """Convolve (B, C, H, W) at points moved by `offset` (B, 2GK, h, w) and weighted by `mask` (B, GK, h, w).

    Groups follow from the shapes, as torchvision reads them.
    """
    operator = importlib.import_module("torchvision.ops").deform_conv2d
    return operator(input, offset, weight, bias, pair(stride), pair(padding), pair(dilation), mask)


def deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    stride: Size = 1,
    padding: Size = 0,
    dilation: Size = 1,
    *groups: object,
) -> Tensor:
    """`modulated_deform_conv2d` without a mask; `groups` and what comes behind follow from the shapes."""
    return modulated_deform_conv2d(input, offset, None, weight, None, stride, padding, dilation)


class ModulatedDeformConv2d(nn.Module):
    """The convolution alone: offsets and mask are given to `forward`."""

    finder: ClassVar[str] = ""
    """What the convolution is called that finds offsets and masks; "" where they are given."""
    has_mask: ClassVar[bool] = True

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size = 0,
        dilation: Size = 1,
        groups: int = 1,
        deform_groups: int = 1,
        bias: bool | str = True,
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size, self.stride = pair(kernel_size), pair(stride)
        self.padding, self.dilation = pair(padding), pair(dilation)
        self.deform_groups = self.deformable_groups = deform_groups
        self.weight = nn.Parameter(
            torch.empty(out_channels, in_channels // groups, *self.kernel_size)
        )
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        limit = 1 / math.sqrt(self.weight[0].numel())
        nn.init.uniform_(self.weight, -limit, limit)
        if self.finder:  # 2 offsets a point, 1 mask; all of them start at 0
            outputs = (2 + self.has_mask) * deform_groups * math.prod(self.kernel_size)
            conv = nn.Conv2d(
                in_channels, outputs, self.kernel_size, self.stride, self.padding, self.dilation
            )
            for parameter in conv.parameters():
                nn.init.zeros_(parameter)
            self.add_module(self.finder, conv)

    def forward(
        self, x: Tensor, offset: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        if self.finder:
            offset = self.get_submodule(self.finder)(x)
            if self.has_mask:
                cut = offset.shape[1] // 3 * 2
                offset, mask = offset[:, :cut], offset[:, cut:].sigmoid()
        assert offset is not None
        return modulated_deform_conv2d(
            x, offset, mask, self.weight, self.bias, self.stride, self.padding, self.dilation
        )


class ModulatedDeformConv2dPack(ModulatedDeformConv2d):
    """`ModulatedDeformConv2d` that finds its own offsets and masks."""

    finder = "conv_offset"


class DeformConv2d(ModulatedDeformConv2d):
    """First version: no mask, and no bias unless asked."""

    has_mask = False

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size = 0,
        dilation: Size = 1,
        groups: int = 1,
        deform_groups: int = 1,
        bias: bool | str = False,
        im2col_step: int = 32,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, deform_groups, bias
        )  # fmt: skip


class DeformConv2dPack(DeformConv2d):
    """`DeformConv2d` that finds its own offsets."""

    finder = "conv_offset"


class DCNv2(ModulatedDeformConv2d):
    """The convolution alone, with the arguments of the DCNv2 extension."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size = 0,
        dilation: Size = 1,
        deformable_groups: int = 1,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, 1, deformable_groups
        )


class DCN(DCNv2):
    """`DCNv2` that finds its own offsets and masks."""

    finder = "conv_offset_mask"


NAMES: Mapping[str, object] = {
    "modulated_deform_conv2d": modulated_deform_conv2d, "deform_conv2d": deform_conv2d,
    "dcn_v2_conv": modulated_deform_conv2d, "DCN": DCN, "DCNv2": DCNv2,
    "DeformConv2d": DeformConv2d, "DeformConv": DeformConv2d,
    "DeformConv2dPack": DeformConv2dPack, "DeformConvPack": DeformConv2dPack,
    "ModulatedDeformConv2d": ModulatedDeformConv2d, "ModulatedDeformConv": ModulatedDeformConv2d,
    "ModulatedDeformConv2dPack": ModulatedDeformConv2dPack, "ModulatedDeformConvPack": ModulatedDeformConv2dPack,
}  # fmt: skip
