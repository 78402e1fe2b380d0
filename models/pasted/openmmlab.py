"""What blocks take from mmcv and mmengine, from their documentation (Apache-2.0): layers by type, ConvModule, initialisation.

They build the same layers under the same attribute names; weights are initialised as torch does it, pretrained ones are not read
here. SyncBN is an ordinary BatchNorm.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from models.blocks.layers import ChannelNorm, DropPath
from models.pasted import deformable
from models.pasted.deformable import Size
from utils.errors import ConfigError
from utils.logger import get_logger

T = TypeVar("T")
Config = Mapping[str, object]
Build = Callable[..., nn.Module]
Fill = Callable[..., Tensor]
RELU: Config = {"type": "ReLU"}
IN_PLACE = ("ReLU", "LeakyReLU", "RReLU", "ReLU6", "ELU", "SiLU", "Mish", "HSwish")

_ACTIVATIONS: dict[str, Build] = {
    **{
        name: getattr(nn, name)
        for name in ("ReLU", "LeakyReLU", "PReLU", "RReLU", "ReLU6", "ELU", "Sigmoid", "Tanh", "GELU", "SiLU", "Mish")
    },
    "Swish": nn.SiLU, "HSwish": nn.Hardswish, "HSigmoid": nn.Hardsigmoid,
}  # fmt: skip
_CONVS: dict[str, Build] = {
    "Conv": nn.Conv2d, "Conv1d": nn.Conv1d, "Conv2d": nn.Conv2d, "Conv3d": nn.Conv3d, "deconv": nn.ConvTranspose2d,
    "DCN": deformable.DeformConv2dPack, "DCNv2": deformable.ModulatedDeformConv2dPack,
}  # fmt: skip
_NORMS: dict[str, Build] = {
    "BN": nn.BatchNorm2d, "BN1d": nn.BatchNorm1d, "BN2d": nn.BatchNorm2d, "BN3d": nn.BatchNorm3d,
    "SyncBN": nn.BatchNorm2d, "MMSyncBN": nn.BatchNorm2d, "LN": nn.LayerNorm, "IN": nn.InstanceNorm2d, "IN2d": nn.InstanceNorm2d,
    "GN": lambda channels, num_groups, **options: nn.GroupNorm(num_groups, channels, **options),
    "LN2d": lambda channels, eps=1e-6: ChannelNorm(channels),
}  # fmt: skip
_DROPS: dict[str, Build] = {
    "DropPath": lambda drop_prob=0.1: DropPath(drop_prob) if drop_prob else nn.Identity(),
    "Dropout": lambda drop_prob=0.5, inplace=False: nn.Dropout(drop_prob, inplace),
}


class Registry:
    """Classes by name; what is registered here is registered nowhere else: a YAML names the class itself."""

    def __init__(self, name: str = "type", known: Mapping[str, Build] | None = None) -> None:
        self.name = name
        self.classes: dict[str, Build] = dict(known or {})

    def register_module(self, name: str | Build | None = None, **options: object) -> object:
        """`@X.register_module()`, with a name or without."""
        if callable(name):
            return self.register_module()(name)  # type: ignore[operator]

        def add(build: Build) -> Build:
            self.classes[name or build.__name__] = build
            return build

        return add

    register = register_module

    def build(self, cfg: Config | None, *args: object, **kwargs: object) -> nn.Module:
        """The class that `type` names, called with the other keys; what `cfg` says goes before."""
        options = {**kwargs, **(cfg or {})}
        kind = options.pop("type", None) or "Conv2d"
        if kind not in self.classes:
            raise ConfigError(
                f"mmcv {self.name}: got {kind!r}, expected one of {', '.join(sorted(self.classes))}. Build the layer with "
                "torch.nn instead."
            )
        return self.classes[str(kind)](*args, **options)


NORMS, ACTIVATIONS = Registry("norm_cfg", _NORMS), Registry("act_cfg", _ACTIVATIONS)
CONVS, DROPS = Registry("conv_cfg", _CONVS), Registry("dropout_layer", _DROPS)
MODELS = Registry("type", {**_ACTIVATIONS, **_CONVS, **_NORMS, **_DROPS})


def build_norm_layer(
    cfg: Config, num_features: int, postfix: int | str = ""
) -> tuple[str, nn.Module]:
    """Name (`bn1`) and norm of `dict(type='BN', requires_grad=True, eps=1e-5)`."""
    options = dict(cfg)
    is_trained = bool(options.pop("requires_grad", True))
    layer = NORMS.build(options, num_features).requires_grad_(is_trained)
    short = str(cfg["type"]).lower().removeprefix("mm").removeprefix("sync")[:2]
    return f"{short}{postfix}", layer


class BaseModule(nn.Module):
    """A module that knows how it is to be initialised; torch's own way is kept."""

    def __init__(self, init_cfg: object = None) -> None:
        super().__init__()
        self.init_cfg = init_cfg

    def init_weights(self) -> None:
        """Nothing: weights come by `--weights` and `--backbone-weights`."""


class ModuleList(BaseModule, nn.ModuleList):
    """`nn.ModuleList` with `init_cfg`."""

    def __init__(self, modules: Iterable[nn.Module] | None = None, init_cfg: object = None) -> None:
        BaseModule.__init__(self, init_cfg)
        nn.ModuleList.__init__(self, modules)


class Sequential(BaseModule, nn.Sequential):
    """`nn.Sequential` with `init_cfg`."""

    def __init__(self, *args: nn.Module, init_cfg: object = None) -> None:
        BaseModule.__init__(self, init_cfg)
        nn.Sequential.__init__(self, *args)


class Scale(nn.Module):
    """A factor that is learned."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class ConvModule(nn.Module):
    """Convolution, norm, activation, in the order that `order` says; without a norm the convolution has a bias."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size = 0,
        dilation: Size = 1,
        groups: int = 1,
        bias: bool | str = "auto",
        conv_cfg: Config | None = None,
        norm_cfg: Config | None = None,
        act_cfg: Config | None = RELU,
        inplace: bool = True,
        order: Sequence[str] = ("conv", "norm", "act"),
    ) -> None:
        super().__init__()
        self.order = order
        self.conv = CONVS.build(
            conv_cfg, in_channels, out_channels, kernel_size, stride=stride, padding=padding, dilation=dilation,
            groups=groups, bias=norm_cfg is None if bias == "auto" else bool(bias),
        )  # fmt: skip
        self.norm_name = ""
        if norm_cfg is not None:
            is_behind = order.index("norm") > order.index("conv")
            self.norm_name, norm = build_norm_layer(
                norm_cfg, out_channels if is_behind else in_channels
            )
            self.add_module(self.norm_name, norm)
        self.activate: nn.Module | None = None
        if act_cfg is not None:
            option = {"inplace": inplace} if act_cfg["type"] in IN_PLACE else {}
            self.activate = ACTIVATIONS.build({**option, **act_cfg})

    @property
    def norm(self) -> nn.Module | None:
        """The norm, None where there is none."""
        return self.get_submodule(self.norm_name) if self.norm_name else None

    def forward(self, x: Tensor) -> Tensor:
        layers = {"conv": self.conv, "norm": self.norm, "act": self.activate}
        for step in self.order:
            layer = layers[step]
            x = x if layer is None else layer(x)
        return x


class DepthwiseSeparableConvModule(nn.Module):
    """A depthwise `ConvModule` and a pointwise one; `dw_norm_cfg` and the like are for one of them."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size = 0,
        dilation: Size = 1,
        norm_cfg: Config | None = None,
        act_cfg: Config | None = RELU,
        **own: Config | None,
    ) -> None:
        super().__init__()
        norms = [own.get(f"{part}_norm_cfg", norm_cfg) for part in ("dw", "pw")]
        acts = [own.get(f"{part}_act_cfg", act_cfg) for part in ("dw", "pw")]
        self.depthwise_conv = ConvModule(
            in_channels, in_channels, kernel_size, stride, padding, dilation, in_channels, norm_cfg=norms[0], act_cfg=acts[0]
        )  # fmt: skip
        self.pointwise_conv = ConvModule(
            in_channels, out_channels, 1, norm_cfg=norms[1], act_cfg=acts[1]
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.pointwise_conv(self.depthwise_conv(x))


def _initializer(fill: Fill, uniform: Fill | None = None) -> Callable[..., None]:
    """A function that fills a weight by some rule and a bias by one number, where a module has such."""

    def initialize(
        module: nn.Module,
        *args: float,
        bias: float = 0,
        distribution: str = "normal",
        **options: object,
    ) -> None:
        chosen = uniform if uniform is not None and distribution == "uniform" else fill
        own = dict(module.named_parameters(recurse=False))
        if "weight" in own:
            chosen(own["weight"], *args, **options)
        if "bias" in own:
            nn.init.constant_(own["bias"], bias)

    return initialize


_INITIALIZERS: Mapping[str, Callable[..., None]] = {
    "constant_init": _initializer(nn.init.constant_),
    "normal_init": _initializer(nn.init.normal_),
    "uniform_init": _initializer(nn.init.uniform_),
    "trunc_normal_init": _initializer(nn.init.trunc_normal_),
    "xavier_init": _initializer(nn.init.xavier_normal_, nn.init.xavier_uniform_),
    "kaiming_init": _initializer(
        partial(nn.init.kaiming_normal_, mode="fan_out", nonlinearity="relu"),
        partial(nn.init.kaiming_uniform_, mode="fan_out", nonlinearity="relu"),
    ),
}


def bias_init_with_prob(prior_prob: float = 0.01) -> float:
    """The bias at which a sigmoid gives `prior_prob` (focal loss, arXiv 1708.02002, section 4.1)."""
    return -math.log((1 - prior_prob) / prior_prob)


def _unchanged(**options: object) -> Callable[[T], T]:
    """A decorator that leaves the function as it is."""
    return lambda function: function


def _no_weights(*args: object, **kwargs: object) -> None:
    raise ConfigError(
        f"load_checkpoint: got {args[1:] or kwargs}, expected no weights here. Give them by --backbone-weights FILE."
    )


_REGISTRIES = (
    "MODELS", "BACKBONES", "NECKS", "HEADS", "DETECTORS", "SEGMENTORS", "ATTENTION", "PLUGIN_LAYERS", "TRANSFORMER_LAYER",
    "POSITIONAL_ENCODING", "ROTATED_BACKBONES", "ROTATED_NECKS",
)  # fmt: skip
NAMES: Mapping[str, object] = {
    **dict.fromkeys(_REGISTRIES, MODELS), "NORM_LAYERS": NORMS, "ACTIVATION_LAYERS": ACTIVATIONS, "CONV_LAYERS": CONVS,
    "Registry": Registry, "BaseModule": BaseModule, "ModuleList": ModuleList, "Sequential": Sequential,
    "ModuleDict": nn.ModuleDict, "ConvModule": ConvModule,
    "DepthwiseSeparableConvModule": DepthwiseSeparableConvModule, "Scale": Scale, "DropPath": DropPath, "LayerNorm2d": ChannelNorm,
    "Swish": nn.SiLU, "HSwish": nn.Hardswish, "HSigmoid": nn.Hardsigmoid, "Conv2d": nn.Conv2d, "Linear": nn.Linear,
    "MaxPool2d": nn.MaxPool2d, "ConvTranspose2d": nn.ConvTranspose2d,
    "build_norm_layer": build_norm_layer, "build_activation_layer": ACTIVATIONS.build, "build_conv_layer": CONVS.build,
    "build_dropout": lambda cfg: DROPS.build(cfg) if cfg else nn.Identity(),
    **_INITIALIZERS, "bias_init_with_prob": bias_init_with_prob,
    "trunc_normal_": nn.init.trunc_normal_, "auto_fp16": _unchanged, "force_fp32": _unchanged,
    **dict.fromkeys(("load_checkpoint", "_load_checkpoint", "load_state_dict"), _no_weights), "to_2tuple": deformable.pair,
    "get_root_logger": lambda *args, **kwargs: get_logger(), "print_log": lambda msg, *args, **kwargs: get_logger().info(msg),
    **dict.fromkeys(("ConfigType", "OptConfigType", "MultiConfig", "OptMultiConfig", "ConfigDict"), dict),
}  # fmt: skip
