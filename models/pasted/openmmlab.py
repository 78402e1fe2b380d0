"""Stand-ins for mmcv, mmengine and the registries of mmdet and mmseg, from their documentation (Apache-2.0).

They build the same layers under the same attribute names; weights are initialised as torch does it, pretrained ones are not read
here. SyncBN is an ordinary BatchNorm.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.blocks.layers import ChannelNorm, DropPath
from models.pasted import deformable, initializers
from utils.errors import ConfigError
from utils.logger import get_logger

Config = Mapping[str, Any]


class Registry:
    """Classes by name; what is registered here is registered nowhere else: a YAML names the class itself."""

    def __init__(self, name: str = "models", *args: Any, **kwargs: Any) -> None:
        self.name = name
        self.classes: dict[str, Any] = {}

    def register_module(
        self, name: Any = None, force: bool = False, module: Any = None
    ) -> Callable[[Any], Any]:
        """`@X.register_module()`, with a name or without, or as a call with the class."""
        if callable(name) or module is not None:
            return self._add(module or name, None)
        return lambda build: self._add(build, name)

    register = register_module

    def _add(self, build: Any, name: Any) -> Any:
        names = [name] if isinstance(name, str) else name or [build.__name__]
        self.classes.update(dict.fromkeys(names, build))
        return build

    def get(self, name: str) -> Any:
        """The class called `name`, or None."""
        return self.classes.get(name)

    def build(self, cfg: Config, *args: Any, **kwargs: Any) -> Any:
        """The class that `type` names, called with the other keys."""
        options = {**cfg, **kwargs}
        kind = options.pop("type")
        build = kind if callable(kind) else self.get(kind) or _LAYERS.get(kind)
        if build is None:
            raise _unknown("type", kind, {**self.classes, **_LAYERS})
        return build(*args, **options)


def build_from_cfg(cfg: Config, registry: Registry, default_args: Config | None = None) -> Any:
    """`registry.build` with defaults."""
    return registry.build({**(default_args or {}), **cfg})


def _unknown(what: str, got: Any, known: Iterable[str]) -> ConfigError:
    return ConfigError(
        f"mmcv {what}: got {got!r}, expected one of {', '.join(sorted(known))}. Build the layer with torch.nn instead."
    )


class BaseModule(nn.Module):
    """A module that knows how it is to be initialised; torch's own way is kept."""

    def __init__(self, init_cfg: Any = None) -> None:
        super().__init__()
        self.init_cfg = copy.deepcopy(init_cfg)

    def init_weights(self) -> None:
        """Nothing: weights come by `--weights` and `--backbone-weights`."""


class ModuleList(BaseModule, nn.ModuleList):
    """`nn.ModuleList` with `init_cfg`."""

    def __init__(self, modules: Iterable[nn.Module] | None = None, init_cfg: Any = None) -> None:
        BaseModule.__init__(self, init_cfg)
        nn.ModuleList.__init__(self, modules)


class Sequential(BaseModule, nn.Sequential):
    """`nn.Sequential` with `init_cfg`."""

    def __init__(self, *args: Any, init_cfg: Any = None) -> None:
        BaseModule.__init__(self, init_cfg)
        nn.Sequential.__init__(self, *args)


class Clip(nn.Module):
    """Values cut to [min, max]."""

    def __init__(self, min: float = -1.0, max: float = 1.0) -> None:
        super().__init__()
        self.min, self.max = min, max

    def forward(self, x: Tensor) -> Tensor:
        return x.clamp(self.min, self.max)


class Scale(nn.Module):
    """A factor that is learned."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


_ACTIVATIONS: dict[str, Any] = {
    **{
        name: getattr(nn, name)
        for name in ("ReLU", "LeakyReLU", "PReLU", "RReLU", "ReLU6", "ELU", "Sigmoid", "Tanh", "GELU", "SiLU", "Mish")
    },
    "Swish": nn.SiLU, "HSwish": nn.Hardswish, "HSigmoid": nn.Hardsigmoid, "Clip": Clip, "Clamp": Clip,
}  # fmt: skip
_NORMS: dict[str, tuple[str, Any]] = {
    "BN": ("bn", nn.BatchNorm2d), "BN1d": ("bn", nn.BatchNorm1d), "BN2d": ("bn", nn.BatchNorm2d),
    "BN3d": ("bn", nn.BatchNorm3d), "SyncBN": ("bn", nn.BatchNorm2d), "MMSyncBN": ("bn", nn.BatchNorm2d),
    "GN": ("gn", nn.GroupNorm), "LN": ("ln", nn.LayerNorm), "LN2d": ("ln", ChannelNorm), "IN": ("in", nn.InstanceNorm2d),
    "IN2d": ("in", nn.InstanceNorm2d),
}  # fmt: skip
_CONVS: dict[str, Any] = {
    "Conv": nn.Conv2d, "Conv1d": nn.Conv1d, "Conv2d": nn.Conv2d, "Conv3d": nn.Conv3d, "deconv": nn.ConvTranspose2d,
    "DCN": deformable.DeformConv2dPack, "DCNv2": deformable.ModulatedDeformConv2dPack,
}  # fmt: skip
_WITHOUT_INPLACE = ("Tanh", "PReLU", "Sigmoid", "HSigmoid", "GELU", "Clip", "Clamp")


def build_norm_layer(
    cfg: Config, num_features: int, postfix: int | str = ""
) -> tuple[str, nn.Module]:
    """Name (`bn1`) and norm of `dict(type='BN', requires_grad=True, eps=1e-5)`."""
    options = dict(cfg)
    kind, is_trained = options.pop("type"), options.pop("requires_grad", True)
    if kind not in _NORMS:
        raise _unknown("norm_cfg", kind, _NORMS)
    short, build = _NORMS[kind]
    first = (options.pop("num_groups"), num_features) if kind == "GN" else (num_features,)
    if kind != "GN":
        options.setdefault("eps", 1e-5)
    if kind == "LN2d":
        options.clear()
    layer = build(*first, **options)
    layer.requires_grad_(is_trained)
    return f"{short}{postfix}", layer


def build_activation_layer(cfg: Config) -> nn.Module:
    """`dict(type='ReLU', inplace=True)`."""
    options = dict(cfg)
    kind = options.pop("type")
    if kind not in _ACTIVATIONS:
        raise _unknown("act_cfg", kind, _ACTIVATIONS)
    return _ACTIVATIONS[kind](**options)


def build_conv_layer(cfg: Config | None, *args: Any, **kwargs: Any) -> nn.Module:
    """`dict(type='DCNv2', deform_groups=1)`, None for an ordinary convolution."""
    options = dict(cfg or {})
    kind = options.pop("type", None) or "Conv2d"
    if kind not in _CONVS:
        raise _unknown("conv_cfg", kind, _CONVS)
    return _CONVS[kind](*args, **kwargs, **options)


def build_upsample_layer(cfg: Config, *args: Any, **kwargs: Any) -> nn.Module:
    """`dict(type='nearest', scale_factor=2)`, bilinear or deconv."""
    options = dict(cfg)
    kind = options.pop("type")
    build: Any = nn.ConvTranspose2d if kind == "deconv" else nn.Upsample
    mode = {} if kind == "deconv" else {"mode": kind}
    return build(*args, **{**kwargs, **options, **mode})


def build_dropout(cfg: Config | None, default_args: Any = None) -> nn.Module:
    """`dict(type='DropPath', drop_prob=0.1)` or Dropout; None passes its input on."""
    rate = (cfg or {}).get("drop_prob", 0.0 if not cfg else 0.5)
    if cfg and cfg["type"] == "Dropout":
        return nn.Dropout(rate)
    return DropPath(rate) if rate else nn.Identity()


class ConvModule(nn.Module):
    """Convolution, norm, activation, in the order that `order` says; without a norm the convolution has a bias."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
        bias: bool | str = "auto",
        conv_cfg: Config | None = None,
        norm_cfg: Config | None = None,
        act_cfg: Config | None = {"type": "ReLU"},  # noqa: B006 - never changed
        inplace: bool = True,
        with_spectral_norm: bool = False,
        padding_mode: str = "zeros",
        order: tuple[str, ...] = ("conv", "norm", "act"),
    ) -> None:
        super().__init__()
        self.order, self.with_norm = order, norm_cfg is not None
        self.with_activation = act_cfg is not None
        self.with_bias = not self.with_norm if bias == "auto" else bool(bias)
        mode = {} if padding_mode == "zeros" else {"padding_mode": padding_mode}
        self.conv: Any = build_conv_layer(
            conv_cfg, in_channels, out_channels, kernel_size, stride=stride, padding=padding, dilation=dilation,
            groups=groups, bias=self.with_bias, **mode,
        )  # fmt: skip
        self.norm_name = ""
        if norm_cfg is not None:
            behind = order.index("norm") > order.index("conv")
            self.norm_name, norm = build_norm_layer(
                norm_cfg, out_channels if behind else in_channels
            )
            self.add_module(self.norm_name, norm)
        if act_cfg is not None:
            may = act_cfg["type"] not in (*_WITHOUT_INPLACE, "Swish")
            self.activate = build_activation_layer(
                {"inplace": inplace, **act_cfg} if may else act_cfg
            )

    @property
    def norm(self) -> nn.Module | None:
        """The norm, None where there is none."""
        return getattr(self, self.norm_name) if self.norm_name else None

    def forward(self, x: Tensor, activate: bool = True, norm: bool = True) -> Tensor:
        for step in self.order:
            if step == "conv":
                x = self.conv(x)
            elif step == "norm" and norm and self.norm is not None:
                x = self.norm(x)
            elif step == "act" and activate and self.with_activation:
                x = self.activate(x)
        return x


class DepthwiseSeparableConvModule(nn.Module):
    """A depthwise `ConvModule` and a pointwise one."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        norm_cfg: Config | None = None,
        act_cfg: Config | None = {"type": "ReLU"},  # noqa: B006 - never changed
        **kwargs: Any,
    ) -> None:
        super().__init__()
        own = {
            key: kwargs.pop(key, "default")
            for key in ("dw_norm_cfg", "dw_act_cfg", "pw_norm_cfg", "pw_act_cfg")
        }
        norms = [
            norm_cfg if own[f"{part}_norm_cfg"] == "default" else own[f"{part}_norm_cfg"]
            for part in ("dw", "pw")
        ]
        acts = [
            act_cfg if own[f"{part}_act_cfg"] == "default" else own[f"{part}_act_cfg"]
            for part in ("dw", "pw")
        ]
        self.depthwise_conv = ConvModule(
            in_channels, in_channels, kernel_size, stride, padding, dilation, in_channels,
            norm_cfg=norms[0], act_cfg=acts[0], **kwargs,
        )  # fmt: skip
        self.pointwise_conv = ConvModule(
            in_channels, out_channels, 1, norm_cfg=norms[1], act_cfg=acts[1], **kwargs
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.pointwise_conv(self.depthwise_conv(x))


def _unchanged(*args: Any, **kwargs: Any) -> Any:
    """A decorator, with arguments or without, that leaves the function as it is."""
    is_bare = len(args) == 1 and callable(args[0]) and not kwargs
    return args[0] if is_bare else lambda function: function


def _no_weights(*args: Any, **kwargs: Any) -> Any:
    raise ConfigError(
        f"load_checkpoint: got {args[1:] or kwargs}, expected no weights here. Give them by --backbone-weights FILE."
    )


def _pair_of(x: Any) -> tuple[Any, ...]:
    return tuple(x) if isinstance(x, (list, tuple)) else (x, x)


def make_divisible(
    value: float, divisor: int, min_value: int | None = None, min_ratio: float = 0.9
) -> int:
    """The nearest multiple of `divisor` that is not below `min_ratio` of `value` (MobileNetV2's rule)."""
    nearest = max(min_value or divisor, int(value + divisor / 2) // divisor * divisor)
    return nearest + divisor if nearest < min_ratio * value else nearest


def resize(input: Tensor, *args: Any, warning: bool = True, **kwargs: Any) -> Tensor:
    """`interpolate`, with a flag that is not needed."""
    return functional.interpolate(input, *args, **kwargs)


def print_log(msg: str, *args: Any, **kwargs: Any) -> None:
    """One line on the console."""
    get_logger().info(msg)


class MMLogger:
    """Gives the console's logger."""

    @staticmethod
    def get_current_instance() -> Any:
        return get_logger()


_LAYERS: dict[str, Any] = {
    **_ACTIVATIONS, **_CONVS, **{kind: build for kind, (_, build) in _NORMS.items()}, "DropPath": DropPath,
}  # fmt: skip
_REGISTRIES = (
    *(
        "MODELS",
        "BACKBONES",
        "NECKS",
        "HEADS",
        "DETECTORS",
        "SEGMENTORS",
        "LOSSES",
        "CONV_LAYERS",
        "NORM_LAYERS",
    ),
    *(
        "ACTIVATION_LAYERS",
        "PLUGIN_LAYERS",
        "UPSAMPLE_LAYERS",
        "DROPOUT_LAYERS",
        "ATTENTION",
        "TRANSFORMER_LAYER",
    ),
    *(
        "TRANSFORMER_LAYER_SEQUENCE",
        "FEEDFORWARD_NETWORK",
        "POSITIONAL_ENCODING",
        "MODULES",
        "TASK_UTILS",
    ),
    *("ROTATED_BACKBONES", "ROTATED_NECKS", "SHARED_HEADS", "ROI_EXTRACTORS"),
)
NAMES: Mapping[str, Any] = {
    **{name: Registry(name) for name in _REGISTRIES},
    "Registry": Registry, "build_from_cfg": build_from_cfg, "BaseModule": BaseModule, "ModuleList": ModuleList,
    "Sequential": Sequential, "ModuleDict": nn.ModuleDict, "ConvModule": ConvModule,
    "DepthwiseSeparableConvModule": DepthwiseSeparableConvModule, "Scale": Scale, "Clip": Clip, "DropPath": DropPath,
    "Swish": nn.SiLU, "HSwish": nn.Hardswish, "HSigmoid": nn.Hardsigmoid, "Conv2d": nn.Conv2d, "Linear": nn.Linear,
    "MaxPool2d": nn.MaxPool2d, "ConvTranspose2d": nn.ConvTranspose2d, "LayerNorm2d": ChannelNorm,
    "build_norm_layer": build_norm_layer, "build_activation_layer": build_activation_layer,
    "build_conv_layer": build_conv_layer, "build_upsample_layer": build_upsample_layer, "build_dropout": build_dropout,
    **{name: getattr(initializers, name) for name in initializers.__all__}, "trunc_normal_": nn.init.trunc_normal_,
    "auto_fp16": _unchanged, "force_fp32": _unchanged,
    "load_checkpoint": _no_weights, "_load_checkpoint": _no_weights, "load_state_dict": _no_weights,
    "load_from_local": _no_weights, "to_2tuple": _pair_of, "make_divisible": make_divisible, "resize": resize,
    "get_root_logger": lambda *args, **kwargs: get_logger(), "print_log": print_log, "MMLogger": MMLogger,
    **dict.fromkeys(("ConfigType", "OptConfigType", "MultiConfig", "OptMultiConfig"), Any),
    "ConfigDict": dict, "digit_version": lambda text: tuple(int(p) for p in text.split("+")[0].split(".")[:3]),
    "is_norm": lambda layer: isinstance(layer, (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)),
}  # fmt: skip
