"""What val.py and detect.py do with flags and classes, in this process, with an untrained model."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from shell import TINY_MODEL

import detect
import val
from deploy import ensemble
from deploy.backends import load_backend
from deploy.exporters.network import ExportOptions
from deploy.exporters.onnx_file import export_onnx
from engine import evaluation, outputs
from engine.datasets import check_classes
from engine.flags import read_flags
from engine.options import Thresholds, ValOptions
from models.postprocess import keep_best
from models.weights.load import load_weights
from models.yolo import build_model
from utils.checkpoint import save_checkpoint
from utils.config import parse_yaml
from utils.errors import ConfigError
from utils.structures import Decoded, Detections, as_one_class


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """An untrained checkpoint of two classes."""
    torch.manual_seed(0)
    model = build_model(parse_yaml(TINY_MODEL, "tiny").data, imgsz=(64, 64))
    content = {"model": model.state_dict(), "config": model.config, "names": ["square", "disc"]}
    save_checkpoint(tmp_path / "two.pt", {**content, "imgsz": [64, 64]})
    return tmp_path / "two.pt"


@pytest.mark.parametrize(("script", "words"), [(val, []), (detect, ["--source", "."])])
def test_files_that_a_model_imports_run_only_with_the_flag(
    script: ModuleType, words: list[str], monkeypatch: pytest.MonkeyPatch
):
    given: list[bool] = []

    def load_backend(*_: Any, allow_code: bool, **__: Any) -> None:
        given.append(allow_code)
        raise ConfigError("enough")

    monkeypatch.setattr(ensemble, "load_backend", load_backend)
    for flags in ([], ["--allow-code"]):
        with pytest.raises(ConfigError, match="enough"):
            script.main([*words, *flags, "--device", "cpu"])
    assert given == [False, True]


def test_a_window_without_a_display_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.platform", "linux")
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match="--view-img: got no display"):
        detect.main(["--source", ".", "--view-img", "--device", "cpu"])


# Names of the model, of the data, what is warned of; None where it is an error.
NAMES_ROWS: list[tuple[tuple[str, ...], tuple[str, ...], str | None]] = [
    (("a", "b"), ("a", "b"), ""),
    (("class0", "class1"), ("a", "b"), ""),
    (("a", "b"), ("class0", "class1"), ""),
    (("a", "b", "c"), ("a", "x", "y"), "class 1 - got 'x', expected 'b' as in w.pt; 2 of 3"),
    (("a", "b", "c"), ("b", "a", "c"), None),
]


@pytest.mark.parametrize(("ours", "theirs", "warning"), NAMES_ROWS)
def test_names_in_another_order_are_refused_and_others_told(
    ours: tuple[str, ...],
    theirs: tuple[str, ...],
    warning: str | None,
    caplog: pytest.LogCaptureFixture,
):
    if warning is None:
        with pytest.raises(ConfigError, match="class 0 - got 'b', expected 'a' .* another order"):
            check_classes(ours, theirs, "w.pt", "d.yaml")
        return
    check_classes(ours, theirs, "w.pt", "d.yaml")
    assert warning in caplog.text and bool(warning) == bool(caplog.records)


def test_one_class_keeps_the_best_score_of_every_box():
    scores = torch.tensor([[[0.1, 0.7], [0.4, 0.2]]])
    decoded = as_one_class(Decoded(torch.zeros(1, 2, 4), scores))
    assert isinstance(decoded, Decoded)
    torch.testing.assert_close(decoded.scores, torch.tensor([[[0.7], [0.4]]]))
    finished = Detections(torch.zeros(2, 4), torch.ones(2), torch.tensor([1, 0]))
    assert as_one_class([finished])[0].labels.tolist() == [0, 0]


def test_single_cls_measures_a_model_of_several_classes(
    weights: Path, shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    words = ["--weights", weights, "--data", shared_data, "--project", tmp_path, "--single-cls"]
    words += ["--device", "cpu", "--workers", 0, "--noplots", "--save-json", "--save-txt"]
    val.main([str(word) for word in words])
    assert capsys.readouterr().out.splitlines()[1].split()[:3] == ["all", "4", "11"]
    rows = json.loads((tmp_path / "exp" / "two_predictions.json").read_text())
    assert rows and {row["category_id"] for row in rows} == {1}
    truth = json.loads((tmp_path / "exp" / "ground_truth.json").read_text())
    files = {image["id"]: image["file_name"] for image in truth["images"]}
    assert len(files) == 4 and len(truth["annotations"]) == 11
    assert all(row["file_name"] == files[row["image_id"]] for row in rows)
    assert {Path(name).name for name in files.values()} == {f"{n}.png" for n in range(4)}
    assert len(list((tmp_path / "exp" / "labels").iterdir())) == 4


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], Thresholds(0.001, 0.6, 300, False)),
        (
            ["--conf-thres", "0.3", "--iou-thres", "0.4", "--max-det", "7", "--agnostic-nms"],
            Thresholds(0.3, 0.4, 7, True),
        ),
    ],
)
def test_val_measures_with_the_thresholds_of_its_flags(
    words: list[str],
    expected: Thresholds,
    weights: Path,
    shared_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    seen = []
    postprocess = evaluation.postprocess

    def look(*args: Any, **kwargs: Any) -> Any:
        seen.append(
            Thresholds(
                *(kwargs[name] for name in ("conf_thres", "iou_thres", "max_det", "agnostic"))
            )
        )
        return postprocess(*args, **kwargs)

    monkeypatch.setattr(evaluation, "postprocess", look)
    given = [
        "--weights",
        str(weights),
        "--data",
        str(shared_data),
        "--project",
        str(tmp_path),
        "--device",
        "cpu",
    ]
    val.main([*given, "--workers", "0", "--noplots", *words])
    assert set(seen) == {expected}


def test_rect_with_a_fixed_size_is_refused():
    backend: Any = SimpleNamespace(dynamic=False, stride=32, imgsz=(64, 64))
    options = read_flags(ValOptions, ["--rect"])
    with pytest.raises(ConfigError, match="--rect: fixed.onnx has a fixed image size"):
        val.validation_of(options, backend, "fixed.onnx", (64, 64), 1)


def test_an_end_to_end_file_says_what_it_has_cut_already(
    weights: Path, capsys: pytest.CaptureFixture[str]
):
    model = load_weights(weights).model
    wanted = ExportOptions(imgsz=(64, 64), end2end=True, conf_thres=0.25, iou_thres=0.5, max_det=50)
    backend = load_backend(export_onnx(model, wanted, weights))
    for conf, highest in (("0.001", 0.25), ("0.9", 0.9)):
        val.tell_thresholds(read_flags(ValOptions, ["--conf-thres", conf]), backend, "m.onnx")
        told = capsys.readouterr().err
        assert "scores above 0.25, overlap up to 0.5, 50 an image at most" in told
        assert f"scores below {highest} are cut" in told
        assert ("Export it with --conf-thres 0.001" in told) == (highest == 0.25)
    val.tell_thresholds(ValOptions(), load_backend(weights), "m.pt")
    assert capsys.readouterr().err == ""


def test_finished_detections_are_cut_by_the_flags():
    scores = torch.tensor([0.9, 0.6, 0.5, 0.2])
    found = Detections(torch.arange(16.0).view(4, 4), scores, torch.tensor([0, 1, 0, 1]))
    for conf, most, left in ((0.0, 300, 4), (0.5, 300, 2), (0.0, 1, 1), (0.95, 300, 0)):
        (kept,) = evaluation.detections_of([found], "nms", Thresholds(conf, 0.6, most))
        assert torch.equal(kept.scores, scores[:left]) and torch.equal(
            kept.boxes, found.boxes[:left]
        )
    assert keep_best(found, 0.0, 300, [1]).scores.tolist() == pytest.approx([0.6, 0.2])


def test_every_fault_of_the_data_is_left_in_a_file(
    weights: Path, small_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    broken = sorted((small_data.parent / "images" / "val").iterdir())[:2]
    for path in broken:
        path.write_bytes(b"no picture")
    words = ["--weights", weights, "--data", small_data, "--project", tmp_path / "runs"]
    val.main([str(word) for word in (*words, "--device", "cpu", "--workers", 0, "--noplots")])
    with (tmp_path / "runs" / "exp" / "faults.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["file"] for row in rows] == [str(path) for path in broken]
    assert {row["split"] for row in rows} == {"val"} and all(row["problem"] for row in rows)
    assert "faults.csv: all 2 faults" in capsys.readouterr().err


def test_a_class_without_objects_has_no_number():
    assert outputs._line("a", 1, 0, (-1.0, 0.5, -1.0, -1.0)).split() == [
        "a",
        "1",
        "0",
        "-",
        "0.5000",
        "-",
        "-",
    ]
