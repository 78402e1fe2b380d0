"""Which names stand behind the modules that pasted files import.

Paths are not held against a file: `from ultralytics.nn.modules.conv import C2f` finds `C2f`, wherever it was in the version that
the file was written for.
"""

from __future__ import annotations

import collections.abc
import functools
import importlib
import inspect
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from types import ModuleType
from typing import NamedTuple

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
    rep,
    resnet,
    sampling,
    vit,
    yolov10,
)
from models.pasted import deformable, helpers, openmmlab
from utils.logger import get_logger

Names = Mapping[str, object]

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


def _public(module: ModuleType) -> dict[str, object]:
    return {name: value for name, value in vars(module).items() if not name.startswith("__")}


def _layers() -> Names:
    """Our layers and small functions, and the heads where they are there already."""
    found: dict[str, object] = {"torch": torch, "nn": nn, "F": functional, "math": math}
    wild = (cbam, ghost, rep, resnet, sampling, vit, yolov10)
    for module in (layers, hg, gelan, *wild, csp, common, helpers):
        for name, value in vars(module).items():
            is_code = inspect.isclass(value) or inspect.isfunction(value)
            if is_code and value.__module__ == module.__name__ and not name.startswith("_"):
                found[name] = value
    found |= {name: getattr(transformer, name) for name in ("AIFI", "MLP", "inverse_sigmoid")}
    found |= {"bias_init_with_prob": openmmlab.bias_init_with_prob, "LOGGER": get_logger()}
    registered = (registry.find(name) for name in registry.names())
    heads = (x for x in registered if x and x.build.__module__.startswith("models.heads."))
    return {**{layer.name: layer.build for layer in heads}, **found, **helpers.SAME}


@cache
def _timm(package: str, file: str = "") -> Names:
    """What timm has anywhere in its layers and tools; of one name twice that of `file` or else of `package` is meant.

    Its private files are named as in timm 1.0.31; one that another version lacks adds nothing.
    """
    own = [importlib.import_module(name) for name in ("timm.models", "timm.layers", package)]
    own += [sys.modules[file]] if file in sys.modules else []
    parts = [
        m for key, m in sys.modules.items() if key.startswith(("timm.layers.", "timm.models._"))
    ]
    found: dict[str, object] = {"_assert": torch._assert}
    for module in (*parts, *own):
        found |= _public(module)
    return found


YOLO = Family(_layers)
OTHERS_YOLO = Family(_layers, replaces=True)
MM = Family(lambda: openmmlab.NAMES)
DEFORMABLE = Family(
    lambda: deformable.NAMES,
    cuda=True,
    told="torchvision's deformable convolution runs in place of the CUDA extension",
)
MEASURING = Family(lambda: helpers.MEASURING)
TIMM_LAYERS = Family(lambda: _timm("timm.layers"))

_OLD_TIMM = {
    file: Family(functools.partial(_timm, "timm.models", f"timm.models._{file}"))
    for file in ("helpers", "registry", "factory", "features", "hub", "efficientnet_blocks", "efficientnet_builder")
}  # fmt: skip
_OLD_SIX: Names = {
    "PY3": True, "PY37": True, "inf": math.inf, "nan": math.nan, "int_classes": int, "string_classes": (str, bytes),
    "container_abcs": collections.abc,
}  # fmt: skip
_OLD_NUMPY: Names = {
    "int": int, "float": float, "bool": bool, "object": object, "str": str, "complex": complex, "Inf": math.inf,
    "NaN": math.nan, "infty": math.inf,
}  # fmt: skip
_OLD_TORCHVISION: Names = {
    "Conv2d": nn.Conv2d, "ConvTranspose2d": nn.ConvTranspose2d, "BatchNorm2d": nn.BatchNorm2d,
    "interpolate": functional.interpolate,
}  # fmt: skip
_FAMILIES: dict[str, Family] = {
    "models": YOLO, "utils": YOLO, "ultralytics": OTHERS_YOLO, "yolov5": OTHERS_YOLO,
    **dict.fromkeys(("mmcv", "mmengine", "mmdet", "mmseg", "mmcls", "mmpretrain", "mmpose", "mmrotate", "mmyolo"), MM),
    **dict.fromkeys(("mmcv.ops", "mmdet.ops", "dcn_v2", "DCNv2", "dcnv2", "DCN", "dcn"), DEFORMABLE),
    **dict.fromkeys(("thop", "fvcore", "ptflops", "torchsummary", "torchinfo", "torchstat", "calflops"), MEASURING),
    "timm.models.layers": TIMM_LAYERS,
    **{f"timm.models.{file}": family for file, family in _OLD_TIMM.items()},
    "timm.models.fx_features": Family(functools.partial(_timm, "timm.models", "timm.models._features_fx")),
    "torchvision.models.utils": Family(lambda: _public(torch.hub)),
    "torchvision.ops.misc": Family(lambda: _OLD_TORCHVISION),
    "torch._six": Family(lambda: _OLD_SIX),
    "collections": Family(lambda: _public(collections.abc)),
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
