"""A backbone made to measure, and configs of a few rows around it."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch.nn.functional as F
from torch import Tensor, nn

from models import registry
from models.registry import backbone, register
from models.yolo import DetectionModel, build_model
from utils.errors import ConfigError

SIZE = (128, 128)
ALL = [2, 4, 8, 16, 32]


class Maps(nn.Module):
    """A backbone with a map at each of the given strides, 8 channels times its place."""

    def __init__(self, strides: list[int], kind: str = "list", says: dict[str, Any] | None = None):
        super().__init__()
        self.sizes, self.kind = strides, kind
        self.widths = [8 * (place + 1) for place in range(len(strides))]
        self.convs = nn.ModuleList(nn.Conv2d(3, width, 1) for width in self.widths)
        for key, value in {"channels": self.widths, **(says or {})}.items():
            setattr(self, key, value)

    def forward(self, x: Tensor) -> Any:
        maps = [c(F.avg_pool2d(x, s)) for c, s in zip(self.convs, self.sizes, strict=True)]
        if self.kind == "dict":
            return OrderedDict((str(i), m) for i, m in enumerate(maps))
        return maps[0] if self.kind == "tensor" else maps


def config(backbone_rows: list, head: list | None = None, **keys: Any) -> dict[str, Any]:
    """A config that ends in YOLO11's head on the row before it, unless told otherwise."""
    rows = [[[-1], 1, "Detect", ["nc"]]] if head is None else head
    return {"nc": 2, "backbone": backbone_rows, "head": rows, **keys}


def build(backbone_rows: list, head: list | None = None, **keys: Any) -> DetectionModel:
    return build_model(config(backbone_rows, head, **keys), imgsz=SIZE)


def error_of(backbone_rows: list, head: list | None = None, **keys: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        build(backbone_rows, head, **keys)
    return str(caught.value)


def maps_row(strides: list[int], source: Any = -1, **kwargs: Any) -> list:
    return [source, 1, "Maps", [strides, kwargs] if kwargs else [strides]]


CONV = [-1, 1, "Conv", [16]]


@pytest.fixture(autouse=True)
def with_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    """`Maps` may be named in a YAML for the length of a test."""
    monkeypatch.setattr(registry, "_LAYERS", dict(registry._LAYERS))
    register(backbone)(Maps)
