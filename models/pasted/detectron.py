"""Stand-ins for detectron2 and fvcore, as far as pasted backbones take them; from their documentation (Apache-2.0)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from models.blocks.layers import ChannelNorm
from models.pasted.helpers import MEASURING
from models.pasted.initializers import caffe2_xavier_init
from models.pasted.openmmlab import Registry


class ShapeSpec(NamedTuple):
    """Channels, size and stride of a map, as far as they are known."""

    channels: int | None = None
    height: int | None = None
    width: int | None = None
    stride: int | None = None


class Backbone(nn.Module):
    """A module that gives maps by name; `output_shape` tells their channels and strides."""

    @property
    def size_divisibility(self) -> int:
        return 0

    def output_shape(self) -> dict[str, ShapeSpec]:
        """From `_out_features`, `_out_feature_channels` and `_out_feature_strides`, which a backbone sets."""
        own: Any = self
        return {
            name: ShapeSpec(own._out_feature_channels[name], stride=own._out_feature_strides[name])
            for name in own._out_features
        }


class Conv2d(nn.Conv2d):
    """A convolution with a norm and an activation behind it, by keyword."""

    def __init__(self, *args: Any, norm: Any = None, activation: Any = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.norm, self.activation = norm, activation

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        x = x if self.norm is None else self.norm(x)
        return x if self.activation is None else self.activation(x)


def get_norm(norm: Any, out_channels: int) -> nn.Module | None:
    """A norm by its name, None for none; SyncBN is BN, GN has 32 groups."""
    if not norm:
        return None
    if callable(norm):
        return norm(out_channels)
    if norm == "GN":
        return nn.GroupNorm(32, out_channels)
    return ChannelNorm(out_channels) if norm == "LN" else nn.BatchNorm2d(out_channels)


def c2_msra_fill(module: Any) -> None:
    """He's normal initialisation by outputs, bias 0."""
    nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    if module.bias is not None:
        nn.init.zeros_(module.bias)


_measure = MEASURING["profile"]
NAMES: Mapping[str, Any] = {
    "ShapeSpec": ShapeSpec, "Backbone": Backbone, "CNNBlockBase": nn.Module, "Conv2d": Conv2d, "get_norm": get_norm,
    "BACKBONE_REGISTRY": Registry("backbone"), "c2_msra_fill": c2_msra_fill, "c2_xavier_fill": caffe2_xavier_init,
    **dict.fromkeys(("FlopCountAnalysis", "flop_count", "flop_count_str", "flop_count_table", "parameter_count",
                     "parameter_count_table"), _measure),
}  # fmt: skip
