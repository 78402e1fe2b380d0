"""MobileOne stages: several branches while training, one convolution afterwards (Vasu et al., CVPR 2023, arXiv 2206.04040).

A stage is one row, `MobileOne, [out, num_blocks, num_branches, use_se, num_se]`, and halves the map. The whole backbones
S0 to S4 are timm models (`mobileone_s0`).

Letters: B batch, C channels, H height, W width.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from models.blocks.rep import fold_branches, sum_branches
from models.registry import LayerError, Plan, Scaling, convolution, register
from utils.layers import PointwiseConv


def conv_norm(
    in_channels: int, out_channels: int, kernel_size: int, stride: int, dilation: int, groups: int
) -> nn.Sequential:
    """Convolution without bias and BatchNorm; the size is kept at stride 1."""
    padding = dilation * (kernel_size - 1) // 2
    conv: nn.Conv2d = (
        PointwiseConv(in_channels, out_channels, stride, groups)
        if kernel_size == 1
        else nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias=False
        )
    )
    return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(out_channels)))


class SqueezeExcite(nn.Module):
    """Channel gates from the global mean: 1x1 to C/16 (1 at least), ReLU, 1x1 back, sigmoid."""

    def __init__(self, channels: int, ratio: float = 1 / 16) -> None:
        super().__init__()
        hidden = max(int(channels * ratio), 1)
        self.reduce = nn.Conv2d(channels, hidden, 1)
        self.expand = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean((2, 3), keepdim=True)
        return x * self.expand(F.relu(self.reduce(mean))).sigmoid()


class MobileOneBlock(nn.Module):
    """`num_branches` convolutions, a 1x1 one (kernels above 1) and a BatchNorm skip (equal shapes), summed; SE; ReLU.

    After `reparameterize()` the sum is `conv`, one convolution with bias, and the branches are gone.

    Raises:
        LayerError: the kernel is even (its 1x1 branch would have no centre), or there is no branch.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        num_branches: int = 4,
        use_se: bool = False,
    ) -> None:
        super().__init__()
        if kernel_size % 2 == 0:
            raise LayerError(f"got kernel size {kernel_size}, expected an odd one")
        if num_branches < 1:
            raise LayerError(f"got {num_branches} branches, expected 1 or more")
        shape = (in_channels, out_channels)
        self.branches: nn.ModuleList | None = nn.ModuleList(
            conv_norm(*shape, kernel_size, stride, dilation, groups) for _ in range(num_branches)
        )
        self.scale = conv_norm(*shape, 1, stride, 1, groups) if kernel_size > 1 else None
        self.skip = (
            nn.BatchNorm2d(out_channels) if in_channels == out_channels and stride == 1 else None
        )
        self.conv: nn.Conv2d | None = None
        self.se: nn.Module = SqueezeExcite(out_channels) if use_se else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = sum_branches(x, self._branches(), self.skip) if self.conv is None else self.conv(x)
        return F.relu(self.se(y))

    def _branches(self) -> list[Any]:
        assert self.branches is not None
        return [*self.branches, *([] if self.scale is None else [self.scale])]

    def reparameterize(self) -> None:
        """Fold all branches into one convolution with bias (section 3.2 of the paper); in place, idempotent."""
        if self.branches is None:
            return
        self.conv = fold_branches(self._branches(), self.skip)
        self.branches = self.scale = self.skip = None


def _stage_rule(in_channels: Sequence[Any], args: Sequence[Any], scaling: Scaling) -> Plan:
    """`[out, blocks, ...]` becomes `(in, scaled out, blocks, ...)`; the stage repeats by its own argument."""
    if scaling.repeats != 1:
        raise LayerError(
            f"got repeats {scaling.repeats}, expected 1; the second argument says how many blocks there are"
        )
    return convolution(in_channels, args, scaling)


@register(_stage_rule)
class MobileOne(nn.Sequential):
    """`num_blocks` pairs of a depthwise 3x3 and a pointwise 1x1 block, the first pair with stride 2.

    The last `num_se` pairs have squeeze-and-excitation in both blocks, if `use_se`.

    Raises:
        LayerError: fewer than one block, or more blocks with squeeze-and-excitation than blocks.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_blocks: int,
        num_branches: int = 4,
        use_se: bool = False,
        num_se: int = 0,
    ) -> None:
        if num_blocks < 1 or not 0 <= num_se <= num_blocks:
            raise LayerError(
                f"got {num_blocks} blocks, {num_se} with SE, expected at least 1 and no more SE than blocks"
            )
        blocks: list[nn.Module] = []
        for i in range(num_blocks):
            width = in_channels if i == 0 else out_channels
            has_se = use_se and i >= num_blocks - num_se
            blocks += [
                MobileOneBlock(width, width, 3, 2 if i == 0 else 1, 1, width, num_branches, has_se),
                MobileOneBlock(width, out_channels, 1, 1, 1, 1, num_branches, has_se),
            ]
        super().__init__(*blocks)
