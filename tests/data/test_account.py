"""Nothing is lost between file and sample without being counted, in any form."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import numpy as np
import pytest
from conftest import write_image
from PIL import Image as PillowImage

from data.config import load_data_config
from data.dataset import DetectionDataset, LoadOptions, build_dataset
from data.formats.faults import write_faults
from data.formats.files import files_below
from data.sources import open_source

BOX = "0 .5 .5 .4 .4\n"


def yolo_set(folder: Path, images: dict[str, str], rows: str = BOX, side: int = 64) -> Path:
    """A YAML of one folder; `images` maps file names to the form that Pillow writes."""
    for kind in ("images", "labels"):
        (folder / kind).mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (side, side, 3), dtype=np.uint8)
    for name, form in images.items():
        PillowImage.fromarray(pixels).save(folder / "images" / name, form)
        (folder / "labels" / name).with_suffix(".txt").write_text(rows)
    file = folder / "d.yaml"
    file.write_text("train: images\nval: images\nnames: [cat]\n")
    return file


def build(file: Path, side: int = 64, **options) -> DetectionDataset:
    return build_dataset(
        load_data_config(file), "train", LoadOptions(imgsz=(side, side), **options)
    )


def test_a_clean_split_is_told_and_is_no_warning(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="yoke"):
        build(yolo_set(tmp_path, {"a.png": "PNG", "b.jpg": "JPEG"}))
    told = "train: files found: 2; images: 2; objects: 2"
    assert [(r.levelno, r.getMessage()) for r in caplog.records] == [(logging.INFO, told)]


def test_every_image_format_that_decodes_is_read_and_other_files_are_counted(tmp_path, caplog):
    names = {"a.jpg": "JPEG", "b.jfif": "JPEG", "c.JPE": "JPEG", "d.tga": "TGA", "e.heic": "PNG"}
    file = yolo_set(tmp_path, {**names, "f.xyz": "PNG", "g.raw": "PNG", "h.raw": "PNG"})
    (tmp_path / "images/notes.txt").write_text("no image, and nobody thinks so")
    (tmp_path / "images/.DS_Store").write_bytes(b"")
    assert len(build(file)) == 5
    assert "files found: 8; images: 5; objects: 5" in caplog.text
    assert "files left out by suffix: 3 (.raw 2, .xyz 1)" in caplog.text
    assert "labels without" not in caplog.text, "their pictures are there, if left out"


def test_a_format_without_decoder_is_unreadable_and_named(tmp_path, caplog):
    file = yolo_set(tmp_path, {"a.jpg": "JPEG"})
    (tmp_path / "images/b.heic").write_bytes(b"\0\0\0\x18ftypheic" + b"\0" * 64)
    (tmp_path / "labels/b.txt").write_text(BOX)
    assert len(build(file)) == 1
    assert "files found: 2; images: 1" in caplog.text
    assert "no decoder for .heic is installed" in caplog.text


@pytest.mark.parametrize("place", ["b.txt", "deep/b.txt"])
def test_labels_without_a_picture_are_counted(tmp_path, caplog, place):
    file = yolo_set(tmp_path, {"a.png": "PNG"})
    (tmp_path / "labels" / place).parent.mkdir(exist_ok=True)
    (tmp_path / "labels" / place).write_text(BOX)
    (tmp_path / "labels/classes.txt").write_text("cat\n")
    dataset = build(file)
    assert "labels without a picture: 1 (the first: " in caplog.text
    assert write_faults(tmp_path / "faults.csv", {"train": dataset.faults}) == 1
    assert place in (tmp_path / "faults.csv").read_text()


def test_a_list_of_some_images_does_not_miss_the_labels_of_the_others(tmp_path, caplog):
    file = yolo_set(tmp_path, {"a.png": "PNG", "b.png": "PNG"})
    (tmp_path / "labels/c.txt").write_text(BOX)
    (tmp_path / "some.txt").write_text("images/a.png\n")
    file.write_text("train: some.txt\nval: images\nnames: [cat]\n")
    build(file)
    assert "labels without a picture: 1 (the first: " in caplog.text and "c.txt" in caplog.text


def test_labels_under_a_suffix_in_capitals_are_read(tmp_path):
    file = yolo_set(tmp_path, {"a.png": "PNG"})
    (tmp_path / "labels/a.txt").rename(tmp_path / "labels/a.TXT")
    assert build(file).labels.tolist() == [0]


def test_pictures_of_one_label_file_and_images_listed_twice_are_counted(tmp_path, caplog):
    file = yolo_set(tmp_path, {"a.png": "PNG", "a.jpg": "JPEG", "b.png": "PNG"})
    (tmp_path / "l.txt").write_text("images/b.png\n./images/b.png\n")
    file.write_text("train: [images, l.txt]\nnames: [cat]\n")
    assert len(build(file)) == 5
    assert "pictures that share a label file: 2 (" in caplog.text
    assert "images listed more than once, taken each time: 1 (" in caplog.text


def test_a_loop_of_links_is_walked_once(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.png").write_bytes(b"")
    os.symlink(tmp_path, tmp_path / "in/up")
    os.symlink(tmp_path / "in", tmp_path / "in/self")
    assert files_below(tmp_path) == [str(tmp_path / "in/a.png")]


# Side of the image, boxes in its pixels, training size, what the account says of them.
SIZES = [
    (1280, [(100 * k, 600, 100 * k + 12, 612) for k in range(1, 7)], 160, "too small to learn, at most 2 pixels at 160x160: 6"),
    (1280, [(600, 600, 617, 617)], 160, ""),
    (640, [(20, 300, 620, 305)], 320, "beyond 100:1, learned only where uncut: 1"),
    (640, [(20, 300, 620, 307)], 640, ""),
]  # fmt: skip


@pytest.mark.parametrize(("side", "boxes", "imgsz", "told"), SIZES)
def test_objects_that_are_hard_at_the_training_size_are_counted(
    tmp_path, caplog, side, boxes, imgsz, told
):
    rows = [
        f"0 {(a + c) / 2 / side} {(b + d) / 2 / side} {(c - a) / side} {(d - b) / side}\n"
        for a, b, c, d in boxes
    ]
    file = yolo_set(tmp_path, {"a.png": "PNG"}, "".join(rows), side)
    dataset = build(file, imgsz, augment=True)
    assert (told in caplog.text) if told else "WARNING" not in caplog.text
    learned = 0 if "too small" in told else len(boxes)
    assert [len(dataset[epoch, 0].labels) for epoch in range(2)] == [learned] * 2


def test_an_object_of_two_classes_is_one_where_classes_are_taken_for_one(tiny, caplog):
    """Of image d the first box gets the other class too."""
    path = tiny / "labels/train/d.txt"
    path.write_text(path.read_text() + "1 " + path.read_text().splitlines()[0][2:] + "\n")
    both, one = build(tiny / "yolo.yaml"), build(tiny / "yolo.yaml", single_cls=True)
    assert both.offsets.tolist() == [0, 2, 3, 3, 7] and one.offsets.tolist() == [0, 2, 3, 3, 6]
    assert "objects of one box in several classes, taken once: 1 (the first: " in caplog.text
    assert len(one.coco_ground_truth()["annotations"]) == 6
    assert one.boxes.tolist() == both.boxes[:6].tolist()


def test_a_split_without_objects_is_a_warning_also_for_validation(tmp_path, caplog):
    build_dataset(
        load_data_config(yolo_set(tmp_path, {"a.png": "PNG"}, "")),
        "val",
        LoadOptions(imgsz=(64, 64)),
    )
    assert "val holds no objects at all" in caplog.text


def test_classes_without_an_object_are_told(tiny, config_of, caplog):
    (tiny / "yolo.yaml").write_text("train: images/train\nnames: [cat, dog, cow]\n")
    with caplog.at_level(logging.INFO, logger="yoke"):
        build(tiny / "yolo.yaml")
    assert "classes without an object: 1 of 3 (cow)" in caplog.text
    assert caplog.records[-1].levelno == logging.INFO


def test_of_two_pictures_of_one_annotation_voc_takes_one_and_counts_the_other(tiny, caplog):
    write_image(tiny / "images/train/a.bmp", 40, 60)
    write_image(tiny / "images/train/z.png", 40, 60)
    dataset = build(tiny / "voc.yaml")
    assert [Path(path).name for path in dataset.paths] == ["a.png", "b.png", "c.png", "d.png"]
    assert "pictures that share a label file: 1 (" in caplog.text and "a.bmp" in caplog.text
    assert "pictures beside them that no annotation names: 1" in caplog.text


@pytest.mark.parametrize("entry", ["nested", "[nested/0, nested/1]"])
def test_voc_folders_in_folders_keep_their_own_images(tiny, entry):
    """Two annotations of one name: each has the picture that stands beside it."""
    for number, name in enumerate("ad"):
        folder = tiny / "nested" / str(number)
        folder.mkdir(parents=True)
        (tiny / f"images/train/{name}.png").rename(folder / "x.png")
        (tiny / f"voc/train/{name}.xml").rename(folder / "x.XML")
    (tiny / "n.yaml").write_text(f"train: {entry}\nformat: voc\nnames: [cat, dog]\n")
    dataset = build(tiny / "n.yaml")
    assert [Path(path).parent.name for path in dataset.paths] == ["0", "1"]
    assert dataset.sizes.tolist() == [[40, 60], [50, 50]] and dataset.offsets.tolist() == [0, 2, 5]


def test_a_coco_file_that_lists_an_image_twice_and_another_not_at_all(tiny, caplog):
    path = tiny / "annotations/train.json"
    document = json.loads(path.read_text())
    document["images"][1]["file_name"] = "a.png"
    path.write_text(json.dumps(document))
    for _ in range(2):  # the second time from the cache
        caplog.clear()
        build(tiny / "coco.yaml")
        assert "images listed more than once, taken each time: 1 (" in caplog.text
        assert "pictures beside them that no annotation names: 1" in caplog.text


def test_files_that_a_source_passes_over_are_counted(tmp_path, caplog):
    for name in ("a.png", "b.jfif", "c.xyz", "d.txt"):
        (tmp_path / name).write_bytes(b"")
    assert len(open_source(tmp_path)) == 2
    assert len(open_source(tmp_path / "*")) == 2
    assert caplog.text.count("--source: files left out by suffix: 1 (.xyz 1)") == 2
