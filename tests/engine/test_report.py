"""The page about a model: what it says, what it leaves in the checkpoint, and who reads that."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import tiny_model

import detect
import val
from deploy.backends import load_backend
from deploy.exporters.network import ExportOptions
from deploy.exporters.onnx_file import export_onnx
from deploy.exporters.torch_files import export_pt, export_torchscript
from deploy.runtimes.metadata import parse_metadata
from engine.assessment import assess
from engine.evaluation import above
from engine.report import LIMIT, write_report
from engine.report_pictures import Source
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.errors import CheckpointError, ConfigError
from utils.metrics import CocoEvaluator, ConfusionMatrix
from utils.structures import Detections
from utils.thresholds import KEY, class_thresholds, keep_thresholds
from utils.visualize import save_image

NAMES = ("cat", "it's <b>", "dog")
CONF = [0.2, 0.5, 0.9]


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A checkpoint of three classes."""
    model = tiny_model("channels")
    content = {"model": model.state_dict(), "config": model.config, "names": list(model.names)}
    save_checkpoint(tmp_path / "tiny.pt", {**content, "imgsz": [64, 96]})
    return tmp_path / "tiny.pt"


def evaluator_of(images: int) -> CocoEvaluator:
    """Objects of three classes; each is found, the cats twice, and half of the dogs as something else."""
    rng = np.random.default_rng(0)
    annotations, found = [], []
    for number in range(1, images + 1):
        corners = rng.uniform(0, 10, (3, 2)) + [[10, 10], [100, 20], [30, 120]]
        boxes = torch.tensor(np.concatenate([corners, corners + 40], 1))
        for label, box in enumerate(boxes.tolist()):
            size = [box[2] - box[0], box[3] - box[1]]
            annotations.append(
                {"image_id": number, "category_id": label + 1, "bbox": [*box[:2], *size]}
            )
        labels = torch.tensor([0, 1, 2 - number % 2, 0])
        scores = torch.tensor(rng.uniform(0.3, 0.9, 4))
        found.append(Detections(torch.cat([boxes, boxes[:1] + 3]), scores, labels))
    categories = [{"id": k + 1, "name": name} for k, name in enumerate(NAMES)]
    truth = {"images": [{"id": n} for n in range(1, images + 1)], "annotations": annotations}
    evaluator = CocoEvaluator({**truth, "categories": categories}, [1, 2, 3], NAMES)
    evaluator.process(range(1, images + 1), found)
    return evaluator


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a report about thirty images of noise, which JPEG packs badly."""
    folder = tmp_path_factory.mktemp("report")
    evaluator, paths = evaluator_of(30), {}
    for number in range(1, 31):
        noise = np.random.default_rng(number).integers(0, 255, (480, 640, 3), dtype=np.uint8)
        paths[number] = str(save_image(folder / f"{number}.jpg", noise))
    found = assess(evaluator, evaluator.evaluate())
    confusion = ConfusionMatrix(3).matrix
    confusion[1, 2] = 15
    told = {"weights": "best.pt", "split": "val"}
    write_report(found, Source(paths), confusion, told, folder)
    return folder


def test_the_page_is_whole_small_and_asks_for_nothing(report: Path):
    html = (report / "report.html").read_text()
    assert len(html.encode()) < LIMIT
    assert "best.pt on val" in html
    assert "it&#39;s &lt;b&gt;" in html and "it's <b>" not in html
    assert not re.findall(r"(?:src|href)=\"(?!data:)|https?://(?!www\.w3\.org)", html)
    assert html.count("<img") >= 20
    assert html.count('class="chart"') == 4
    for told in ("wrong", "labelled dog", "95 % interval", "D-ECE"):
        assert told in html


def test_the_numbers_stand_beside_the_page(report: Path):
    numbers = json.loads((report / "report.json").read_text())
    # Fifteen dogs are taken for the second class; of two boxes on a cat one is a duplicate.
    assert numbers["errors"]["classification"] == 15
    assert numbers["errors"]["duplicate"] == 30
    assert numbers["costs"]["classification"] > 0
    low, high = numbers["map50_95_interval"]
    assert low < numbers["map50_95"] < high
    assert set(numbers["thresholds"]) == set(NAMES)
    assert all(0 < value < 1 for value in numbers["thresholds"].values())


def test_a_measured_checkpoint_has_thresholds_that_detect_uses(
    weights: Path, shared_data: Path, tmp_path: Path, capsys
):
    names = 'names: [cat, "it\'s", dog]'
    data = shared_data.with_name("three.yaml")
    data.write_text(re.sub("names:.*", names, shared_data.read_text()))
    common = ["--weights", str(weights), "--device", "cpu", "--project", str(tmp_path / "r")]
    flags = ["--source", str(shared_data.parent / "images/val"), "--conf-thres", "auto"]
    with pytest.raises(ConfigError, match="got auto, but .*tiny.pt keeps no thresholds"):
        detect.main([*common, *flags])
    flags = [*flags, "--save-txt", "--save-conf", "--nosave"]
    measure = [*common, "--data", str(data), "--workers", "0", "--noplots", "--report"]
    val.main([*measure, "--task", "train"])
    assert KEY not in load_checkpoint(weights)["config"], "only --task val chooses them"
    val.main(measure)
    assert (tmp_path / "r/exp2/report.html").is_file()
    assert len(load_checkpoint(weights)["config"][KEY]) == 3
    keep_thresholds(weights, [1.0, 0.0, 1.0])
    detect.main([*common, *flags])
    rows = [
        line.split()
        for file in (tmp_path / "r").glob("exp*/labels/*.txt")
        for line in file.read_text().splitlines()
    ]
    assert {row[0] for row in rows} == {"1"}


@pytest.mark.parametrize("write", [export_torchscript, export_pt, export_onnx])
def test_exported_files_keep_thresholds(write, tmp_path: Path):
    model = tiny_model("channels")
    model.config[KEY] = CONF
    path = write(model, ExportOptions(imgsz=(64, 96)), tmp_path / "m.pt")
    assert load_backend(path).info.class_conf == tuple(CONF)


def test_a_file_that_lies_about_thresholds_is_refused():
    described = {
        "names": "{0: 'a', 1: 'b'}", "imgsz": "[64, 64]", "stride": "32", "batch": "1", "dynamic": "all",
        "family": "yolo11", "postprocess": "nms", "layout": "channels", "channels": "3", "half": "False",
    }  # fmt: skip
    assert parse_metadata(described, "x").class_conf is None
    for text in ("[0.5]", "[0.5, 2]", "[0.5, 'a']", "half", "[nan, 1]", "[True, 0.5]"):
        with pytest.raises(CheckpointError, match="x: its metadata conf_thres"):
            parse_metadata({**described, KEY: text}, "x")
    with pytest.raises(ConfigError, match="conf_thres: got '0.5', expected 3 numbers"):
        class_thresholds({KEY: 0.5}, 3)


def test_each_class_has_its_own_threshold():
    scores, labels = torch.tensor([0.8, 0.6, 0.3]), torch.tensor([2, 1, 0])
    found = above(Detections(torch.zeros(3, 4), scores, labels), CONF)
    assert found.labels.tolist() == [1, 0]
