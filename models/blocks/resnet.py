"""Bottleneck stages of the residual network (arXiv 1512.03385, figure 5 right and table 1) as rows of a YAML.

Letters: B batch, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from models.common import Conv, short_names
from models.registry import LayerError, Plan, Scaling, offer, single

EXPANSION = 4


class ResNetBlock(nn.Module):
    """1x1, 3x3 and 1x1 convolutions beside a shortcut; the stride stands in the 3x3 one.

    Args:
        in_channels: C of the input.
        out_channels: width of the first two convolutions; the output has `expansion` times as many channels.
        stride: of the block.
        expansion: 4 in the paper.
    """

    def __init__(
        self, in_channels: int, out_channels: int, stride: int = 1, expansion: int = EXPANSION
    ) -> None:
        super().__init__()
        wide = expansion * out_channels
        self.cv1 = Conv(in_channels, out_channels, activation=nn.ReLU())
        self.cv2 = Conv(out_channels, out_channels, 3, stride, activation=nn.ReLU())
        self.cv3 = Conv(out_channels, wide, activation=False)
        is_same = stride == 1 and in_channels == wide
        self.shortcut: nn.Module = (
            nn.Identity() if is_same else Conv(in_channels, wide, 1, stride, activation=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.cv3(self.cv2(self.cv1(x))) + self.shortcut(x))


def _stage_rule(in_channels: Sequence[Any], args: Sequence[Any], scaling: Scaling) -> Plan:
    """`[in, width, stride, is_first, n, ...]`, as the rows of that dialect say it; widths are not scaled."""
    channels = single(in_channels)
    if len(args) < 2 or args[0] != channels:
        raise LayerError(
            f"got {list(args)}, expected [{channels}, width, stride, is_first, blocks]: the input has {channels} channels"
        )
    is_first = len(args) > 3 and bool(args[3])
    expansion = args[5] if len(args) > 5 else EXPANSION
    return Plan(list(args), args[1] if is_first else expansion * args[1])


@offer(_stage_rule)
@short_names
class ResNetLayer(nn.Module):
    """A stage of bottlenecks; or, as the first, the stem: a 7x7 convolution at stride 2 and a max pool.

    Args:
        in_channels: C of the input.
        out_channels: width of the stage, or of the stem.
        stride: of the stage's first bottleneck.
        is_first: this is the stem.
        repeats: bottlenecks.
        expansion: as in `ResNetBlock`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        is_first: bool = False,
        repeats: int = 1,
        expansion: int = EXPANSION,
    ) -> None:
        super().__init__()
        if is_first:
            self.layer = nn.Sequential(
                Conv(in_channels, out_channels, 7, 2, 3, activation=nn.ReLU()),
                nn.MaxPool2d(3, 2, 1),
            )
            return
        wide = expansion * out_channels
        self.layer = nn.Sequential(
            ResNetBlock(in_channels, out_channels, stride, expansion),
            *(ResNetBlock(wide, out_channels, 1, expansion) for _ in range(repeats - 1)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)
