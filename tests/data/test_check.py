"""The check of a data set finds what is wrong with it, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import coco_document, voc_text, write_image
from planted import SIDE, Planter, picture

import train
from data.check import Report, examine, main
from data.config import load_data_config
from data.doctor.pictures import look_at, mirrored

SIZE = (SIDE, SIDE)


def found_in(report: Report) -> set[tuple[str, str]]:
    """Kind and stem of the file, or name of class or split, of every place."""
    return {
        (finding.kind, Path(place.path).stem)
        for finding in report.findings
        for place in finding.places
    }


def test_thirty_nine_planted_faults_are_found_and_nothing_else(tmp_path):
    planter = Planter(tmp_path)
    planter.plant_files()
    planter.plant_pictures()
    planter.plant_rows()
    names = planter.plant_classes()
    report = examine(load_data_config(planter.yaml(names, test="test.txt")), SIZE)
    assert found_in(report) ^ planter.expected == set()
    assert len(planter.expected) == 39


def forms(folder: Path) -> tuple[dict, dict[str, dict]]:
    """COCO annotations and VOC texts of twenty pictures for training, and as many for validation."""
    documents, texts = {}, {}
    for number, split in enumerate(("train", "val")):
        pictures = {}
        for k in range(20):
            seed = 100 * number + k
            pictures[f"{split}{k}"] = (64, 80, [(0, 4, 5, 24 + k, 30), (1, 45, 20, 70, 60 - k)])
            write_image(folder / split / f"{split}{k}.png", 64, 80, seed)
        documents[split] = coco_document(pictures)
        texts[split] = {name: voc_text(name, *rest) for name, rest in pictures.items()}
    return documents, texts


def examined(folder: Path, suffix: str) -> Report:
    (folder / "d.yaml").write_text(
        f"train: train{suffix}\nval: val{suffix}\nnames: [cat, dog]\nimages: {{train: train, val: val}}"
    )
    return examine(load_data_config(folder / "d.yaml"), SIZE)


def test_faults_of_coco_files_are_found_and_nothing_else(tmp_path):
    documents, _ = forms(tmp_path)
    train, rows = documents["train"], documents["train"]["annotations"]
    train["categories"].append({"id": 9, "name": "cat"})
    train["images"][2]["width"] = 81
    rows[0]["bbox"] = [4, 5, -20, 25]
    rows[3]["bbox"] = [70, 20, 30, 40]
    rows[6]["category_id"] = 44
    rows[8]["image_id"] = 999
    rows[10]["bbox"] = [1, 2, None, 4]
    rows[12]["bbox"], rows[12]["iscrowd"] = [0, 0, 80, 64], 1
    rows.append({**rows[20], "id": 77})
    for split, document in documents.items():
        (tmp_path / f"{split}.json").write_text(json.dumps(document))
    report = examined(tmp_path, ".json")
    kinds = {finding.kind: len(finding.places) for finding in report.findings}
    assert kinds == dict.fromkeys("namesake size empty outside duplicate".split(), 1) | {
        "broken": 3
    }


def test_faults_of_voc_files_are_found_and_nothing_else(tmp_path):
    _, texts = forms(tmp_path)
    own = texts["train"]
    own["train1"] = own["train1"].replace("<width>80<", "<width>60<")
    own["train2"] = own["train2"].replace("<name>cat<", "<name>cow<")
    own["train3"] = own["train3"].replace("</annotation>", "")
    own["train4"] = own["train4"].replace("<xmin>4<", "<xmin>four<")
    own["train5"] = own["train5"].replace("<xmax>70<", "<xmax>40<")
    own["train6"] = own["train6"].replace("<ymax>54<", "<ymax>70<")
    for split, files in texts.items():
        (tmp_path / f"{split}-voc").mkdir()
        for name, text in files.items():
            (tmp_path / f"{split}-voc" / f"{name}.xml").write_text(text)
    report = examined(tmp_path, "-voc")
    kinds = {finding.kind: len(finding.places) for finding in report.findings}
    assert kinds == {"broken": 3, "empty": 1, "outside": 1, "size": 1}


GRID = [f"3 {(k % 18 + 1) / 20} {(k // 18 + 1) / 20} .045 .045\n" for k in range(301)]


@pytest.mark.parametrize(
    ("kind", "split", "images", "rows"),
    [
        ("small", "train", 12, "0 .5 .5 .05 .05\n"),
        ("mostly empty", "train", 43, ""),
        ("unbalanced", "train", 10, "".join(GRID)),
        ("crowded", "val", 1, "".join(GRID)),
        ("unmeasured", "train", 10, "3 .5 .5 .3 .3\n"),
        ("no objects", "test", 2, ""),
    ],
)
def test_a_split_as_a_whole_has_findings(tmp_path, kind, split, images, rows):
    planter = Planter(tmp_path, (42, 9))
    for folder in ("images/test", "labels/test"):
        (tmp_path / folder).mkdir()
    for k in range(images):
        planter.add(split, f"z{k}", rows)
    data = planter.yaml(("a", "b", "c", "d"), test="images/test" if split == "test" else "absent")
    kinds = {finding.kind for finding in examine(load_data_config(data), SIZE).findings}
    assert kind in kinds
    assert ("missing split" in kinds) == (split != "test")


def test_small_objects_are_told_with_the_size_that_shows_them(tmp_path):
    planter = Planter(tmp_path, (36, 9))
    for k in range(12):
        planter.add("train", f"z{k}", "0 .5 .5 .04 .04\n")
    (finding,) = examine(load_data_config(planter.yaml()), SIZE).findings
    assert finding.places[0].problem == "14% of 84 objects are under 8 pixels at 128"
    assert finding.advice.startswith("Train at --imgsz 224, ")  # 8 / (0.04 x 128) of 128 is 200


def test_a_split_that_is_another_one_is_told_once_and_not_picture_by_picture(tmp_path):
    planter = Planter(tmp_path)
    report = examine(load_data_config(planter.yaml(val="images/train")), SIZE)
    assert [finding.kind for finding in report.findings] == ["same split"]


def test_the_command_line_leaves_json_and_pictures_and_ends_with_0_1_or_2(tmp_path, capsys):
    planter = Planter(tmp_path / "data")
    arguments = ["--data", str(planter.yaml()), "--imgsz", "128", "--project", str(tmp_path / "r")]
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 0
    assert "data.yaml: findings: 0, notes: 0" in capsys.readouterr().out
    planter.plant_pictures()
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 1
    told = json.loads((tmp_path / "r/exp2/check.json").read_text())
    assert not told["healthy"]
    assert told["splits"]["val"]["classes"] == {"cat": 6, "dog": 12, "fox": 8}
    leak = next(finding for finding in told["findings"] if finding["kind"] == "leak")
    assert leak["places"][0]["beside"].endswith("train00.png")
    assert cv2.imread(str(tmp_path / "r/exp2/val-leak.jpg")) is not None


def test_a_training_with_the_flag_checks_at_its_own_size_and_ends(tmp_path, tiny_cfg):
    planter = Planter(tmp_path / "data")
    planter.add("train", "z", "0 .5 .5 1 1\n")
    words = ["--data", str(planter.yaml()), "--cfg", str(tiny_cfg), "--imgsz", "96", "--check"]
    with pytest.raises(SystemExit) as end:
        train.main([*words, "--project", str(tmp_path), "--name", "r", "--device", "cpu"])
    assert end.value.code == 1
    told = json.loads((tmp_path / "r/check.json").read_text())
    assert told["imgsz"] == [96, 96]
    assert [finding["kind"] for finding in told["findings"]] == ["whole"]
    assert {path.name for path in (tmp_path / "r").iterdir()} == {"check.json", "train-whole.jpg"}


def test_likeness_outlives_exposure_compression_and_mirroring_and_tells_pictures_apart():
    image = picture(1)
    edges = look_at(image).edges
    packed = cv2.imdecode(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 30])[1], 1)
    assert edges @ edges == pytest.approx(1)
    assert edges @ look_at((image * 0.5).astype(np.uint8)).edges > 0.99
    assert edges @ look_at(packed).edges > 0.95
    turned = look_at(np.ascontiguousarray(image[:, ::-1])).edges
    assert edges @ turned < 0.5
    assert edges @ mirrored(turned[None])[0] > 0.95
    assert max(edges @ look_at(picture(seed)).edges for seed in range(2, 60)) < 0.7
