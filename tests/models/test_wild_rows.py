"""Rows that YAMLs of the wild have: how their arguments are read, models of them, names that users give as well."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from small_configs import SIZE, build, config, error_of

from benchmarks.coupling_matrix import CLASSES, train_step
from benchmarks.settling import settle
from deploy.exporters.network import ExportOptions
from deploy.exporters.onnx_file import export_onnx
from deploy.exporters.verify import verify
from models import modules, registry
from models.blocks.cbam import CBAM
from models.blocks.yolov10 import RepVGGDW
from models.registry import Plan, Scaling, keeping_width
from models.reparam import fuse
from models.yolo import build_model


@pytest.mark.parametrize(
    ("args", "plan"),
    [
        ([], [32]),
        ([64], [32]),  # the full width of a row at half width
        ([32], [32]),
        ([64, 7], [32, 7]),
        ([7], [32, 7]),
        ([64, 7, 8], [32, 7, 8]),
    ],
)
def test_a_layer_of_one_width_is_written_with_it_and_without(args: list, plan: list):
    assert keeping_width([32], args, Scaling(0.5)) == Plan(plan, 32)


STEM = [[-1, 1, "Conv", [16, 3, 2]], [-1, 1, "Conv", [32, 3, 2]]]
MIDDLE = [
    [-1, 1, "GhostBottleneck", [32, 3, 1]], [-1, 1, "C3Ghost", [32]], [-1, 2, "C3x", [32]], [-1, 1, "CrossConv", [32, 3]],
    [-1, 1, "BottleneckCSP", [32]], [-1, 1, "C1", [32]], [-1, 1, "C2", [32]], [-1, 1, "MixConv2d", [32, [1, 3]]],
    [-1, 1, "SCDown", [32, 3, 2]], [-1, 1, "C2fCIB", [32, True, True]], [-1, 1, "CIB", [32]], [-1, 1, "RepVGGDW", [32]],
    [-1, 1, "CBAM", [32, 7]], [-1, 1, "ChannelAttention", []], [-1, 1, "SpatialAttention", [7]],
    [-1, 1, "RepConv", [32, 3, 1]], [-1, 1, "ResNetLayer", [32, 8, 2, False, 1]],
    [-1, 1, "C3SPP", [32, [3, 5]]], [-1, 1, "C3TR", [32]], [-1, 1, "TransformerBlock", [32, 4, 1]],
    [-1, 1, "PSA", [32]], [-1, 1, "C2fPSA", [32]], [-1, 1, "ConvTranspose", [32]], [-1, 1, "DWConvTranspose2d", [32, 4, 2, 1]],
    [-1, 1, "Contract", [2]], [-1, 1, "Conv", [32]], [-1, 1, "Expand", [2]], [-1, 1, "Contract", [2]],
    [-1, 1, "CBLinear", [[16, 32]]], [-1, 1, "Index", [32, 1]], [-1, 1, "GhostConv", [32, 3]], [-1, 1, "SPPF", [32, 5]],
]  # fmt: skip


@pytest.mark.parametrize("rows", [MIDDLE[:16], MIDDLE[16:]], ids=["first half", "second half"])
def test_a_model_of_all_of_them_trains_folds_and_exports(rows: list, tmp_path: Path):
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    model = build(STEM + rows, nc=CLASSES)
    assert [row.module for row in model.rows[2:-1]] == [row[2] for row in rows]
    train_step(model, (64, 96))
    settle(model, SIZE)
    fused = copy.deepcopy(model)
    report = fuse(fused)
    assert 0 <= report.difference <= 1e-5
    assert not [
        n for n, m in fused.named_modules() if isinstance(m, RepVGGDW) and m.conv1 is not None
    ]
    options = ExportOptions(imgsz=SIZE, dynamic="all")
    path = export_onnx(fused, options, tmp_path / "wild.pt")
    for case in verify(path, fused, options):
        assert case.relative <= case.limit <= 1e-4


DIALECTS = {
    "ghost": """
nc: 3
scales: {n: [0.33, 0.25, 1024]}
backbone:
  - [-1, 1, Conv, [64, 3, 2]]
  - [-1, 1, GhostConv, [128, 3, 2]]
  - [-1, 3, C3Ghost, [128, True]]
  - [-1, 1, GhostConv, [256, 3, 2]]
  - [-1, 6, C3Ghost, [256, True]]
head:
  - [[2, 4], 1, Detect, [nc]]
""",
    "transformer": """
nc: 3
depth_multiple: 0.33
width_multiple: 0.25
anchors: [[10,13, 16,30, 33,23]]
backbone:
  - [-1, 1, Focus, [64, 3]]
  - [-1, 3, BottleneckCSP, [64]]
  - [-1, 1, Conv, [128, 3, 2]]
  - [-1, 1, SPP, [128, [5, 9, 13]]]
  - [-1, 3, C3TR, [128, False]]
head:
  - [[4], 1, Detect, [nc, anchors]]
""",
    "yolov10": """
nc: 3
scales: {n: [0.33, 0.25, 1024], s: [0.33, 0.50, 1024]}
backbone:
  - [-1, 1, Conv, [64, 3, 2]]
  - [-1, 1, Conv, [128, 3, 2]]
  - [-1, 3, C2f, [128, True]]
  - [-1, 1, SCDown, [512, 3, 2]]
  - [-1, 3, C2fCIB, [512, True, True]]
  - [-1, 1, SPPF, [512, 5]]
  - [-1, 1, PSA, [512]]
head:
  - [-1, 1, nn.Upsample, [None, 2, "nearest"]]
  - [[-1, 2], 1, Concat, [1]]
  - [-1, 3, C2f, [256]]
  - [[9, 6], 1, Detect, [nc]]
""",
    "residual": """
nc: 3
scales: {l: [1.00, 1.00, 1024]}
backbone:
  - [-1, 1, ResNetLayer, [3, 64, 1, True, 1]]
  - [-1, 1, ResNetLayer, [64, 64, 1, False, 3]]
  - [-1, 1, ResNetLayer, [256, 128, 2, False, 4]]
head:
  - [-1, 1, Conv, [64, 1, 1]]
  - [[-1], 1, Detect, [nc]]
""",
}


@pytest.mark.parametrize(
    ("name", "channels", "strides"),
    [
        ("ghost", (32, 64), (4, 8)),
        ("transformer", (32,), (4,)),
        ("yolov10", (64, 128), (4, 8)),
        ("residual", (64,), (8,)),
    ],
)
def test_a_yaml_pasted_from_a_fork_builds_as_it_stands(
    name: str, channels: tuple[int, ...], strides: tuple[int, ...], tmp_path: Path
):
    file = tmp_path / f"{name}.yaml"
    file.write_text(DIALECTS[name])
    with torch.device("meta"):
        model = build_model(file, imgsz=SIZE)
    rows = {row.index: row for row in model.rows}
    assert tuple(rows[index].shape[0][0] for index in model.rows[-1].inputs) == channels
    assert model.strides == strides


def test_the_rows_of_a_residual_network_say_their_own_widths():
    rows = [[-1, 1, "ResNetLayer", [3, 8, 1, True, 1]], [-1, 1, "ResNetLayer", [8, 8, 1, False, 2]]]
    model = build(rows + [[-1, 1, "ResNetLayer", [32, 16, 2, False, 1]]])
    assert [row.shape[0][0] for row in model.rows[:3]] == [8, 32, 64]
    assert model.strides == (8,)
    message = error_of(rows + [[-1, 1, "ResNetLayer", [64, 16, 2, False, 1]]])
    assert "got [64, 16, 2, False, 1], expected [32, width, stride, is_first, blocks]" in message


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ([-1, 1, "Index", [0]], "expected one input with several maps, such as CBLinear's"),
        ([-1, 1, "Expand", [3]], "got 16 channels, expected a multiple of 9"),
        ([-1, 1, "C3TR", [12]], None),  # 16 after rounding
        ([-1, 1, "RepConv", [16, 2]], "got kernel size 2, expected an odd one"),
    ],
)
def test_a_row_that_a_block_cannot_serve_is_one_line(row: list, told: str | None):
    rows = [[-1, 1, "Conv", [16, 3, 2]], row]
    if told is None:
        assert build(rows).rows[1].shape[0][0] == 16
    else:
        assert told in error_of(rows)


def test_a_pasted_class_of_a_common_name_goes_before_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(modules, "_FILES", dict(modules._FILES))
    (tmp_path / "my_cbam.py").write_text(
        "from torch import nn\n\n\nclass CBAM(nn.Module):\n    def __init__(self, c1, reduction=16):\n"
        "        super().__init__()\n        self.only = nn.Conv2d(c1, c1, 1)\n\n"
        "    def forward(self, x):\n        return x * self.only(x).sigmoid()\n"
    )
    rows = [[-1, 1, "Conv", [16, 3, 2]], [-1, 1, "CBAM", [16]]]
    assert isinstance(build(rows).model[1], CBAM)
    mapping = {**config(rows), "imports": str(tmp_path / "my_cbam.py")}
    pasted = build_model(mapping, imgsz=SIZE, allow_code=True).model[1]
    assert not isinstance(pasted, CBAM) and hasattr(pasted, "only")
    assert "CBAM" not in capsys.readouterr().err


def test_offered_names_are_known_to_errors_and_taken_by_no_registration():
    assert registry.find("CBAM") is None
    layer = registry.offered("CBAM")
    assert layer is not None and layer.build is CBAM
    assert "Did you mean 'CBAM'?" in error_of([[-1, 1, "CBAN", []]])
