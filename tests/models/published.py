"""Published numbers that tests compare with, read from a folder beside the project, if any."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from utils.structures import Targets

FOLDER = Path(__file__).parents[3] / "shared" / "golden"
needs_golden = pytest.mark.skipif(not FOLDER.is_dir(), reason="the published numbers are not here")


def golden() -> ModuleType:
    """Fixed weights, fixed image, comparison of sampled outputs."""
    spec = importlib.util.spec_from_file_location("golden", FOLDER / "golden.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read_json(name: str) -> Any:
    return json.loads((FOLDER / name).read_text(encoding="utf-8"))


def layout(model: nn.Module) -> dict[str, list[int]]:
    """State-dict keys and shapes."""
    return {key: list(value.shape) for key, value in model.state_dict().items()}


def fill(model: nn.Module) -> nn.Module:
    """Give `model` the weights that depend only on key and shape."""
    model.load_state_dict(golden().fill(model.state_dict()))
    return model


def targets_in_pixels(rows: Tensor, height: int, width: int) -> Targets:
    """Rows (image, class, centre x, y, width, height), normalised, as targets."""
    size = torch.tensor([width, height])
    centre, extent = rows[:, 2:4] * size, rows[:, 4:6] * size
    boxes = torch.cat((centre - extent / 2, centre + extent / 2), 1)
    return Targets(rows[:, 0].long(), rows[:, 1].long(), boxes)
