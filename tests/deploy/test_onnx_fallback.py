"""Operators that the usual ONNX exporter does not know: torch.export's takes over and says so."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from small_configs import build
from small_configs import with_maps as with_maps
from tiny_models import HEADS, tiny_model
from torch import Tensor, nn
from torch_versions import needs_both

from deploy.exporters import onnx_file
from deploy.exporters.network import ExportOptions, build_network
from deploy.exporters.onnx_file import export_onnx, trace_onnx
from deploy.exporters.verify import verify
from models.registry import register, unchanged
from models.yolo import DetectionModel
from utils.errors import ConfigError
from utils.logger import get_logger

onnx = pytest.importorskip("onnx")
OPTIONS = ExportOptions(imgsz=(64, 96), dynamic="all")
OPERATOR = "aten::_upsample_bicubic2d_aa"


class Placed(nn.Module):
    """Adds a position embedding that is resampled to the map, as vision transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Parameter(torch.linspace(-1, 1, 49).reshape(1, 1, 7, 7).sin())

    def forward(self, x: Tensor) -> Tensor:
        return x + F.interpolate(self.places, size=x.shape[2:], mode="bicubic", antialias=True)


@pytest.fixture
def model() -> DetectionModel:
    register(unchanged)(Placed)
    torch.manual_seed(0)
    rows = [[-1, 1, "Conv", [8, 3, 2]], [-1, 1, "Conv", [8, 3, 2]], [-1, 1, "Placed", []]]
    return build([*rows, [-1, 1, "Conv", [8, 3, 2]]]).eval()


class Told(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@pytest.fixture
def told() -> Told:
    handler = Told()
    get_logger().addHandler(handler)
    yield handler
    get_logger().removeHandler(handler)


def test_the_other_exporter_is_asked_and_torchs_dump_of_the_graph_is_not_shown(
    model: DetectionModel, tmp_path: Path, told: Told, monkeypatch: pytest.MonkeyPatch, capfd
):
    asked: list[str] = []

    def stand_in(network: nn.Module, outputs: list[str], options: ExportOptions, why: str):
        asked.append(why)
        raise ConfigError("stop here")

    monkeypatch.setattr(onnx_file, "_trace_dynamo", stand_in)
    with pytest.raises(ConfigError, match="stop here"):
        export_onnx(model, OPTIONS, tmp_path / "best.pt")
    assert asked == [f"onnx: {OPERATOR} is not in opset 17"]
    assert capfd.readouterr().out == "" and told.lines == []


def test_what_it_needs_is_told_in_one_line(
    model: DetectionModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ConfigError) as caught:
        export_onnx(model, OPTIONS, tmp_path / "best.pt")
    assert str(caught.value) == (
        f"onnx: {OPERATOR} is not in opset 17: torch.export's exporter needs onnxscript. "
        "pip install onnxscript, or export torchscript."
    )


def test_a_torch_without_the_exporter_by_tracing_asks_the_other_and_says_so(
    told: Told, monkeypatch: pytest.MonkeyPatch
):
    made, asked = onnx.ModelProto(), []

    def stand_in(network: nn.Module, outputs: list[str], options: ExportOptions, why: str):
        asked.append((why, options.opset))
        return made

    def of_later_torch(model, args, f=None, *, dynamic_shapes=None, dynamo=True): ...

    monkeypatch.setattr(onnx_file, "_trace_dynamo", stand_in)
    monkeypatch.setattr(torch.onnx, "export", of_later_torch)
    network = build_network(tiny_model("channels"), OPTIONS)
    assert trace_onnx(network, OPTIONS, ["output0"]) is made
    why = f"onnx: torch {torch.__version__} has no exporter by tracing"
    assert asked == [(why, 18)]
    assert told.lines == [f"{why}; written by torch.export's exporter instead, opset 18"]


@needs_both
@pytest.mark.slow
@pytest.mark.parametrize("layout", HEADS)
def test_a_program_has_the_names_of_modules_and_no_paths(layout: str, tmp_path: Path):
    """Names decide what stays float32 with --half."""
    pytest.importorskip("onnxscript")
    model, options = tiny_model(layout), ExportOptions(imgsz=(64, 96), dynamo=True, half=True)
    path = export_onnx(model, options, tmp_path / "best.pt")
    verify(path, model, options)
    nodes = onnx.load(str(path)).graph.node
    assert any(node.name.startswith("/network/model.0/conv/") for node in nodes)
    assert any(node.name.startswith("/decode/") for node in nodes)
    assert str(Path(__file__).resolve().parents[2]).encode() not in path.read_bytes()


@needs_both
@pytest.mark.slow
def test_what_it_writes_gives_the_same_at_other_batches_and_sizes(
    model: DetectionModel, tmp_path: Path, told: Told
):
    pytest.importorskip("onnxscript")
    path = export_onnx(model, OPTIONS, tmp_path / "best.pt")
    assert told.lines == [
        f"onnx: {OPERATOR} is not in opset 17; written by torch.export's exporter instead, opset 18"
    ]
    cases = verify(path, model, OPTIONS)
    assert [case.batch for case in cases] == [1, 2]
    assert {case.limit for case in cases} == {1e-4}
