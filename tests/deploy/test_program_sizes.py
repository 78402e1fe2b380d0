"""A program of torch.export is right at sizes where what it was traced at had no coincidences."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_configs import build
from small_configs import with_maps as with_maps
from torch import Tensor, nn
from torch_versions import needs_programs

from benchmarks.settling import settle
from deploy.backends import load_backend
from deploy.exporters.network import ExportOptions, blobs
from deploy.exporters.torch_files import export_pt2
from models.modules.emo import Block
from models.registry import register, unchanged
from models.yolo import DetectionModel
from utils.structures import Decoded

# Windows of 7 x 7 on a map of stride 8: one; one and no padding; several, one way; many.
SIZES = [(1, (32, 32)), (3, (32, 64)), (1, (224, 224)), (2, (64, 448)), (1, (320, 256))]


class Windowed(nn.Module):
    """EMO's window attention on any map."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block(8, 8, 8, head_width=4)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


@pytest.fixture
def model() -> DetectionModel:
    register(unchanged)(Windowed)
    torch.manual_seed(0)
    rows = [*[[-1, 1, "Conv", [8, 3, 2]]] * 3, [-1, 1, "Windowed", []]]
    model = build([*rows, [-1, 1, "Conv", [8, 3, 2]]])
    settle(model, (160, 160))
    return model


@needs_programs
@pytest.mark.parametrize("imgsz", [(32, 32), (160, 160)])
def test_any_number_of_windows(model: DetectionModel, imgsz: tuple[int, int], tmp_path: Path):
    path = export_pt2(model, ExportOptions(imgsz=imgsz, dynamic="all"), tmp_path / "best.pt")
    backend = load_backend(path)
    for number, (batch, size) in enumerate(SIZES):
        images = blobs(batch, size, seed=number)
        found = backend(images)
        assert isinstance(found, Decoded)
        with torch.no_grad():
            expected = model.decode(model(images))
        torch.testing.assert_close(found.boxes, expected.boxes, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(found.scores, expected.scores, rtol=1e-4, atol=1e-6)
