"""Three forms of one data set agree; faults are found, named and counted."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image as PillowImage

from data.config import load_data_config
from data.formats.faults import Fault, LabelError, raise_if_fatal, summarise
from data.formats.table import Texts, image_ids_from_names
from data.formats.yolo import label_path
from data.ground_truth import coco_ground_truth
from data.label_cache import load_table
from utils.errors import DatasetError

BCCD = Path(__file__).resolve().parents[3] / "shared" / "data" / "bccd"


def edit_json(path: Path, change) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


@pytest.mark.parametrize("split", ["train", "val"])
def test_the_three_forms_give_the_same_boxes(config_of, split):
    yolo, coco, voc = (load_table(config_of(form), split) for form in ("yolo", "coco", "voc"))
    for other in (coco, voc):
        assert list(other.paths) == list(yolo.paths)
        assert other.sizes.tolist() == yolo.sizes.tolist()
        assert other.offsets.tolist() == yolo.offsets.tolist()
        assert other.labels.tolist() == yolo.labels.tolist()
        np.testing.assert_allclose(other.boxes, yolo.boxes, atol=1e-4)
    assert not yolo.faults and not coco.faults and not voc.faults


def test_boxes_are_pixels_of_the_image(config_of):
    table = load_table(config_of("yolo"), "train")
    assert table.sizes.tolist() == [[40, 60], [64, 48], [32, 32], [50, 50]]
    assert table.offsets.tolist() == [0, 2, 3, 3, 6]
    assert table.labels.tolist() == [0, 1, 1, 0, 0, 1]
    np.testing.assert_allclose(table.boxes[1], [30, 20, 60, 40], atol=1e-4)


@pytest.mark.skipif(not BCCD.is_dir(), reason="the BCCD data is not beside this project")
def test_bccd_gives_the_same_boxes_in_three_forms(tmp_path):
    forms = {"coco": "annotations/{}.json", "voc": "voc/{}"}
    configs = [load_data_config(BCCD)]
    for form, pattern in forms.items():
        splits = "".join(f"{s}: {pattern.format(s)}\n" for s in ("train", "val", "test"))
        (tmp_path / f"{form}.yaml").write_text(
            f"path: {BCCD}\n{splits}names: [RBC, WBC, Platelets]\n"
        )
        configs.append(load_data_config(tmp_path / f"{form}.yaml"))
    assert [config.format for config in configs] == ["yolo", "coco", "voc"]
    for split, images, objects in (("train", 205, 2804), ("val", 87, 1137), ("test", 72, 945)):
        yolo, coco, voc = (load_table(config, split) for config in configs)
        assert len(yolo) == images and len(yolo.labels) == objects
        for other in (coco, voc):
            assert list(other.paths) == list(yolo.paths)
            assert (other.offsets == yolo.offsets).all() and (other.labels == yolo.labels).all()
            # YOLO text has six decimals of 640 pixels.
            assert np.abs(other.boxes - yolo.boxes).max() < 1e-3


# Path of an image -> path of its labels.
PATH_ROWS = [
    ("/d/images/train/a.jpg", "/d/labels/train/a.txt"),
    ("/d/train/images/a.b.png", "/d/train/labels/a.b.txt"),
    ("/images/x/images/a.jpg", "/images/x/labels/a.txt"),
    ("/d/pictures/a.jpg", "/d/pictures/a.txt"),
    ("/d/images2/a.jpg", "/d/images2/a.txt"),
]


@pytest.mark.parametrize(("image", "label"), PATH_ROWS)
def test_labels_stand_where_the_path_rule_says(image, label):
    assert label_path(image) == label


def test_polygons_become_the_boxes_around_them(tiny, config_of):
    (tiny / "labels/train/a.txt").write_text("1 0.1 0.2 0.5 0.1 0.4 0.6\n0 .5 .5 .2 .2\n")
    table = load_table(config_of("yolo"), "train")
    assert table.labels[:2].tolist() == [1, 0]
    np.testing.assert_allclose(table.boxes[0], [6, 4, 30, 24], atol=1e-4)


# Label text (of an image 40 high, 60 wide), what the message must say.
FATAL_ROWS = [
    ("0 .5 .5 .1 .1\n2 .5 .5 .1 .1\n", "a.txt line 2: class id - got 2, expected 0 to 1 (2 names)"),
    ("-1 .5 .5 .1 .1\n", "line 1: class id - got -1, expected 0 to 1"),
    ("0.5 .5 .5 .1 .1\n", "line 1: class id - got 0.5, expected 0 to 1"),
    ("nan .5 .5 .1 .1\n", "line 1: class id - got nan"),
    ("cat .5 .5 .1 .1\n", "line 1: got 'cat', expected a number"),
    ("0 .5 .5 .1\n", "line 1: got 4 columns, expected 5 (a box) or 7, 9"),
    ("0 .5 .5 .1 .1 .9\n", "line 1: got 6 columns, expected 5"),
    ("\n\n0 300 20 10 10\n", "line 3: got 300, expected fractions of the image, 0 to 1"),
    ("0 .5 nan .1 .1\n", "line 1: got nan, expected fractions"),
]


@pytest.mark.parametrize(("text", "message"), FATAL_ROWS)
def test_a_faulty_row_stops_the_run_with_file_line_got_and_expected(tiny, config_of, text, message):
    (tiny / "labels/train/a.txt").write_text(text)
    with pytest.raises(DatasetError) as caught:
        load_table(config_of("yolo"), "train")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value) and "yolo.yaml" in str(caught.value)


def test_all_faults_of_a_split_are_reported_together_and_counted(tiny, config_of):
    (tiny / "labels/train/a.txt").write_text("9 .5 .5 .1 .1\n" * 4)
    (tiny / "labels/train/b.txt").write_text("x .5 .5 .1 .1\n8 .5 .5 .1 .1\n")
    (tiny / "labels/train/d.txt").write_text("7 .5 .5 .1 .1\n")
    with pytest.raises(LabelError) as caught:
        load_table(config_of("yolo"), "train")
    assert len(caught.value.faults) == 7
    assert "a.txt line 4" in str(caught.value) and "b.txt line 1" in str(caught.value)
    assert "and 2 further faults in 2 files" in str(caught.value)


# Label text, kind of the fault, boxes that remain of it.
MENDED_ROWS = [
    ("0 .05 .5 .2 .2\n", "outside", [[0, 16, 9, 24]]),
    ("0 .5 .5 0 .2\n", "empty", []),
    ("0 .5 .5 .2 .2\n0 .5 .5 .2 .2\n", "duplicate", [[24, 16, 36, 24]]),
    ("0 1.005 .5 .001 .2\n", "away", []),
]


@pytest.mark.parametrize(("text", "kind", "boxes"), MENDED_ROWS)
def test_small_faults_are_mended_and_counted(tiny, config_of, caplog, text, kind, boxes):
    (tiny / "labels/train/a.txt").write_text(text)
    table = load_table(config_of("yolo"), "train")
    assert [fault.kind for fault in table.faults] == [kind]
    np.testing.assert_allclose(
        table.boxes[: table.offsets[1]], np.reshape(boxes, (-1, 4)), atol=1e-4
    )
    assert ": 1, the first:" in caplog.text and "a.txt line" in caplog.text


def test_the_same_box_with_another_class_is_no_repetition(tiny, config_of):
    (tiny / "labels/train/a.txt").write_text("0 .5 .5 .2 .2\n1 .5 .5 .2 .2\n")
    assert load_table(config_of("yolo"), "train").labels[:2].tolist() == [0, 1]


def test_a_missing_label_file_means_background(tiny, config_of, caplog):
    (tiny / "labels/train/a.txt").unlink()
    table = load_table(config_of("yolo"), "train")
    assert len(table) == 4 and table.offsets.tolist() == [0, 0, 1, 1, 4]
    assert "a.txt" not in caplog.text, "background is no fault"
    assert [fault.kind for fault in table.faults] == ["background"]


@pytest.mark.parametrize(("missing", "level"), [("ab", logging.INFO), ("abc", logging.WARNING)])
def test_missing_label_files_are_counted(tiny, config_of, caplog, missing, level):
    for name in missing:
        (tiny / f"labels/train/{name}.txt").unlink()
    for _ in range(2):  # the second time from the cache
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="yoke"):
            load_table(config_of("yolo"), "train")
        told = f"train: {len(missing)} of 4 images have no label file (background)"
        assert [(r.levelno, r.getMessage()) for r in caplog.records] == [(level, told)]


def test_no_label_file_at_all_is_an_error(tiny, config_of):
    (tiny / "labels" / "train").rename(tiny / "labels" / "other")
    with pytest.raises(DatasetError, match="none of 4 images has a label file"):
        load_table(config_of("yolo"), "train")


@pytest.mark.parametrize("form", ["yolo", "coco", "voc"])
def test_an_unreadable_image_is_skipped_and_named(tiny, config_of, caplog, form):
    (tiny / "images/train/b.png").write_bytes(b"\x89PNG broken")
    table = load_table(config_of(form), "train")
    assert [Path(path).stem for path in table.paths] == ["a", "c", "d"]
    assert table.offsets.tolist() == [0, 2, 2, 5]
    assert "unreadable" in caplog.text and "b.png" in caplog.text


def test_an_unreadable_folder_is_no_decode_error(tiny, config_of):
    (tiny / "images/train/b.png").unlink()
    (tiny / "images/train/b.png").symlink_to(tiny / "nowhere.png")
    with pytest.raises(DatasetError, match="1 of 4 listed images are missing"):
        load_table(config_of("yolo"), "train")


def test_a_missing_split_says_what_to_do(tiny):
    (tiny / "yolo.yaml").write_text("train: images/train\nval: images/none\nnames: [cat, dog]\n")
    config = load_data_config(tiny / "yolo.yaml")
    with pytest.raises(DatasetError, match="does not exist. Correct the split or `path`"):
        load_table(config, "val")
    with pytest.raises(DatasetError, match="no split 'test' - got train, val"):
        load_table(config, "test")


def test_an_upright_photo_is_labelled_in_its_upright_pixels(tiny, config_of):
    pixels = cv2.imread(str(tiny / "images/train/a.png"))
    tags = PillowImage.Exif()
    tags[0x0112] = 6
    PillowImage.fromarray(pixels).save(tiny / "images/train/a.png", exif=tags)
    assert load_table(config_of("yolo"), "train").sizes[0].tolist() == [60, 40]


def test_coco_category_ids_become_contiguous_by_name(tiny, config_of):
    assert load_table(config_of("coco"), "train").labels.tolist() == [0, 1, 1, 0, 0, 1]
    (tiny / "coco.yaml").write_text(
        "train: annotations/train.json\nval: annotations/val.json\nnames: [dog, cat]\n"
    )
    assert load_table(config_of("coco"), "train").labels.tolist() == [1, 0, 0, 1, 1, 0]


def test_coco_crowds_are_kept_apart(tiny, config_of):
    edit_json(tiny / "annotations/train.json", lambda d: d["annotations"][1].update(iscrowd=1))
    table = load_table(config_of("coco"), "train")
    assert table.crowd.tolist() == [False, True, False, False, False, False]


def test_coco_polygons_stand_in_for_a_missing_box(tiny, config_of):
    def change(document):
        del document["annotations"][0]["bbox"]
        document["annotations"][0]["segmentation"] = [[6, 4, 30, 10], [8, 20, 9, 9]]

    edit_json(tiny / "annotations/train.json", change)
    assert load_table(config_of("coco"), "train").boxes[0].tolist() == [6, 4, 30, 20]


# Change to the COCO document, what the message must say.
COCO_ROWS = [
    (lambda d: d["annotations"][2].update(category_id=99), "annotation 3: category_id - got 99"),
    (lambda d: d["annotations"][2].update(image_id=99), "annotation 3: image_id - got 99"),
    (lambda d: d["annotations"][2].update(bbox=[1, 2, 3]), "annotation 3: bbox - got [1, 2, 3]"),
    (lambda d: d["annotations"][2].update(bbox=[1, 2, None, 3]), "annotation 3: bbox - got"),
    (lambda d: d["images"][1].update(id=10), "images[1]: id - got 10 again"),
    (lambda d: d["images"][1].update(id="b"), "images[1]: id - got 'b', expected a whole number"),
    (
        lambda d: d["images"][1].update(id=2**64),
        "images[1]: id - got 18446744073709551616, expected",
    ),
    (lambda d: d["categories"][1].update(id=2**60), "categories[1]: id - got 11529215046"),
    (
        lambda d: d["categories"][1].update(id=[3]),
        "categories[1]: id - got [3], expected one value",
    ),
    (lambda d: d["annotations"][0].update(image_id=[1]), "image_id - got [1], expected one value"),
    (lambda d: d["annotations"][0].update(category_id={}), "category_id - got {}, expected one"),
    (lambda d: d["annotations"][0].update(image_id=None), "image_id - got None, expected the id"),
    (lambda d: d.pop("categories"), "no list 'categories'"),
    (lambda d: d["annotations"][0].pop("image_id"), "annotations[0]: no 'image_id'"),
    (lambda d: d["images"][0].update(file_name="z.png"), "image 'z.png' not found in"),
    (lambda d: d["images"][1].update(file_name="z.png"), "1 of 4 listed images are missing"),
]


@pytest.mark.parametrize(("change", "message"), COCO_ROWS)
def test_faults_of_a_coco_file_are_named(tiny, config_of, change, message):
    edit_json(tiny / "annotations/train.json", change)
    with pytest.raises(DatasetError) as caught:
        load_table(config_of("coco"), "train")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_size_of_null_is_not_known(tiny, config_of, caplog):
    edit_json(tiny / "annotations/train.json", lambda d: d["images"][0].update(height=None))
    assert not load_table(config_of("coco"), "train").faults and not caplog.records


@pytest.mark.parametrize(("key", "expected"), [("area", 24 * 16), ("iscrowd", 0)])
def test_null_in_a_coco_file_is_the_default(tiny, config_of, key, expected):
    edit_json(tiny / "annotations/train.json", lambda d: d["annotations"][0].update({key: None}))
    config = config_of("coco")
    truth = coco_ground_truth(config, "train", load_table(config, "train"))
    assert truth["annotations"][0][key] == expected


def test_a_coco_file_that_is_no_json_is_named(tiny, config_of):
    (tiny / "annotations/train.json").write_text("{")
    with pytest.raises(DatasetError, match="train.json: got no JSON"):
        load_table(config_of("coco"), "train")


def test_a_size_that_differs_from_the_annotation_is_counted(tiny, config_of, caplog):
    edit_json(tiny / "annotations/train.json", lambda d: d["images"][0].update(width=61))
    table = load_table(config_of("coco"), "train")
    assert [fault.kind for fault in table.faults] == ["size"]
    assert "got 60 x 40, expected 61 x 40" in caplog.text


def test_voc_corners_stand_as_they_are_unless_the_yaml_says_one_based(tiny, config_of):
    as_they_stand = load_table(config_of("voc"), "train").boxes[0].tolist()
    text = (tiny / "voc.yaml").read_text()
    (tiny / "voc.yaml").write_text(text + "one_based: true\n")
    shifted = load_table(config_of("voc"), "train").boxes[0].tolist()
    assert as_they_stand == [6, 4, 30, 20] and shifted == [5, 3, 30, 20]


def test_difficult_voc_objects_count_as_crowds(tiny, config_of):
    path = tiny / "voc/train/a.xml"
    marked = path.read_text().replace("</name>", "</name><difficult>1</difficult>", 1)
    path.write_text(marked)
    assert load_table(config_of("voc"), "train").crowd[:2].tolist() == [True, False]


# Text to replace in a VOC file, replacement, what the message must say.
VOC_ROWS = [
    ("<name>dog", "<name>dgo", "a.xml object 2: name - got 'dgo', expected one of cat, dog"),
    ("<xmin>6", "<xmin>six", "a.xml object 1: xmin - got 'six', expected a number"),
    ("<ymin>4</ymin>", "", "a.xml object 1: ymin - got None"),
    ("</annotation>", "", "a.xml: got no XML"),
]


@pytest.mark.parametrize(("old", "new", "message"), VOC_ROWS)
def test_faults_of_a_voc_file_are_named(tiny, config_of, old, new, message):
    path = tiny / "voc/train/a.xml"
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(DatasetError) as caught:
        load_table(config_of("voc"), "train")
    assert message in str(caught.value)


def test_voc_image_sets_choose_the_annotations(tiny):
    (tiny / "voc" / "train").rename(tiny / "Annotations")
    (tiny / "images" / "train").rename(tiny / "JPEGImages")
    (tiny / "ImageSets" / "Main").mkdir(parents=True)
    (tiny / "ImageSets/Main/some.txt").write_text("d\na\n")
    (tiny / "ImageSets/Main/cat_val.txt").write_text("b -1\na  1\nd  0\n")
    (tiny / "v.yaml").write_text(
        "train: ImageSets/Main/some.txt\nval: ImageSets/Main/cat_val.txt\nnames: [cat, dog]\n"
    )
    config = load_data_config(tiny / "v.yaml")
    assert config.format == "voc"
    assert [Path(p).stem for p in load_table(config, "train").paths] == ["d", "a"]
    assert [Path(p).stem for p in load_table(config, "val").paths] == ["a", "d"]


def test_yolo_lists_may_be_relative_to_the_list_or_the_data(tiny):
    (tiny / "lists").mkdir()
    (tiny / "lists/one.txt").write_text("../images/train/a.png\n\n")
    (tiny / "two.txt").write_text(f"./images/train/b.png\n{tiny}/images/train/d.png\n")
    (tiny / "l.yaml").write_text("train: [lists/one.txt, two.txt, images/val]\nnames: [cat, dog]\n")
    table = load_table(load_data_config(tiny / "l.yaml"), "train")
    assert [Path(path).stem for path in table.paths] == ["a", "b", "d", "e", "f"]
    assert table.labels.tolist() == [0, 1, 1, 0, 0, 1, 1, 0]


def test_ids_are_the_numbers_that_files_are_named_by(tiny, config_of):
    assert load_table(config_of("yolo"), "val").image_ids.tolist() == [1, 2]
    for folder, suffix in (("images", "png"), ("labels", "txt")):
        for old, new in (("e", "000139"), ("f", "000285")):
            (tiny / folder / "val" / f"{old}.{suffix}").rename(
                tiny / folder / "val" / f"{new}.{suffix}"
            )
    assert load_table(config_of("yolo"), "val").image_ids.tolist() == [139, 285]
    assert load_table(config_of("coco"), "train").image_ids.tolist() == [10, 11, 12, 13]


@pytest.mark.parametrize(
    ("stem", "ids"), [("202401150930123{}", [1, 2]), ("20240115093012{}", None)]
)
def test_names_of_too_many_digits_are_no_ids(stem, ids):
    paths = [stem.format(k) + ".jpg" for k in (4, 5)]
    assert image_ids_from_names(paths) == (ids or [int(path[:-4]) for path in paths])


def test_texts_keep_every_string():
    texts = ["a", "", "käse/ü.jpg", "x\udcff.jpg", "b"]
    packed = Texts.pack(texts)
    assert list(packed) == texts and packed[-1] == "b" and packed[1:3] == texts[1:3]
    assert list(packed.take(np.array([4, 0]))) == ["b", "a"]
    with pytest.raises(IndexError):
        packed[5]


def test_fault_lines_count_per_kind():
    faults = [Fault("a", "line 1", "p", "empty"), Fault("b", "", "q", "background")]
    lines = summarise([*faults, Fault("c", "line 2", "r", "empty")], "val")
    assert lines == ["val: objects without width or height, dropped: 2, the first: a line 1: p"]
    raise_if_fatal(faults, "nothing to do")
