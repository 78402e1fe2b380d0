"""MobileNetV4 backbones with a free width factor (Qin et al., 2024, arXiv 2404.10518).

At factor 1 they are the trunks of timm's `mobilenetv4_*`: same parameters, same outputs, and `weights` reads timm's files.
Every other factor scales the widths; the kernels, strides and attention heads stay.

Letters: B batch, C channels, H height, W width, N heads, D key (and value) width of a head.
"""

from __future__ import annotations

import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.blocks.input_norm import InputNorm
from models.blocks.mobilenetv4_tables import (
    CONV_LARGE,
    CONV_MEDIUM,
    CONV_SMALL,
    HYBRID_LARGE,
    HYBRID_MEDIUM,
    AttentionSpec,
    ConvSpec,
    FusedSpec,
    Spec,
    UibSpec,
    Variant,
)
from models.registry import LayerError, backbone, register
from models.weights.transfer import load_backbone_weights
from utils.errors import CheckpointError
from utils.logger import get_logger


def round_to_8(value: float) -> int:
    """The multiple of 8 nearest to `value`, at least 8 and never more than a tenth below it."""
    rounded = max(8, int(value + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * value else rounded


def conv_norm(
    in_channels: int,
    out_channels: int,
    kernel: int,
    stride: int = 1,
    groups: int = 1,
    activation: type[nn.Module] | None = None,
) -> nn.Sequential:
    """Convolution without bias, BatchNorm, and the activation if there is one."""
    conv = nn.Conv2d(
        in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False
    )
    layers = OrderedDict[str, nn.Module](conv=conv, bn=nn.BatchNorm2d(out_channels))
    if activation is not None:
        layers["act"] = activation()
    return nn.Sequential(layers)


class LayerScale(nn.Module):
    """A learnable factor a channel."""

    def __init__(self, channels: int, start: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((channels,), start))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma[:, None, None]


class FusedBottleneck(nn.Module):
    """Expanding kxk convolution, linear 1x1 projection; residual where shapes agree."""

    def __init__(
        self, in_channels: int, out_channels: int, spec: FusedSpec, activation: type[nn.Module]
    ) -> None:
        super().__init__()
        hidden = round_to_8(in_channels * spec.expansion)
        self.expand = conv_norm(in_channels, hidden, 3, spec.stride, activation=activation)
        self.project = conv_norm(hidden, out_channels, 1)
        self.has_residual = spec.stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.expand(x))
        return x + y if self.has_residual else y


class UniversalBottleneck(nn.Module):
    """Depthwise (optional), 1x1 expansion, depthwise (optional), linear 1x1 projection (section 3 of the paper)."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        spec: UibSpec,
        activation: type[nn.Module],
        scale: float | None,
    ) -> None:
        super().__init__()
        hidden = round_to_8(in_channels * spec.expansion)
        start_stride, middle_stride = (1, spec.stride) if spec.middle else (spec.stride, 1)
        self.start: nn.Module = nn.Identity()
        if spec.start:
            self.start = conv_norm(in_channels, in_channels, spec.start, start_stride, in_channels)
        self.expand = conv_norm(in_channels, hidden, 1, activation=activation)
        self.middle: nn.Module = nn.Identity()
        if spec.middle:
            self.middle = conv_norm(hidden, hidden, spec.middle, middle_stride, hidden, activation)
        self.project = conv_norm(hidden, out_channels, 1)
        self.layer_scale = nn.Identity() if scale is None else LayerScale(out_channels, scale)
        self.has_residual = spec.stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer_scale(self.project(self.middle(self.expand(self.start(x)))))
        return x + y if self.has_residual else y


class MobileAttention(nn.Module):
    """Multi-query attention over the map, residual: N queries a place, one key and one value for all heads.

    Keys and values are taken on a coarser map where `kv_stride` is above 1 (equation 1 of the paper).
    """

    def __init__(self, channels: int, spec: AttentionSpec, scale: float | None) -> None:
        super().__init__()
        self.heads = spec.heads
        self.norm = nn.BatchNorm2d(channels)
        self.query = nn.Conv2d(channels, spec.heads * spec.dim, 1, bias=False)
        self.key = self._projection(channels, spec)
        self.value = self._projection(channels, spec)
        self.project = nn.Conv2d(spec.heads * spec.dim, channels, 1, bias=False)
        self.layer_scale = nn.Identity() if scale is None else LayerScale(channels, scale)

    @staticmethod
    def _projection(channels: int, spec: AttentionSpec) -> nn.Sequential:
        layers = OrderedDict[str, nn.Module]()
        if spec.kv_stride > 1:
            layers["down"] = conv_norm(channels, channels, 3, spec.kv_stride, channels)
        layers["proj"] = nn.Conv2d(channels, spec.dim, 1, bias=False)
        return nn.Sequential(layers)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        query = (
            self.query(y).unflatten(1, (self.heads, -1)).flatten(3).transpose(2, 3)
        )  # (B, N, HW, D)
        key, value = (
            project(y).flatten(2).transpose(1, 2).unsqueeze(1).expand(-1, self.heads, -1, -1)
            for project in (self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(query, key, value)
        joined = mixed.transpose(2, 3).flatten(1, 2).unflatten(2, x.shape[2:])  # (B, N*D, H, W)
        return x + self.layer_scale(self.project(joined))


def _build_layer(
    specs: tuple[Spec, ...], width: int, factor: float, variant: Variant
) -> tuple[nn.Sequential, int]:
    """The blocks of a layer for `width` channels coming in, and the width that goes out."""
    blocks: list[nn.Module] = []
    for spec in specs:
        out = width if isinstance(spec, AttentionSpec) else int(spec.out * factor)
        if isinstance(spec, ConvSpec):
            blocks.append(
                conv_norm(width, out, spec.kernel, spec.stride, activation=variant.activation)
            )
        elif isinstance(spec, FusedSpec):
            blocks.append(FusedBottleneck(width, out, spec, variant.activation))
        elif isinstance(spec, UibSpec):
            blocks.append(
                UniversalBottleneck(width, out, spec, variant.activation, variant.layer_scale)
            )
        else:
            blocks.append(MobileAttention(width, spec, variant.layer_scale))
        width = out
    return nn.Sequential(*blocks), width


class MobileNetV4(nn.Module):
    """Image (B, 3, H, W) -> four maps at strides 4, 8, 16, 32.

    Args:
        factor: multiplies every width; any number that leaves each width at least 1.
        weights: a file of timm's `mobilenetv4_*` weights (factor 1 only), or None for fresh ones.
        normalize: bring images to what timm's weights were trained on, once they come in.

    Attributes:
        timm_name: of timm's model at factor 1.

    Raises:
        LayerError: the factor is not a positive number, leaves a width of 0, or is not 1 beside `weights`.
        CheckpointError: the file of weights cannot be read or does not fit.
    """

    variant: Variant
    timm_name: str

    def __init__(
        self, factor: float = 0.5, weights: str | None = None, normalize: bool = True
    ) -> None:
        super().__init__()
        self.normalizes = normalize
        is_number = isinstance(factor, (int, float)) and not isinstance(factor, bool)
        if not is_number or not math.isfinite(factor) or int(self.variant.stem * factor) < 1:
            least = 1 / self.variant.stem
            raise LayerError(
                f"got factor {factor!r}, expected a number of at least {least:.3g}, such as 0.5"
            )
        width = int(self.variant.stem * factor)
        self.normalize = InputNorm()
        self.stem = conv_norm(3, width, 3, 2, activation=self.variant.activation)
        self.layers = nn.ModuleList()
        self.channels: list[int] = []
        for specs in self.variant.layers:
            layer, width = _build_layer(specs, width, factor, self.variant)
            self.layers.append(layer)
            self.channels.append(width)
        self.strides = [4, 8, 16, 32]
        self._initialize()
        if weights:
            if factor != 1:
                raise LayerError(
                    f"got weights beside factor {factor}, expected factor 1, the width they are made for"
                )
            get_logger().info(f"{weights}: {load_backbone_weights(self, weights).summary()}")

    def _initialize(self) -> None:
        """Convolutions by fan-out, those of attention by Xavier."""
        in_attention = {
            m
            for block in self.modules()
            if isinstance(block, MobileAttention)
            for m in block.modules()
        }
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module in in_attention:
                nn.init.xavier_uniform_(module.weight)
            elif isinstance(module, nn.Conv2d):
                fan_out = module.weight[0, 0].numel() * module.out_channels // module.groups
                nn.init.normal_(module.weight, 0, math.sqrt(2 / fan_out))

    def forward(self, x: Tensor) -> list[Tensor]:
        maps: list[Tensor] = []
        x = self.stem(self.normalize(x))
        for layer in self.layers:
            x = layer(x)
            maps.append(x)
        return maps

    def foreign_names(self) -> dict[str, str]:
        """The names of our tensors in timm's model."""
        return {key: timm_key(key, self) for key in self.state_dict() if "normalize." not in key}

    def on_pretrained(self) -> str:
        """timm's weights have come in: images are to be normalised as those were that they learnt from; told in words."""
        return self.normalize.set_as_timm(self.timm_name) if self.normalizes else ""

    def load_timm_state(self, state: dict[str, Tensor], source: str) -> None:
        """Take the trunk out of a state dict of timm's model; its last convolutions and classifier are left out.

        Raises:
            CheckpointError: `source` lacks a tensor of the trunk, or has one of another shape.
        """
        own = self.state_dict()
        given = {key: state.get(timm_key(key, self)) for key in own}
        bad = [timm_key(k, self) for k, v in given.items() if v is None or v.shape != own[k].shape]
        if bad:
            raise CheckpointError(
                f"{source}: does not fit {type(self).__name__} - missing or of another shape: "
                f"{', '.join(bad[:3])}, {len(bad)} in all. Give timm's weights of this very model."
            )
        self.load_state_dict(given)


_TIMM_PARTS = {
    FusedBottleneck: {"expand.conv": "conv_exp", "expand.bn": "bn1", "project.conv": "conv_pwl", "project.bn": "bn2"},
    UniversalBottleneck: {"start": "dw_start", "expand": "pw_exp", "middle": "dw_mid", "project": "pw_proj"},
    MobileAttention: {
        "query": "attn.query.proj", "key.down.conv": "attn.key.down_conv", "key.down.bn": "attn.key.norm",
        "key.proj": "attn.key.proj", "value.down.conv": "attn.value.down_conv", "value.down.bn": "attn.value.norm",
        "value.proj": "attn.value.proj", "project": "attn.output.proj",
    },
}  # fmt: skip


def timm_key(key: str, model: MobileNetV4) -> str:
    """The name that our tensor `key` has in timm's model."""
    if key.startswith("stem."):
        return key.replace("stem.conv.", "conv_stem.").replace("stem.bn.", "bn1.")
    _, layer, index, rest = key.split(".", 3)
    block = model.get_submodule(f"layers.{layer}.{index}")
    parts = _TIMM_PARTS.get(type(block), {"bn": "bn1"})
    for ours, theirs in parts.items():
        if rest.startswith(f"{ours}."):
            rest = theirs + rest[len(ours) :]
            break
    return f"blocks.{layer}.{index}.{rest}"


@register(backbone)
class MobileNetV4ConvSmall(MobileNetV4):
    """1.1 million parameters at factor 1; convolutions only."""

    variant = CONV_SMALL
    timm_name = "mobilenetv4_conv_small"


@register(backbone)
class MobileNetV4ConvMedium(MobileNetV4):
    """7.0 million parameters at factor 1; convolutions only."""

    variant = CONV_MEDIUM
    timm_name = "mobilenetv4_conv_medium"


@register(backbone)
class MobileNetV4ConvLarge(MobileNetV4):
    """29.6 million parameters at factor 1; convolutions only."""

    variant = CONV_LARGE
    timm_name = "mobilenetv4_conv_large"


@register(backbone)
class MobileNetV4HybridMedium(MobileNetV4):
    """8.3 million parameters at factor 1; attention in the last two layers."""

    variant = HYBRID_MEDIUM
    timm_name = "mobilenetv4_hybrid_medium"


@register(backbone)
class MobileNetV4HybridLarge(MobileNetV4):
    """34.8 million parameters at factor 1; attention in the last two layers."""

    variant = HYBRID_LARGE
    timm_name = "mobilenetv4_hybrid_large"
