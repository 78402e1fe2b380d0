"""Samples, batch shapes, caches and ground truth of a data set."""

from __future__ import annotations

import json
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from pycocotools.coco import COCO

from data import image_cache, storage
from data.config import load_data_config
from data.dataset import LoadOptions, build_dataset
from data.images import read_image
from utils.errors import DatasetError

HYP = {
    "mosaic": 1.0,
    "mosaic9": 0.3,
    "mixup": 0.3,
    "hsv_h": 0.1,
    "hsv_s": 0.5,
    "hsv_v": 0.4,
    "translate": 0.1,
    "scale": 0.5,
    "fliplr": 0.5,
    "flipud": 0.2,
    "degrees": 5,
}


def equal(first, second) -> bool:
    """True if two samples are the same in every bit."""
    tensors = all(torch.equal(a, b) for a, b in zip(first[:3], second[:3], strict=True))
    return tensors and first[3:] == second[3:]


def test_a_plain_sample_is_the_letterboxed_image(config_of):
    dataset = build_dataset(config_of("yolo"), "val", LoadOptions(imgsz=(64, 96)))
    sample = dataset[0]
    assert sample.image.shape == (3, 64, 96) and sample.image.dtype == torch.uint8
    assert sample.labels.dtype == torch.int64 and sample.boxes.dtype == torch.float32
    # 48 x 64 fits 64 x 96 at 4 / 3: 64 x 85, five columns of padding to the left.
    assert (sample.letterbox.top, sample.letterbox.left) == (0, 5)
    np.testing.assert_allclose(
        sample.boxes[0], [5 + 16 * 85 / 64, 16, 5 + 48 * 85 / 64, 48], atol=1e-4
    )
    restored = sample.letterbox.restore(sample.boxes)
    np.testing.assert_allclose(restored[0], [16, 12, 48, 36], atol=1e-4)
    assert sample.path == dataset.paths[0] and sample.image_id == 1


def test_an_image_of_the_right_size_is_not_touched(config_of):
    dataset = build_dataset(config_of("yolo"), "val", LoadOptions(imgsz=(64, 64)))
    sample = dataset[1]
    assert (sample.image.permute(1, 2, 0).numpy() == read_image(dataset.paths[1])).all()


def test_samples_depend_on_seed_epoch_and_index_alone(config_of):
    config = config_of("yolo")
    first = build_dataset(
        config, "train", LoadOptions(imgsz=(64, 96), augment=True, hyp=HYP, seed=3)
    )
    second = build_dataset(
        config, "train", LoadOptions(imgsz=(64, 96), augment=True, hyp=HYP, seed=3)
    )
    other = build_dataset(
        config, "train", LoadOptions(imgsz=(64, 96), augment=True, hyp=HYP, seed=4)
    )
    keys = [(epoch, index) for epoch in (0, 1, 7) for index in range(4)]
    backwards = {key: second[key] for key in reversed(keys)}
    for key in keys:
        assert equal(first[key], backwards[key])
        assert not equal(first[key], other[key])
    for index in range(4):
        assert not equal(first[0, index], first[1, index])


def test_augmented_boxes_lie_inside_the_image(config_of):
    dataset = build_dataset(
        config_of("yolo"), "train", LoadOptions(imgsz=(64, 96), augment=True, hyp=HYP)
    )
    count = 0
    for epoch in range(15):
        for index in range(4):
            sample = dataset[epoch, index]
            assert sample.image.shape == (3, 64, 96) and sample.image.is_contiguous()
            boxes = sample.boxes.numpy()
            assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] <= [96, 64]).all()
            assert ((boxes[:, 2:] - boxes[:, :2]) > 2).all()
            assert len(sample.labels) == len(boxes)
            count += len(boxes)
    assert count > 60


def test_mosaic_and_mixup_end_where_they_are_closed(config_of, monkeypatch):
    dataset = build_dataset(
        config_of("yolo"),
        "train",
        LoadOptions(
            imgsz=(64, 64),
            augment=True,
            hyp={**HYP, "mosaic": 1.0, "mixup": 1.0},
            close_mosaic_epoch=5,
        ),
    )
    made = []
    original = type(dataset)._mosaic
    monkeypatch.setattr(
        type(dataset), "_mosaic", lambda self, *args: made.append(1) or original(self, *args)
    )
    assert dataset[4, 0] and len(made) == 2
    made.clear()
    assert dataset[5, 0] and dataset[9, 1] and not made


def test_outside_the_strong_epochs_there_are_flips_alone(config_of, monkeypatch):
    options = LoadOptions(imgsz=(64, 64), augment=True, hyp={**HYP, "flipud": 0.0, "fliplr": 0.0})
    dataset = build_dataset(config_of("yolo"), "train", replace(options, strong_epochs=range(2, 4)))
    plain = build_dataset(config_of("yolo"), "train", LoadOptions(imgsz=(64, 64)))
    same = [torch.equal(dataset[epoch, 1].image, plain[1].image) for epoch in range(6)]
    assert same == [True, True, False, False, True, True]


def test_a_mosaic_at_half_size_shows_more_of_its_pictures(config_of):
    hyp = {**HYP, "mosaic": 1.0, "scale": 0.0, "translate": 0.0, "mixup": 0.0}
    counts = []
    for share in (1.0, 0.5):
        options = LoadOptions(imgsz=(64, 64), augment=True, hyp={**hyp, "mosaic_scale": share})
        dataset = build_dataset(config_of("yolo"), "train", options)
        counts.append(sum(len(dataset[epoch, 0].labels) for epoch in range(20)))
    assert counts[1] > 1.5 * counts[0]


def test_augmentation_without_hyper_parameters_changes_nothing(config_of):
    config = config_of("yolo")
    plain = build_dataset(config, "train", LoadOptions(imgsz=(64, 64)))
    augmented = build_dataset(config, "train", LoadOptions(imgsz=(64, 64), augment=True, hyp={}))
    for index in range(4):
        assert torch.equal(plain[index].image, augmented[3, index].image)
        np.testing.assert_allclose(plain[index].boxes, augmented[3, index].boxes, atol=1e-4)


def test_rect_batches_have_the_shapes_worked_by_hand(config_of):
    """Images: a 40 x 60, b 64 x 48, c 32 x 32, d 50 x 50; sorted by aspect: a, c, d, b."""
    dataset = build_dataset(
        config_of("yolo"), "train", LoadOptions(imgsz=(64, 96), rect=True, batch_size=2, stride=32)
    )
    assert [path[-5] for path in dataset.paths] == ["a", "c", "d", "b"]
    # a fits 64 x 96 as 64 x 96, c and d as 64 x 64, b as 64 x 48.
    assert dataset.batch_shapes.tolist() == [[64, 96], [64, 64]]
    assert [tuple(dataset[k].image.shape[1:]) for k in range(4)] == [(64, 96)] * 2 + [(64, 64)] * 2
    assert dataset.labels.tolist() == [0, 1, 0, 0, 1, 1]


def test_crowds_are_not_trained_on_but_stay_in_the_ground_truth(tiny, config_of):
    path = tiny / "annotations" / "train.json"
    document = json.loads(path.read_text())
    document["annotations"][0]["iscrowd"] = 1
    path.write_text(json.dumps(document))
    dataset = build_dataset(config_of("coco"), "train", LoadOptions(imgsz=(64, 64)))
    assert dataset.labels.tolist() == [1, 1, 0, 0, 1]
    assert dataset.offsets.tolist() == [0, 1, 2, 2, 5]
    assert [row["iscrowd"] for row in dataset.coco_ground_truth()["annotations"]] == [1] + [0] * 5


@pytest.mark.parametrize("form", ["yolo", "coco", "voc"])
def test_the_ground_truth_is_the_same_in_every_form(tiny, config_of, form):
    dataset = build_dataset(config_of(form), "train", LoadOptions(imgsz=(64, 64)))
    truth = dataset.coco_ground_truth()
    file = tiny / "truth.json"
    file.write_text(json.dumps(truth))
    index = COCO(str(file))
    names = {row["id"]: row["name"] for row in truth["categories"]}
    assert [names[key] for key in dataset.category_ids] == ["cat", "dog"]
    assert dataset.category_ids == ([7, 3] if form == "coco" else [1, 2])
    rows = index.loadAnns(index.getAnnIds(imgIds=[int(dataset.image_ids[0])]))
    found = [(names[row["category_id"]], row["bbox"]) for row in rows]
    assert [name for name, _ in found] == ["cat", "dog"]
    np.testing.assert_allclose(
        [box for _, box in found], [[6, 4, 24, 16], [30, 20, 30, 20]], atol=1e-4
    )
    # The COCO file states areas of its own, half of the boxes'.
    assert rows[0]["area"] == pytest.approx(192 if form == "coco" else 384, abs=1e-2)


def test_a_coco_file_s_annotations_stand_unchanged_in_the_ground_truth(tiny, config_of):
    dataset = build_dataset(config_of("coco"), "train", LoadOptions(imgsz=(64, 64)))
    document = json.loads((tiny / "annotations" / "train.json").read_text())
    assert dataset.coco_ground_truth()["annotations"] == document["annotations"]


def test_annotation_ids_that_evaluators_misread_are_numbered_anew(tiny, config_of):
    path = tiny / "annotations" / "train.json"
    document = json.loads(path.read_text())
    document["annotations"][0]["id"] = 0
    path.write_text(json.dumps(document))
    truth = build_dataset(
        config_of("coco"), "train", LoadOptions(imgsz=(64, 64))
    ).coco_ground_truth()
    assert [row["id"] for row in truth["annotations"]] == [1, 2, 3, 4, 5, 6]


def test_a_class_that_a_coco_file_lacks_gets_an_id_of_its_own(tiny):
    (tiny / "c.yaml").write_text("val: annotations/val.json\nnames: [cow, dog, cat]\n")
    dataset = build_dataset(load_data_config(tiny / "c.yaml"), "val", LoadOptions(imgsz=(64, 64)))
    assert dataset.category_ids == [8, 3, 7]
    assert len(dataset.coco_ground_truth()["categories"]) == 3


@pytest.mark.parametrize("form", ["yolo", "coco"])
def test_single_cls_takes_all_classes_for_one(config_of, form):
    dataset = build_dataset(config_of(form), "train", LoadOptions(imgsz=(64, 64), single_cls=True))
    assert dataset.names == ("object",) and dataset.category_ids == [1]
    assert dataset.labels.tolist() == [0] * 6
    truth = dataset.coco_ground_truth()
    assert {row["category_id"] for row in truth["annotations"]} == {1}
    assert len(truth["categories"]) == 1


def test_statistics_for_anchors(config_of):
    dataset = build_dataset(config_of("yolo"), "train", LoadOptions(imgsz=(64, 64)))
    wh, image_sizes = dataset.box_sizes_wh()
    np.testing.assert_allclose(wh[:3], [[24, 16], [30, 20], [24, 32]], atol=1e-3)
    assert image_sizes[:3].tolist() == [[40, 60], [40, 60], [64, 48]]


@pytest.mark.parametrize("kind", ["ram", "disk", "auto"])
@pytest.mark.parametrize("augment", [False, True])
def test_cached_images_give_the_same_samples(config_of, kind, augment):
    config = config_of("yolo")
    options = {"imgsz": (64, 96), "augment": augment, "hyp": HYP}
    plain = build_dataset(config, "train", LoadOptions(**options))
    cached = build_dataset(config, "train", LoadOptions(cache=kind, **options))
    assert cached.cache is not None
    for index in range(4):
        assert equal(plain[2, index], cached[2, index])
        assert equal(plain[2, index], cached[2, index]), "the first use changed the cache"


def test_the_disk_cache_is_used_again_until_an_image_changes(tiny, config_of, monkeypatch):
    config = config_of("yolo")
    reads = []
    original = image_cache.write_cache
    monkeypatch.setattr(
        image_cache, "write_cache", lambda *args: reads.append(1) or original(*args)
    )
    for _ in range(2):
        build_dataset(config, "train", LoadOptions(imgsz=(64, 64), cache="disk"))
    assert len(reads) == 1
    image = tiny / "images" / "train" / "c.png"
    image.write_bytes((tiny / "images" / "train" / "d.png").read_bytes())
    dataset = build_dataset(config, "train", LoadOptions(imgsz=(64, 64), cache="disk"))
    assert len(reads) == 2
    assert torch.equal(dataset[2].image, dataset[3].image)
    assert len(list(tiny.rglob("*.images"))) == 1, "the outdated file was not removed"


def test_too_large_a_cache_is_refused_in_one_line(config_of, monkeypatch, caplog):
    monkeypatch.setattr(image_cache, "available_memory", lambda: 1000)
    dataset = build_dataset(config_of("yolo"), "train", LoadOptions(imgsz=(64, 64), cache="ram"))
    assert dataset.cache is None and "--cache ram: not done" in caplog.text
    assert caplog.text.count("WARNING") == 1 and dataset[0].image.shape == (3, 64, 64)


@pytest.mark.parametrize(
    ("free", "start", "kept"),
    [(10**6, "fork", True), (10**5, "fork", False), (None, "fork", True), (10**6, "spawn", False)],
)
def test_few_images_are_kept_unasked(config_of, monkeypatch, caplog, free, start, kept):
    monkeypatch.setattr(image_cache, "available_memory", lambda: free)
    monkeypatch.setattr(image_cache.multiprocessing, "get_start_method", lambda: start)
    dataset = build_dataset(config_of("yolo"), "train", LoadOptions(imgsz=(64, 64), cache="auto"))
    assert (dataset.cache is not None) == kept and "--cache" not in caplog.text


def test_images_of_a_gibibyte_are_not_kept_unasked():
    few = np.full((2, 2), 2**10, np.int32)
    many = np.full((400, 2), 2**10, np.int32)
    picture = np.zeros((2**10, 2**10, 3), np.uint8)
    assert image_cache.cache_if_small(few, lambda index: picture) is not None
    assert image_cache.cache_if_small(many, lambda index: picture) is None


def test_a_disk_cache_that_cannot_be_written_is_done_without(config_of, monkeypatch, caplog, tiny):
    (tiny / "file").write_text("")
    monkeypatch.setattr(storage, "is_writable", lambda folder: False)
    monkeypatch.setattr(storage, "FALLBACK", tiny / "file" / "x")
    dataset = build_dataset(config_of("yolo"), "train", LoadOptions(imgsz=(64, 64), cache="disk"))
    assert dataset.cache is None and "--cache disk: not done" in caplog.text


@pytest.fixture
def damaged(tiny):
    """The image `b` of the training split as a JPEG whole at both ends, with damage between."""
    path = tiny / "images" / "train" / "b.png"
    ok, encoded = cv2.imencode(".jpg", cv2.imread(str(path)))
    data, place = bytearray(encoded.tobytes()), 0
    while (place := data.find(b"\xff\xc4", place)) >= 0:
        length = int.from_bytes(data[place + 2 : place + 4], "big")
        data[place + 4 : place + 2 + length] = b"\xff" * (length - 2)
        place += length
    path.unlink()
    path.with_suffix(".jpg").write_bytes(data)
    return path.with_suffix(".jpg")


@pytest.mark.parametrize("options", [{}, {"rect": True, "batch_size": 2}, {"cache": "ram"}])
def test_an_image_that_turns_out_damaged_is_told_once_and_replaced(
    config_of, caplog, damaged, options
):
    dataset = build_dataset(config_of("yolo"), "train", LoadOptions(imgsz=(64, 96), **options))
    assert len(dataset) == 4, "the scan does not see the damage"
    place = list(dataset.paths).index(str(damaged))
    first, again = dataset[place], dataset[place]
    assert equal(first, again) and first.path != str(damaged)
    stand_in = list(dataset.paths).index(first.path)
    assert first.image_id == dataset.image_ids[stand_in]
    assert first.letterbox[:2] == tuple(dataset.sizes[stand_in])
    if "rect" in options:
        assert (
            stand_in // 2 == place // 2
            and first.image.shape[1:] == dataset[stand_in].image.shape[1:]
        )
    else:
        assert equal(first, dataset[stand_in])
    assert caplog.text.count("skipped") == 1 and "b.jpg: not a whole image" in caplog.text


def test_a_mosaic_and_the_disk_cache_do_without_a_damaged_image(config_of, caplog, damaged):
    config, options = config_of("yolo"), {"imgsz": (64, 64), "augment": True, "hyp": HYP}
    plain = build_dataset(config, "train", LoadOptions(**options))
    for _ in range(2):
        cached = build_dataset(config, "train", LoadOptions(cache="disk", **options))
        assert all(equal(plain[1, k], cached[1, k]) for k in range(4))
    assert "another image stands in" in caplog.text.lower()


def test_images_none_of_which_decodes_are_an_error(tiny, config_of, damaged):
    for name in "acd":
        (tiny / "images/train" / f"{name}.png").unlink()
    dataset = build_dataset(config_of("yolo"), "train", LoadOptions(imgsz=(64, 64)))
    with pytest.raises(DatasetError, match="got no image that decodes among 1"):
        dataset[0]


def test_an_image_that_changed_under_a_run_is_named(tiny, config_of):
    dataset = build_dataset(config_of("yolo"), "train", LoadOptions(imgsz=(64, 64)))
    (tiny / "images/train/c.png").write_bytes((tiny / "images/train/d.png").read_bytes())
    with pytest.raises(DatasetError, match=r"c.png: changed since it was scanned - got \(50, 50\)"):
        dataset[2]


def test_options_that_make_no_sense_are_named(config_of):
    with pytest.raises(DatasetError, match="--cache: got 'tape'"):
        build_dataset(config_of("yolo"), "train", LoadOptions(imgsz=(64, 64), cache="tape"))
    with pytest.raises(DatasetError, match="--seed: got -1"):
        build_dataset(config_of("yolo"), "train", LoadOptions(imgsz=(64, 64), seed=-1))


def test_an_index_beyond_the_end_ends_iteration(config_of):
    dataset = build_dataset(config_of("yolo"), "val", LoadOptions(imgsz=(64, 64)))
    with pytest.raises(IndexError):
        dataset[2]
    assert len(list(dataset)) == 2
