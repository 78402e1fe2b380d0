"""Fusion blocks of the encoders behind RT-DETR's.

Sources: D-FINE (arXiv 2410.13842), YOLOv9 (arXiv 2402.13616) for layer aggregation, RT-DETR (arXiv 2304.08069)
for the path of re-parameterizable convolutions, DEIMv2 (arXiv 2509.20787) for the small encoder.
Letters: B batch, C channels, H height, W width.
"""

from __future__ import annotations

from torch import Tensor, nn

from models.blocks.rep import RepC3
from models.common import Conv, aggregate, short_names
from models.registry import LayerError, convolution, register, stacked


@register(stacked)
@short_names
class RepELAN(nn.Module):
    """D-FINE's fusion block: layer aggregation whose two stages are a `RepC3` and a 3x3 convolution.

    Args:
        in_channels: C of the input.
        out_channels: C of the output.
        repeats: re-parameterizable convolutions in each stage.
        expansion: width of a stage, in halves of `out_channels`.
    """

    def __init__(
        self, in_channels: int, out_channels: int, repeats: int = 3, expansion: float = 1.0
    ) -> None:
        super().__init__()
        stem, stage = 2 * out_channels, round(expansion * out_channels // 2)
        if stage < 1:
            raise LayerError(f"got expansion {expansion} of {out_channels} channels, expected more")
        self.cv1 = Conv(in_channels, stem)
        self.cv2 = _stage(out_channels, stage, repeats)
        self.cv3 = _stage(stage, stage, repeats)
        self.cv4 = Conv(stem + 2 * stage, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return aggregate(x, self.cv1, (self.cv2, self.cv3), self.cv4)


@register(convolution)
@short_names
class MeanConv(nn.Module):
    """A 1x1 convolution of a map to which its mean over all places was added: what DEIMv2's small encoder has for attention."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.cv1 = Conv(in_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.cv1(x + x.mean((2, 3), keepdim=True))


def _stage(in_channels: int, out_channels: int, repeats: int) -> nn.Sequential:
    return nn.Sequential(
        RepC3(in_channels, out_channels, repeats), Conv(out_channels, out_channels, 3)
    )
