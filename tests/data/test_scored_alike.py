"""One data set has one mAP in every form; where a COCO file is scored as it stands, that is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import NAMES, coco_document, voc_text, yolo_rows

from data.config import load_data_config
from data.dataset import DetectionDataset, LoadOptions, build_dataset
from engine.evaluation import tell_other_score
from utils.metrics import CocoEvaluator
from utils.structures import Detections

# 64 x 64: an object as it should be, one that the edge cuts by half, one outside, one without
# width, and the first once more.
FAULTY = [(0, 8, 8, 24, 24), (0, 54, 20, 74, 40), (1, 70, 70, 90, 90), (1, 5, 5, 5, 9)]
FAULTY += [(0, 8, 8, 24, 24), (1, 30, 30, 50, 60)]


@pytest.fixture
def faulty(tiny: Path) -> Path:
    """The validation image f with those objects, in the three forms."""
    pictures = {"e": (48, 64, [(1, 16, 12, 48, 36)]), "f": (64, 64, FAULTY)}
    document = coco_document(pictures)
    for row in document["annotations"]:
        row["area"] *= 2  # that of the box, as in the other forms
    (tiny / "annotations/val.json").write_text(json.dumps(document))
    (tiny / "voc/val/f.xml").write_text(voc_text("f", *pictures["f"]))
    rows = yolo_rows(*pictures["f"]).splitlines(keepends=True)
    # A box beyond the edge is no fraction; one that is cut there says the same.
    rows[1:3] = [yolo_rows(64, 64, [(0, 54, 20, 64, 40)])]
    (tiny / "labels/val/f.txt").write_text("".join(rows))
    return tiny


def evaluate(dataset: DetectionDataset) -> CocoEvaluator:
    """With every object of the table found as it was read, and one wrong box more."""
    evaluator = CocoEvaluator(dataset.coco_ground_truth(), dataset.category_ids, dataset.names)
    found = []
    for k in range(len(dataset)):
        rows = slice(int(dataset.offsets[k]), int(dataset.offsets[k + 1]))
        boxes = torch.cat((torch.from_numpy(dataset.boxes[rows]), torch.tensor([[1.0, 1, 60, 4]])))
        labels = torch.cat((torch.from_numpy(dataset.labels[rows]), torch.tensor([0])))
        scores = torch.linspace(0.9, 0.5, len(labels))
        scores[-1] = 0.95
        found.append(Detections(boxes, scores, labels))
    evaluator.process(dataset.image_ids.tolist(), found)
    return evaluator


def test_the_forms_agree_and_the_coco_file_says_by_how_much_it_differs(faulty: Path, capsys):
    scores = {}
    for form in ("yolo", "voc", "coco"):
        dataset = build_dataset(
            load_data_config(faulty / f"{form}.yaml"), "val", LoadOptions(imgsz=(64, 64))
        )
        evaluator = evaluate(dataset)
        scores[form] = evaluator.evaluate()
        told = capsys.readouterr().err
        tell_other_score(dataset, evaluator)
        told = capsys.readouterr().err
        assert bool(told) is (form == "coco"), form
    assert scores["yolo"].map50_95 == pytest.approx(scores["voc"].map50_95, abs=1e-9)
    assert scores["coco"].map50_95 < scores["voc"].map50_95 - 0.1
    assert "coco.yaml: val - 4 objects that were cut or dropped on reading are scored as" in told
    voc = scores["voc"]
    assert f"mAP50 {voc.map50:.4f}, mAP50-95 {voc.map50_95:.4f}" in told


def test_categories_of_one_name_are_one_class_in_training_and_in_the_score(tiny: Path, caplog):
    """The cats of two ids: what a detector finds of either is found."""
    path = tiny / "annotations/train.json"
    document = json.loads(path.read_text())
    document["categories"].append({"id": 9, "name": "cat"})
    cats = [row for row in document["annotations"] if row["category_id"] == 7]
    cats[0]["category_id"] = 9
    path.write_text(json.dumps(document))
    dataset = build_dataset(
        load_data_config(tiny / "coco.yaml"), "train", LoadOptions(imgsz=(64, 64))
    )
    assert dataset.names == NAMES and dataset.category_ids == [7, 3]
    assert dataset.labels.tolist() == [0, 1, 1, 0, 0, 1]
    truth = dataset.coco_ground_truth()
    assert [row["category_id"] for row in truth["annotations"]] == [7, 3, 3, 7, 7, 3]
    assert "categories of one name, taken as one class: 1, the first: " in caplog.text
    assert "category 9: name - got 'cat' again, as that of category 7" in caplog.text
    exact = CocoEvaluator(truth, dataset.category_ids, dataset.names)
    for k, image_id in enumerate(dataset.image_ids.tolist()):
        rows = slice(int(dataset.offsets[k]), int(dataset.offsets[k + 1]))
        labels = torch.from_numpy(dataset.labels[rows])
        boxes = torch.from_numpy(dataset.boxes[rows])
        exact.process([image_id], [Detections(boxes, torch.full((len(labels),), 0.9), labels)])
    assert exact.evaluate().map50_95 == pytest.approx(1.0)
