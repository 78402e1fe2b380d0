"""Which names stand behind the modules that pasted files import.

Paths are not held against a file: `from ultralytics.nn.modules.conv import C2f` finds `C2f`, wherever it was in the version that
the file was written for.
"""

from __future__ import annotations

import collections.abc
import importlib
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from models import common, registry, transformer
from models.blocks import (
    cbam,
    csp,
    gelan,
    ghost,
    hg,
    layers,
    partial,
    resnet,
    sampling,
    vit,
    yolov10,
)
from models.pasted import deformable, detectron, helpers, initializers, openmmlab
from utils.logger import get_logger

Names = Mapping[str, Any]

CUDA_ONLY = frozenset(
    ("mamba_ssm", "selective_scan", "selective_scan_cuda", "selective_scan_cuda_core", "selective_scan_cuda_oflex",
     "selective_scan_cuda_ndstate", "causal_conv1d", "causal_conv1d_cuda", "natten", "flash_attn", "DCNv3", "DCNv4", "dcnv3",
     "dcnv4", "ops_dcnv3", "ops_dcnv4", "MultiScaleDeformableAttention", "spconv", "torch_scatter")
)  # fmt: skip
"""Packages that are a CUDA extension and that nothing of torch or torchvision stands for."""


class Family(NamedTuple):
    """Modules whose names are looked up together.

    Attributes:
        names: what they offer here.
        replaces: a package of that name is not asked, even where one is installed.
        cuda: what it lacks needs a CUDA extension.
        told: what is said once when it is used.
    """

    names: Callable[[], Names]
    replaces: bool = False
    cuda: bool = False
    told: str = ""

    def public(self) -> list[str]:
        """What may be asked for, modules and private names left out."""
        return [
            name
            for name, value in self.names().items()
            if not name.startswith("_") and not isinstance(value, ModuleType)
        ]


def _defined(module: ModuleType) -> dict[str, Any]:
    """Classes and functions that `module` itself defines."""
    own = {k: v for k, v in vars(module).items() if getattr(v, "__module__", "") == module.__name__}
    return {name: value for name, value in own.items() if callable(value) and name[0] != "_"}


@cache
def _layers() -> dict[str, Any]:
    found: dict[str, Any] = {"torch": torch, "nn": nn, "F": functional, "math": math}
    wild = (cbam, ghost, partial, resnet, sampling, vit, yolov10)
    for module in (layers, hg, gelan, *wild, csp, common, helpers):
        found.update(_defined(module))
    found.update({name: getattr(transformer, name) for name in ("AIFI", "MLP", "inverse_sigmoid")})
    found["bias_init_with_prob"] = initializers.bias_init_with_prob
    return {**found, **helpers.SAME, "LOGGER": get_logger()}


def _yolo_names() -> dict[str, Any]:
    """Our layers, and the heads where they are there already."""
    registered = (registry.find(name) for name in registry.names())
    heads = {
        layer.name: layer.build
        for layer in registered
        if layer is not None and layer.build.__module__.startswith("models.heads.")
    }
    return {**heads, **_layers()}


def _modules(*names: str) -> Callable[[], Names]:
    """Everything in the modules called `names`, the first ones first; those that are missing are left out."""

    @cache
    def read() -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name in reversed(names):
            try:
                found.update(_public(importlib.import_module(name)))
            except ModuleNotFoundError:
                continue
        return found

    return read


def _public(module: ModuleType) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if not name.startswith("__")}


@cache
def _timm_layers() -> dict[str, Any]:
    """timm.layers with all of its files: what was imported from a file may not stand in the package."""
    package = importlib.import_module("timm.layers")
    found: dict[str, Any] = {"_assert": torch._assert}
    for name, module in list(sys.modules.items()):
        if name.startswith("timm.layers."):
            found.update(_public(module))
    return {**found, **_public(package)}


def _timm_models(*files: str) -> Callable[[], Names]:
    every = ("_builder", "_manipulate", "_helpers", "_registry", "_factory", "_features", "_hub")
    read = _modules("timm.models", *(f"timm.models.{file}" for file in (*files, *every)))
    return lambda: {**_timm_layers(), **read()}


@cache
def _torchvision_misc() -> dict[str, Any]:
    moved = {name: getattr(nn, name) for name in ("Conv2d", "ConvTranspose2d", "BatchNorm2d")}
    return {**moved, "interpolate": functional.interpolate}


_OLD_SIX: Names = {
    "PY3": True, "PY37": True, "inf": math.inf, "nan": math.nan, "int_classes": int, "string_classes": (str, bytes),
    "container_abcs": collections.abc,
}  # fmt: skip
_OLD_NUMPY: Names = {
    "int": int, "float": float, "bool": bool, "object": object, "str": str, "complex": complex, "Inf": math.inf,
    "NaN": math.nan, "infty": math.inf,
}  # fmt: skip

YOLO = Family(_yolo_names)
OTHERS_YOLO = Family(_yolo_names, replaces=True)
MM = Family(lambda: openmmlab.NAMES)
DETECTRON = Family(lambda: detectron.NAMES)
DEFORMABLE = Family(
    lambda: deformable.NAMES,
    cuda=True,
    told="torchvision's deformable convolution runs in place of the CUDA extension",
)
MEASURING = Family(lambda: helpers.MEASURING)
TIMM_LAYERS = Family(_timm_layers)

_OLD_TIMM = {
    file: Family(_timm_models(f"_{file}"))
    for file in ("helpers", "registry", "factory", "features", "hub", "efficientnet_blocks", "efficientnet_builder")
}  # fmt: skip
_FAMILIES: dict[str, Family] = {
    "models": YOLO, "utils": YOLO, "ultralytics": OTHERS_YOLO, "yolov5": OTHERS_YOLO,
    **dict.fromkeys(("mmcv", "mmengine", "mmdet", "mmseg", "mmcls", "mmpretrain", "mmpose", "mmrotate", "mmyolo"), MM),
    **dict.fromkeys(("mmcv.ops", "mmdet.ops", "dcn_v2", "DCNv2", "dcnv2", "DCN", "dcn"), DEFORMABLE),
    **dict.fromkeys(("detectron2", "fvcore"), DETECTRON),
    **dict.fromkeys(("thop", "ptflops", "torchsummary", "torchinfo", "torchstat", "calflops"), MEASURING),
    "timm.models.layers": TIMM_LAYERS,
    **{f"timm.models.{file}": family for file, family in _OLD_TIMM.items()},
    "timm.models.fx_features": Family(_timm_models("_features_fx")),
    "torchvision.models.utils": Family(_modules("torch.hub")),
    "torchvision.ops.misc": Family(_torchvision_misc),
    "torch._six": Family(lambda: _OLD_SIX),
    "collections": Family(_modules("collections.abc")),
    "numpy": Family(lambda: _OLD_NUMPY),
}  # fmt: skip
_ALONE = ("collections", "numpy")  # what lies below them is not meant
_FILES: dict[str, Family] = {
    **dict.fromkeys(("conv", "block", "head", "modules", "common", "experimental", "yolo", "tasks", "transformer", "utils",
                     "activation", "torch_utils", "general", "ops", "tal", "metrics", "loss", "nn"), YOLO),
    **dict.fromkeys(("dcn_v2", "DCNv2", "dcnv2", "DCN"), DEFORMABLE),
    **_OLD_TIMM, **{f"_{file}": family for file, family in _OLD_TIMM.items()},
    "layers": TIMM_LAYERS, "_builder": _OLD_TIMM["helpers"], "_manipulate": _OLD_TIMM["helpers"], "weight_init": MM,
}  # fmt: skip
"""Files of those projects that a relative import names: `from .conv import Conv`, `from ..utils.tal import dist2bbox`."""


def family_of(module: str, level: int) -> Family | None:
    """The family that `module` belongs to, None for most.

    Args:
        module: its absolute name, or as much of it as is known.
        level: number of dots that it was imported with.
    """
    path: Sequence[str] = module.split(".")
    if level or path[0] in ("models", "ultralytics"):
        inner = next((_FILES[part] for part in reversed(path) if part in _FILES), None)
        if level or inner is DEFORMABLE:
            return inner
    if path[0] in _ALONE and len(path) > 1:
        return None
    ends = range(len(path), 0, -1)
    return next((f for end in ends if (f := _FAMILIES.get(".".join(path[:end])))), None)
