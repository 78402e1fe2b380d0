"""Any backbone under any head: built, trained a step, evaluated, folded, exported."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from torch import Tensor, nn

from benchmarks import coupling_matrix
from benchmarks.children import append_results, read_results, run_chunk
from benchmarks.coupling_matrix import BACKBONES, HEADS, Backbone, check_cell
from models import registry
from models.registry import backbone, register

for _library in ("timm", "onnx", "onnxruntime"):
    pytest.importorskip(_library)
TOLERANCE = 1e-4
SMALL = {
    "yolov5n": Backbone(("EMO_1M", "form=paper")),
    "yolov9-t": Backbone(("test_resnet",)),
    "yolo11n": Backbone(("MobileNetV4ConvSmall", "factor=0.25")),
    "rtdetr-r18": Backbone(("test_convnext",)),
    "dfine-s": Backbone(("test_efficientnet",)),
}


LONG = {"rtdetr-r18", "dfine-s"}  # test_rtdetr.py and test_dfine.py export these


@pytest.mark.parametrize(
    "head", [pytest.param(head, marks=[pytest.mark.slow] * (head in LONG)) for head in SMALL]
)
def test_a_small_backbone_works_under_every_family_of_heads(head: str, tmp_path: Path):
    result = check_cell(SMALL[head], head, tmp_path, (128, 160))
    assert result["status"] == "works", result
    assert result["any_size"] and len(result["cases"]) == 4
    assert 0 < result["params_fused"] < result["params"]
    assert 0 <= result["fuse"] <= 1e-5 and 0 < result["onnx"] <= result["limit"] == TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", BACKBONES)
def test_every_family_of_backbones_works_under_every_head(name: str, head: str, tmp_path: Path):
    if name == "ViT":
        pytest.importorskip("onnxscript")
    result = check_cell(BACKBONES[name], head, tmp_path)
    assert result["status"] == "works", result
    assert result["onnx"] <= result["limit"]


class Forgetful(nn.Module):
    """Maps at strides 8, 16 and 32, and a layer that nothing reads."""

    def __init__(self, fault: str) -> None:
        super().__init__()
        self.strides = [8, 16, 32] if fault != "stride" else [4, 8, 16, 32]
        self.channels = [8] * len(self.strides)
        self.maps = nn.ModuleList(nn.Conv2d(3, 8, s, s) for s in self.strides)
        self.fault = fault
        if fault == "gradient":
            self.unread = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = [conv(x) for conv in self.maps]
        return [m * float("inf") for m in maps] if self.fault == "infinite" else maps


@pytest.mark.parametrize(
    ("fault", "step", "reason"),
    [
        ("gradient", "train", "ValueError: 2 parameters without a gradient: model.0.unread.weight, model.0.unread.bias"),
        ("infinite", "train", "ArithmeticError: losses not finite: "),
        ("unknown", "build", "ConfigError: --backbone: unknown layer 'Forgetfull'"),
    ],
)  # fmt: skip
def test_what_does_not_work_is_told_with_the_step_and_the_reason(
    fault: str, step: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(registry, "_LAYERS", dict(registry._LAYERS))
    register(backbone)(Forgetful)
    name = "Forgetfull" if fault == "unknown" else "Forgetful"
    result = check_cell(Backbone((name, f"fault={fault}")), "yolov5n", tmp_path, (64, 96))
    assert (result["status"], result["step"]) == ("fails", step)
    assert result["reason"].startswith(reason)


def test_stages_that_are_no_backbone_take_the_place_of_one():
    model = coupling_matrix.build(BACKBONES["MobileOne"], "yolov5n", (64, 96))
    modules = [row.module for row in model.rows if row.section == "backbone"]
    assert modules == ["Conv", *["MobileOne"] * 4, "SPPF"]
    assert model.strides == (8, 16, 32)


def run_main(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["coupling_matrix.py", *map(str, words)])
    coupling_matrix.main()


def test_the_report_has_a_line_a_cell_and_the_exit_code_says_whether_all_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    works = {
        "name": "EMO x yolo11n", "status": "works", "seconds": 1.0, "params": 2000, "params_fused": 1000,
        "fuse": 1e-15, "onnx": 2e-6, "limit": 1e-4, "size": [320, 416], "any_size": True,
    }  # fmt: skip
    fails = {"name": "EMO x yolov5n", "status": "fails", "step": "onnx", "reason": "differs", "seconds": 2.0}  # fmt: skip
    out = tmp_path / "deep" / "matrix.jsonl"
    words = ("--report", "--out", out, "--backbones", "EMO", "--heads")
    append_results(out, [works, fails])
    with out.open("a") as file:
        file.write('{"name": "EMO x gelan-t", "sta')  # where an interruption cut it short
    run_main(monkeypatch, *words, "yolo11n", "gelan-t")
    printed = capsys.readouterr().out
    assert (
        "| EMO      | yolo11n | 2,000  | 1,000 | 320x416 | 1.0     | 1.0e-15 | 2.0e-06 | works  |"
        in printed
    )
    assert "1 of 1 cells work; 2 wanted" in printed
    with pytest.raises(SystemExit) as ended:
        run_main(monkeypatch, *words, "yolo11n", "yolov5n")
    assert ended.value.code == 1
    assert "fails: EMO x yolov5n at onnx: differs" in capsys.readouterr().out


CHILD = """
import json, sys, time
for name in sys.argv[1:]:
    if name == "dies": sys.exit("no memory")
    if name == "hangs": time.sleep(60)
    print(json.dumps({"name": name, "status": "works"}), flush=True)
"""


@pytest.mark.parametrize(
    ("names", "expected", "reason"),
    [
        (["a", "b"], ["a", "b"], ""),
        (["a", "dies", "b"], ["a", "dies"], "its process ended with code 1: no memory\n"),
        (["hangs", "b"], ["hangs"], "took too long"),
    ],
)
def test_what_dies_or_hangs_in_a_child_takes_only_itself_along(
    names: list[str], expected: list[str], reason: str, tmp_path: Path
):
    results = run_chunk(
        [sys.executable, "-c", CHILD], names, timeout=1.0 if reason[:4] == "took" else 30
    )
    assert [result["name"] for result in results] == expected
    assert results[-1].get("reason", "") == reason
    append_results(tmp_path / "all.jsonl", results)
    assert read_results(tmp_path / "all.jsonl") == {
        r["name"]: r for r in json.loads(json.dumps(results))
    }
