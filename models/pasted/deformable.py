"""Deformable convolutions that pasted files take from a CUDA extension: torchvision's operator stands in its place.

Sources: deformable convolution (arXiv 1703.06211), its second version with masks (arXiv 1811.11168), the documentation of mmcv
(Apache-2.0) and DCNv2 (BSD) for names, signatures and the order of offsets, which torchvision shares: y, x of each kernel point.

Letters: B batch, C channels, H and W size of the input, h and w of the output, K points of the kernel, G groups of offsets.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.utils import _pair


def modulated_deform_conv2d(
    input: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    deform_groups: int = 1,
) -> Tensor:
    """Convolve (B, C, H, W) at points moved by `offset` (B, 2GK, h, w) and weighted by `mask` (B, GK, h, w).

    Groups follow from the shapes, as torchvision reads them.
    """
    operator = importlib.import_module("torchvision.ops").deform_conv2d
    return operator(
        input, offset, weight, bias, _pair(stride), _pair(padding), _pair(dilation), mask
    )


def deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    deform_groups: int = 1,
    bias: Any = False,
    im2col_step: int = 32,
) -> Tensor:
    """`modulated_deform_conv2d` without a mask."""
    return modulated_deform_conv2d(input, offset, None, weight, None, stride, padding, dilation)


class ModulatedDeformConv2d(nn.Module):
    """The convolution alone: offsets and mask are given to `forward`."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
        deform_groups: int = 1,
        bias: bool | str = True,
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size, self.stride = _pair(kernel_size), _pair(stride)
        self.padding, self.dilation = _pair(padding), _pair(dilation)
        self.deform_groups = self.deformable_groups = deform_groups
        self.weight = nn.Parameter(
            torch.empty(out_channels, in_channels // groups, *self.kernel_size)
        )
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        limit = 1 / math.sqrt(self.weight[0].numel())
        nn.init.uniform_(self.weight, -limit, limit)

    def forward(self, x: Tensor, offset: Tensor, mask: Tensor | None = None) -> Tensor:
        return modulated_deform_conv2d(
            x, offset, mask, self.weight, self.bias, self.stride, self.padding, self.dilation
        )


class DeformConv2d(ModulatedDeformConv2d):
    """First version: no mask, and no bias unless asked."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
        deform_groups: int = 1,
        bias: bool | str = False,
        im2col_step: int = 32,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, deform_groups, bias
        )  # fmt: skip


def _offsets(layer: Any, channels_a_point: int) -> nn.Conv2d:
    """The convolution that finds offsets, 2 a point, and masks, 1 a point; it starts at 0."""
    points = layer.deform_groups * math.prod(layer.kernel_size)
    conv = nn.Conv2d(
        layer.in_channels, channels_a_point * points, layer.kernel_size, layer.stride, layer.padding, layer.dilation
    )  # fmt: skip
    nn.init.zeros_(conv.weight)
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
    return conv


class DeformConv2dPack(DeformConv2d):
    """`DeformConv2d` that finds its own offsets."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.conv_offset = _offsets(self, 2)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, self.conv_offset(x))


class ModulatedDeformConv2dPack(ModulatedDeformConv2d):
    """`ModulatedDeformConv2d` that finds its own offsets and masks."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.conv_offset = _offsets(self, 3)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        found = self.conv_offset(x)
        cut = found.shape[1] // 3
        return super().forward(x, found[:, : 2 * cut], found[:, 2 * cut :].sigmoid())


class DCNv2(ModulatedDeformConv2d):
    """The convolution alone, with the arguments of the DCNv2 extension."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        deformable_groups: int = 1,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, 1, deformable_groups
        )  # fmt: skip


class DCN(DCNv2):
    """`DCNv2` that finds its own offsets and masks."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.conv_offset_mask = _offsets(self, 3)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        found = self.conv_offset_mask(x)
        cut = found.shape[1] // 3
        return super().forward(x, found[:, : 2 * cut], found[:, 2 * cut :].sigmoid())


NAMES: Mapping[str, Any] = {
    "modulated_deform_conv2d": modulated_deform_conv2d, "deform_conv2d": deform_conv2d,
    "dcn_v2_conv": functools.partial(modulated_deform_conv2d), "DCN": DCN, "DCNv2": DCNv2,
    "DeformConv2d": DeformConv2d, "DeformConv": DeformConv2d,
    "DeformConv2dPack": DeformConv2dPack, "DeformConvPack": DeformConv2dPack,
    "ModulatedDeformConv2d": ModulatedDeformConv2d, "ModulatedDeformConv": ModulatedDeformConv2d,
    "ModulatedDeformConv2dPack": ModulatedDeformConv2dPack, "ModulatedDeformConvPack": ModulatedDeformConv2dPack,
}  # fmt: skip
