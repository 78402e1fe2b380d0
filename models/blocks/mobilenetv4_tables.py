"""The layers of MobileNetV4's five sizes (Qin et al., 2024, arXiv 2404.10518), as plain data."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn


class ConvSpec(NamedTuple):
    """A convolution with BatchNorm and activation."""

    out: int
    kernel: int
    stride: int = 1


class FusedSpec(NamedTuple):
    """A fused inverted bottleneck: kernel and expansion in one convolution, then a projection."""

    out: int
    expansion: int
    stride: int


class UibSpec(NamedTuple):
    """A universal inverted bottleneck; kernel 0 leaves the depthwise convolution out."""

    out: int
    start: int
    middle: int
    expansion: int
    stride: int = 1


class AttentionSpec(NamedTuple):
    """Mobile multi-query attention on the width that comes in."""

    heads: int
    dim: int
    kv_stride: int = 1


Spec = ConvSpec | FusedSpec | UibSpec | AttentionSpec
Layers = tuple[tuple[Spec, ...], ...]


class Variant(NamedTuple):
    """Stem width, layers 1 to 4, activation, and where the layer scale starts (None: there is none)."""

    stem: int
    layers: Layers
    activation: type[nn.Module] = nn.ReLU
    layer_scale: float | None = None


def _repeat(count: int, *specs: Spec) -> tuple[Spec, ...]:
    return specs * count


_MEDIUM_HEAD: Layers = ((FusedSpec(48, 4, 2),), (UibSpec(80, 3, 5, 4, 2), UibSpec(80, 3, 3, 2)))
_LARGE_HEAD: Layers = ((FusedSpec(48, 4, 2),), (UibSpec(96, 3, 5, 4, 2), UibSpec(96, 3, 3, 4)))
_LARGE_3 = (UibSpec(192, 3, 5, 4, 2), *_repeat(3, UibSpec(192, 3, 3, 4)), UibSpec(192, 3, 5, 4))
_LARGE_4 = (
    UibSpec(512, 5, 5, 4, 2), *_repeat(3, UibSpec(512, 5, 5, 4)), UibSpec(512, 5, 0, 4), UibSpec(512, 5, 3, 4),
    *_repeat(2, UibSpec(512, 5, 0, 4)), UibSpec(512, 5, 3, 4), UibSpec(512, 5, 5, 4),
)  # fmt: skip
_MQA_160, _MQA_192 = AttentionSpec(4, 64, 2), AttentionSpec(8, 48, 2)
_MQA_256, _MQA_512 = AttentionSpec(4, 64), AttentionSpec(8, 64)

CONV_SMALL = Variant(32, (
    (ConvSpec(32, 3, 2), ConvSpec(32, 1)),
    (ConvSpec(96, 3, 2), ConvSpec(64, 1)),
    (UibSpec(96, 5, 5, 3, 2), *_repeat(4, UibSpec(96, 0, 3, 2)), UibSpec(96, 3, 0, 4)),
    (UibSpec(128, 3, 3, 6, 2), UibSpec(128, 5, 5, 4), UibSpec(128, 0, 5, 4), UibSpec(128, 0, 5, 3),
     *_repeat(2, UibSpec(128, 0, 3, 4))),
))  # fmt: skip
CONV_MEDIUM = Variant(32, (
    *_MEDIUM_HEAD,
    (UibSpec(160, 3, 5, 6, 2), *_repeat(2, UibSpec(160, 3, 3, 4)), UibSpec(160, 3, 5, 4), UibSpec(160, 3, 3, 4),
     UibSpec(160, 3, 0, 4), UibSpec(160, 0, 0, 2), UibSpec(160, 3, 0, 4)),
    (UibSpec(256, 5, 5, 6, 2), UibSpec(256, 5, 5, 4), *_repeat(2, UibSpec(256, 3, 5, 4)), UibSpec(256, 0, 0, 4),
     UibSpec(256, 3, 0, 4), UibSpec(256, 3, 5, 2), UibSpec(256, 5, 5, 4), *_repeat(2, UibSpec(256, 0, 0, 4)),
     UibSpec(256, 5, 0, 2)),
))  # fmt: skip
CONV_LARGE = Variant(24, (
    *_LARGE_HEAD,
    (*_LARGE_3, *_repeat(5, UibSpec(192, 5, 3, 4)), UibSpec(192, 3, 0, 4)),
    (*_LARGE_4, *_repeat(3, UibSpec(512, 5, 0, 4))),
))  # fmt: skip
HYBRID_MEDIUM = Variant(32, (
    *_MEDIUM_HEAD,
    (UibSpec(160, 3, 5, 6, 2), UibSpec(160, 0, 0, 2), UibSpec(160, 3, 3, 4), UibSpec(160, 3, 5, 4), _MQA_160,
     UibSpec(160, 3, 3, 4), _MQA_160, UibSpec(160, 3, 0, 4), _MQA_160, UibSpec(160, 3, 3, 4), _MQA_160,
     UibSpec(160, 3, 0, 4)),
    (UibSpec(256, 5, 5, 6, 2), UibSpec(256, 5, 5, 4), *_repeat(2, UibSpec(256, 3, 5, 4)), UibSpec(256, 0, 0, 2),
     UibSpec(256, 3, 5, 2), UibSpec(256, 0, 0, 2), UibSpec(256, 0, 0, 4), _MQA_256, UibSpec(256, 3, 0, 4), _MQA_256,
     UibSpec(256, 5, 5, 4), _MQA_256, UibSpec(256, 5, 0, 4), _MQA_256, UibSpec(256, 5, 0, 4)),
), layer_scale=1e-5)  # fmt: skip
HYBRID_LARGE = Variant(24, (
    *_LARGE_HEAD,
    (*_LARGE_3, UibSpec(192, 5, 3, 4), *_repeat(4, UibSpec(192, 5, 3, 4), _MQA_192), UibSpec(192, 3, 0, 4)),
    (*_LARGE_4, *_repeat(4, _MQA_512, UibSpec(512, 5, 0, 4))),
), nn.GELU, 1e-5)  # fmt: skip
