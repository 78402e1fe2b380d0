"""Data YAMLs and folders are recognised; mistakes in them are named, all at once."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from data.config import load_data_config
from data.formats.faults import LabelError
from data.label_cache import load_table
from utils.errors import DatasetError


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_names_may_be_a_list_a_mapping_or_a_number(tmp_path):
    head = "train: t\nval: v\n"
    rows = {
        "names: [a, b]": ("a", "b"),
        "names: {1: b, 0: a}": ("a", "b"),
        "nc: 2": ("class0", "class1"),
    }
    for text, names in rows.items():
        assert load_data_config(write(tmp_path / "d.yaml", head + text)).names == names


@pytest.mark.parametrize("name", ["", " "])
def test_no_name_is_not_the_current_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "data.yaml", "train: t\nval: v\nnc: 1\n")
    with pytest.raises(DatasetError, match="--data: got nothing"):
        load_data_config(name)


def test_path_is_relative_to_the_yaml_and_defaults_to_its_folder(tmp_path):
    (tmp_path / "there").mkdir()
    for text, expected in {
        "": tmp_path,
        "path: .\n": tmp_path,
        "path: there\n": tmp_path / "there",
        "path: /abs\n": Path("/abs"),
    }.items():
        file = write(tmp_path / "d.yaml", f"{text}train: images/train\nval: x.txt\nnc: 1\n")
        config = load_data_config(file)
        assert config.path == expected
        assert config.splits["train"] == (expected / "images/train",)


# YAML text, every word that the message must hold.
PROBLEM_ROWS = [
    ("names: [a]\n", ["no split found"]),
    ("train: t\nnames: [a, b]\nnc: 3\n", ["nc - got 3, expected 2"]),
    ("train: t\nnames: {0: a, 2: b}\n", ["names - got keys [0, 2], expected 0 to 1"]),
    ("train: t\nnames: [a, a]\n", ["names - got 'a' twice"]),
    ("train: t\nnames: [a, '']\n", ["names - got '', expected text"]),
    ("train: t\nnames: [a, [b]]\n", ["names - got ['b'], expected text"]),
    ('train: t\nnames: ["a\\e[31m"]\n', ["names - got 'a\\x1b[31m', expected text"]),
    ("train: 5\nnames: [a]\n", ["train - got 5, expected a path"]),
    ("train: t\nnames: 7\nformat: xml\n", ["names - got 7", "format - got 'xml'"]),
    ("train: t\nnames: [a]\nsources: [{to: x}]\n", ["sources[0]"]),
    ("train: t.json\nval: ImageSets/Main/v.txt\nnames: [a]\n", ["several forms", "coco", "voc"]),
    ("train: t\nval: v\n", ["does not exist"]),
    ("- a\n", ["got a list"]),
    ("a: [\n", ["bad.yaml:2: not valid YAML"]),
    ("names: [a]\nnames: [b]\n", ["bad.yaml:2: key 'names' stands twice"]),
    ("train: t\nnc: true\n", ["nc - got True, expected a number of classes"]),
    ("train: t\nnc: 1000000000\n", ["nc - got 1000000000, expected a number of classes, 1 to"]),
    ("train: t\nnc: 1\none_based: no\n", ["one_based - got 'no', expected true or false"]),
    ("train: t\nnc: 1\nwhite: bright\n", ["white: got 'bright', expected the value of white"]),
    ("train: t\nnc: 1\nwhite: 0\n", ["white: got '0', expected the value of white"]),
    ("train: t\nnc: 1\nchannels: 4\n", ["channels - got 4, expected 3. Images are read as RGB"]),
    ("train: t\nnc: 1\nkpt_shape: 17\n", ["kpt_shape - got 17, expected the number of keypoints"]),
    ("train: t\nnc: 1\nkpt_shape: [4, 5]\n", ["kpt_shape - got [4, 5]"]),
    ("train: t\nnc: 1\nimages: {trian: x}\n", ["images - got 'trian'", "Did you mean 'train'?"]),
    ("train: t\nnc: 1\nsources: 5\n", ["sources - got 5, expected a list"]),
    ("train: t\nnc: 1\nsources: [{url: x, size: big}]\n", ["sources[0] - got"]),
    (f"train: t\nnc: 1\npath: {'x/' * 9000}\n", ["path - got 'x/x", "expected a folder"]),
    ('train: "a\\0b"\nnc: 1\n', ["train - got 'a\\x00b', expected a path"]),
    (f"train: t\nnc: 1\nimages: {'x' * 300}\n", ["images - got", "expected a folder"]),
    (f"train: {'x' * 9000}\nnc: 1\n", ["train - got 'xxx", "expected a path or a list of paths"]),
]


@pytest.mark.parametrize(("text", "words"), PROBLEM_ROWS)
def test_problems_of_a_yaml_are_named_together(tmp_path, text, words):
    with pytest.raises(DatasetError) as caught:
        load_data_config(write(tmp_path / "bad.yaml", text))
    for word in ["bad.yaml", *words]:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_names_are_text_as_it_is_written(tmp_path):
    names = "[02146, 1.10, 1e3, no, true, 0x1F, 2024-01-02, '010', null]"
    for text in (
        names,
        "{0: 02146, 1: 1.10, 2: 1e3, 3: no, 4: true, 5: 0x1F, 6: 2024-01-02, 7: 010, 8: null}",
    ):
        config = load_data_config(write(tmp_path / "d.yaml", f"train: t\nnames: {text}\n"))
        assert config.names == (
            *("02146", "1.10", "1e3", "no", "true", "0x1F", "2024-01-02", "010", "null"),
        )


def test_names_of_scripts_that_join_their_letters_are_text(tmp_path):
    name = "\u0645\u06cc\u200c\u0634\u0648\u062f"
    assert load_data_config(write(tmp_path / "d.yaml", f"train: t\nnames: [{name}]\n")).names == (
        name,
    )


def test_other_values_are_read_as_in_model_yamls_and_recipes(tmp_path):
    text = "train: t\nnc: 010\none_based: true\nwhite: 4095\nkpt_shape: [4, 2]\n"
    config = load_data_config(write(tmp_path / "d.yaml", text))
    assert (len(config.names), config.one_based, config.white) == (10, True, 4095.0)
    assert config.keypoints == (4, 2)


def test_unknown_keys_are_told_with_the_nearest_known_one(tmp_path, caplog):
    text = "train: t\nvla: v\nnc: 1\nroboflow: {workspace: x}\n"
    load_data_config(write(tmp_path / "d.yaml", text))
    assert "unknown key 'vla'. Did you mean 'val'? 'roboflow'." in caplog.text
    caplog.clear()
    load_data_config(write(tmp_path / "d.yaml", "path: .\nvalid: v\nnc: 1\nchannels: 3\n"))
    assert "WARNING" not in caplog.text


def test_long_values_in_a_message_are_cut_short(tmp_path):
    long = "[[[[[x]]]], " + "[x, x], " * 1000 + "x]"
    text = f"train: {long}\nnc: {long}\npath: {long}\nformat: {'y' * 9000}\nsources: [{long}]\n"
    with pytest.raises(DatasetError) as caught:
        load_data_config(write(tmp_path / "d.yaml", text))
    told = str(caught.value)
    assert len(told) < 900 and "train - got [[[[...]]], ['x', 'x']," in told


def test_an_unknown_file_is_answered_with_the_nearest_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DatasetError, match=r"Did you mean 'shapes.yaml'\?"):
        load_data_config("shaps.yaml")


@pytest.mark.parametrize(
    ("name", "form", "classes"),
    [("coco.yaml", "coco", 80), ("VOC.yaml", "voc", 20), ("bccd.yaml", "voc", 3)],
)
def test_the_data_sets_that_can_be_fetched_are_described(
    tmp_path, monkeypatch, name, form, classes
):
    monkeypatch.chdir(tmp_path)
    config = load_data_config(name)
    assert config.format == form and len(config.names) == classes
    assert config.sources and all(source.url.startswith("http") for source in config.sources)
    if not config.path.exists():
        with pytest.raises(DatasetError, match="Pass --download to fetch"):
            config.entries("train")


def test_a_download_script_is_kept_as_text_and_never_run(tmp_path):
    script = "download: |\n  import os\n  os.system('touch ran')\n"
    file = write(tmp_path / "d.yaml", f"train: none\nval: none\nnames: [a]\n{script}")
    config = load_data_config(file)
    assert config.script.startswith("import os")
    with pytest.raises(DatasetError, match="never run here"):
        config.entries("train")
    assert not (tmp_path / "ran").exists()


def test_the_name_valid_stands_for_val(tiny):
    file = write(tiny / "d.yaml", "train: images/train\nvalid: images/val\nnames: [cat, dog]\n")
    assert load_data_config(file).splits["val"] == (tiny / "images/val",)


def test_names_are_taken_from_coco_and_voc_files(tiny):
    coco = write(tiny / "c.yaml", "train: annotations/train.json\nval: annotations/val.json\n")
    voc = write(tiny / "v.yaml", "train: voc/train\nval: voc/val\n")
    assert load_data_config(coco).names == ("dog", "cat"), "in the order of their ids, 3 and 7"
    assert load_data_config(voc).names == ("cat", "dog")


def test_a_category_that_only_groups_others_is_no_class(tiny):
    for split in ("train", "val"):
        path = tiny / "annotations" / f"{split}.json"
        document = json.loads(path.read_text())
        for row in document["categories"]:
            row["supercategory"] = "animals"
        document["categories"].insert(0, {"id": 0, "name": "animals", "supercategory": "none"})
        path.write_text(json.dumps(document))
    file = write(tiny / "c.yaml", "train: annotations/train.json\nval: annotations/val.json\n")
    assert load_data_config(file).names == ("dog", "cat")


def test_image_folders_may_be_named(tiny):
    (tiny / "images").rename(tiny / "elsewhere")
    text = "train: annotations/train.json\nval: annotations/val.json\n"
    with pytest.raises(DatasetError, match="Name the folder in the data YAML"):
        load_table(load_data_config(write(tiny / "c.yaml", text)), "train")
    text += "images: {train: elsewhere/train, val: elsewhere/val}\n"
    assert len(load_table(load_data_config(write(tiny / "c.yaml", text)), "train")) == 4


def only(tiny: Path, *kept: str) -> None:
    for path in tiny.iterdir():
        if path.name not in kept:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def test_a_folder_with_a_yaml_is_read_through_it(tiny):
    only(tiny, "images", "labels", "yolo.yaml")
    assert load_data_config(tiny).file == tiny / "yolo.yaml"


def test_a_yolo_folder_is_recognised(tiny):
    only(tiny, "images", "labels")
    (tiny / "classes.txt").write_text("cat\ndog\n")
    config = load_data_config(tiny)
    assert (config.format, config.names) == ("yolo", ("cat", "dog"))
    assert len(load_table(config, "val")) == 2


def test_a_folder_of_one_split_is_trained_and_scored_on_the_same(tiny, caplog):
    only(tiny, "images", "labels")
    (tiny / "classes.txt").write_text("cat\ndog\n")
    for kind in ("images", "labels"):
        for file in (tiny / kind / "train").iterdir():
            file.rename(tiny / kind / file.name)
        shutil.rmtree(tiny / kind / "train")
        shutil.rmtree(tiny / kind / "val")
    config = load_data_config(tiny)
    assert config.splits["train"] == config.splits["val"] == (tiny / "images",)
    assert "no val split of its own" in caplog.text


def test_a_coco_folder_is_recognised(tiny):
    only(tiny, "images", "annotations")
    for split in ("train", "val"):
        (tiny / "annotations" / f"{split}.json").rename(
            tiny / "annotations" / f"instances_{split}2017.json"
        )
        (tiny / "images" / split).rename(tiny / f"{split}2017")
    config = load_data_config(tiny)
    assert (config.format, config.names) == ("coco", ("dog", "cat"))
    assert len(load_table(config, "train")) == 4


def test_an_export_with_coco_files_beside_the_images_is_recognised(tiny):
    for split, folder in (("train", "train"), ("val", "valid")):
        (tiny / "images" / split).rename(tiny / folder)
        (tiny / "annotations" / f"{split}.json").rename(tiny / folder / "_annotations.coco.json")
    only(tiny, "train", "valid")
    config = load_data_config(tiny)
    assert config.format == "coco"
    assert [len(load_table(config, split)) for split in ("train", "val")] == [4, 2]


def test_an_export_with_yolo_folders_inside_the_splits_is_recognised(tiny):
    for split, folder in (("train", "train"), ("val", "valid")):
        (tiny / folder).mkdir()
        (tiny / "images" / split).rename(tiny / folder / "images")
        (tiny / "labels" / split).rename(tiny / folder / "labels")
    only(tiny, "train", "valid")
    write(
        tiny / "data.yaml",
        "train: ../train/images\nval: ../valid/images\nnc: 2\nnames: [cat, dog]\n",
    )
    config = load_data_config(tiny)
    assert config.format == "yolo"
    assert [len(load_table(config, split)) for split in ("train", "val")] == [4, 2]


def test_an_export_with_xml_beside_the_images_is_recognised(tiny):
    for split, folder in (("train", "train"), ("val", "valid")):
        (tiny / "voc" / split).rename(tiny / folder)
        for image in (tiny / "images" / split).iterdir():
            image.rename(tiny / folder / image.name)
    only(tiny, "train", "valid")
    config = load_data_config(tiny)
    assert (config.format, config.names) == ("voc", ("cat", "dog"))
    assert len(load_table(config, "train").labels) == 6


def test_an_empty_folder_is_no_data_set(tmp_path):
    with pytest.raises(DatasetError, match="no split found"):
        load_data_config(tmp_path)


# Row behind `kpt_shape: [4, 2]`, its box in fractions (centre and size), or what is wrong.
KEYPOINTS = " .3 .3 .7 .3 .7 .7 .3 .7"
KEYPOINT_ROWS = [
    (f"0 .5 .5 .4 .2{KEYPOINTS}", (0.5, 0.5, 0.4, 0.2)),
    ("0 .5 .5 .4 .2", (0.5, 0.5, 0.4, 0.2)),
    ("0 .5 .5 .4 .2 0 0 0 0 0 0 -1 9", (0.5, 0.5, 0.4, 0.2)),
    ("0 .1 .1 .9 .1 .9 .9", "got 7 columns, expected 5 (a box) or 13 (with the keypoints of"),
]


@pytest.mark.parametrize(("row", "expected"), KEYPOINT_ROWS)
def test_rows_with_keypoints_are_boxes_where_the_yaml_says_so(tiny, row, expected):
    (tiny / "labels/val/f.txt").write_text(row + "\n")
    text = "train: images/train\nval: images/val\nnames: [cat, dog]\nkpt_shape: [4, 2]\n"
    (tiny / "d.yaml").write_text(text)
    if isinstance(expected, str):
        with pytest.raises(LabelError, match=re.escape(expected)):
            load_table(load_data_config(tiny / "d.yaml"), "val")
        return
    left, top, right, bottom = load_table(load_data_config(tiny / "d.yaml"), "val").boxes[-1] / 64
    found = ((left + right) / 2, (top + bottom) / 2, right - left, bottom - top)
    assert found == pytest.approx(expected, abs=1e-5)
