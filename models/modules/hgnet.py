"""HGNetv2, the backbone of RT-DETR-L and -X, on its own (PaddleClas; arXiv 2304.08069), and DEIMv2's small ones (2509.20787).

A stem at stride 4, then four stages of `HGBlock`s, of the small ones three; all but the first begin with a strided depthwise
convolution. State keys are `stem.…`, `stages.<n>.<m>.…`.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from models.blocks.hg import HGBlock, HGStem
from models.common import DWConv
from models.registry import backbone, register


class Stage(NamedTuple):
    """One stage of the published tables.

    Attributes:
        mid: channels of a block's chain.
        out: channels of the stage's output.
        blocks: number of `HGBlock`s.
        kernel: kernel size of the chain.
        light: the chain is depthwise separable.
    """

    mid: int
    out: int
    blocks: int
    kernel: int
    light: bool


LARGE = (
    Stage(48, 128, 1, 3, False),
    Stage(96, 512, 1, 3, False),
    Stage(192, 1024, 3, 5, True),
    Stage(384, 2048, 1, 5, True),
)
EXTRA = (
    Stage(64, 128, 1, 3, False),
    Stage(128, 512, 2, 3, False),
    Stage(256, 1024, 5, 5, True),
    Stage(512, 2048, 2, 5, True),
)
CHAIN, SMALL_CHAIN = 6, 3
BELOW_P4 = (Stage(16, 64, 1, 3, False), Stage(32, 256, 1, 3, False))
"""What the small ones have in common with HGNetv2-B0, which Pico is without the last stage."""


class HGNetV2(nn.Module):
    """HGNetv2 without its classifier.

    Args:
        stem: middle and output channels of the stem.
        stages: one entry per stage.
        chain: length of the chain of each block.
        affine: a learnt scale and shift behind each activation.
    """

    def __init__(
        self,
        stem: tuple[int, int],
        stages: tuple[Stage, ...],
        chain: int = CHAIN,
        affine: bool = False,
    ) -> None:
        super().__init__()
        self.stem = HGStem(3, *stem, affine)
        widths = [stem[1], *(stage.out for stage in stages[:-1])]
        self.stages = nn.ModuleList(
            _stage(width, stage, chain, affine, is_first=number == 0)
            for number, (width, stage) in enumerate(zip(widths, stages, strict=True))
        )
        self.channels = [stage.out for stage in stages]
        self.strides = [4 * 2**number for number in range(len(stages))]

    def forward(self, x: Tensor) -> list[Tensor]:
        """Image (B, 3, H, W) to the maps of all stages, strides 4, 8, 16 and so on."""
        x = self.stem(x)
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps


def _stage(
    in_channels: int, stage: Stage, chain: int, affine: bool, *, is_first: bool
) -> nn.Sequential:
    """The blocks of one stage; all but the first have a shortcut."""
    layers: list[nn.Module] = []
    if not is_first:
        layers.append(DWConv(in_channels, in_channels, 3, 2, activation=False))
    for number in range(stage.blocks):
        width = stage.out if number else in_channels
        block = HGBlock(
            width, stage.mid, stage.out, stage.kernel, chain, stage.light, number > 0, affine
        )
        layers.append(block)
    return nn.Sequential(*layers)


@register(backbone)
def HGNetv2_L() -> HGNetV2:  # noqa: N802 - the published name
    """Backbone of RT-DETR-L: 128, 512, 1024, 2048 channels."""
    return HGNetV2((32, 48), LARGE)


@register(backbone)
def HGNetv2_X() -> HGNetV2:  # noqa: N802 - the published name
    """Backbone of RT-DETR-X: the channels of L, deeper and with wider chains."""
    return HGNetV2((32, 64), EXTRA)


@register(backbone)
def HGNetv2_Atto() -> HGNetV2:  # noqa: N802 - the published name
    """Backbone of DEIMv2-Atto: 64, 256, 256 channels, up to stride 16."""
    return HGNetV2((16, 16), (*BELOW_P4, Stage(64, 256, 1, 3, True)), SMALL_CHAIN, affine=True)


@register(backbone)
def HGNetv2_Femto() -> HGNetV2:  # noqa: N802 - the published name
    """Backbone of DEIMv2-Femto: 64, 256, 512 channels, up to stride 16."""
    return HGNetV2((16, 16), (*BELOW_P4, Stage(64, 512, 1, 5, True)), SMALL_CHAIN, affine=True)


@register(backbone)
def HGNetv2_Pico() -> HGNetV2:  # noqa: N802 - the published name
    """Backbone of DEIMv2-Pico: 64, 256, 512 channels, up to stride 16."""
    return HGNetV2((16, 16), (*BELOW_P4, Stage(64, 512, 2, 5, True)), SMALL_CHAIN, affine=True)
