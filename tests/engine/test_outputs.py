"""What detect.py and val.py leave behind: label files, tables, annotations, crops, pictures, videos."""

from __future__ import annotations

import csv
import json
import os
import tracemalloc
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

import detect
from data.videos import Frame, VideoInfo
from engine.detections import DetectionWriter
from engine.flags import read_flags
from engine.options import DetectOptions
from engine.outputs import LabelWriter, write_yolo_labels
from utils.files import FreeNames
from utils.structures import Batch, Detections, Letterbox, Targets

FOUND = Detections(
    torch.tensor([[10.0, 20.0, 30.0, 60.0], [0.0, 0.0, 100.0, 50.0]]),
    torch.tensor([0.9, 0.25]),
    torch.tensor([1, 0]),
)
NOTHING = Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64))


def flags(*words: str) -> DetectOptions:
    return read_flags(DetectOptions, ["--source", "x", *words])


def picture(seed: int = 0) -> np.ndarray:
    """Colours that change slowly, so that JPEG keeps them; 80 x 100."""
    corners = np.random.default_rng(seed).integers(0, 255, (2, 2, 3), dtype=np.uint8)
    return cv2.resize(corners, (100, 80), interpolation=cv2.INTER_LINEAR)


def frame(path: str = "photos/a.png", index: int = 0, video: VideoInfo | None = None) -> Frame:
    return Frame(path, picture(), index, video)


def write(folder: Path, *words: str, frames: list[Any] | None = None, names=("cat", "dog")) -> None:
    with DetectionWriter(folder, names, flags(*words)) as writer:
        for item in frames or [frame()]:
            writer.write(item, FOUND)


def files(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def test_yolo_rows_are_class_centre_and_size_as_parts_of_the_image(tmp_path: Path):
    """Box (10, 20, 30, 60) of an 80 x 100 image: centre (20, 40), size (20, 40)."""
    write_yolo_labels(tmp_path / "x" / "a.txt", FOUND, (80, 100), with_score=True)
    assert (
        tmp_path / "x" / "a.txt"
    ).read_text() == "1 0.2 0.5 0.2 0.5 0.9\n0 0.5 0.3125 1 0.625 0.25\n"
    write_yolo_labels(tmp_path / "b.txt", FOUND, (80, 100), with_score=False)
    assert (tmp_path / "b.txt").read_text() == "1 0.2 0.5 0.2 0.5\n0 0.5 0.3125 1 0.625\n"
    write_yolo_labels(tmp_path / "c.txt", NOTHING, (80, 100), with_score=True)
    assert (tmp_path / "c.txt").read_text() == ""


def test_labels_of_a_batch_are_in_parts_of_the_original_images(tmp_path: Path):
    """The image of 160 x 200 was halved and has 10 rows of padding above."""
    box = Letterbox(height=160, width=200, scale_y=0.5, scale_x=0.5, top=10, left=0)
    images = torch.zeros(1, 3, 100, 100, dtype=torch.uint8)
    batch = Batch(images, Targets.empty(), (0,), (box,), ("photos/a.png",))
    found = Detections(torch.tensor([[0.0, 10.0, 50.0, 50.0]]), torch.ones(1), torch.tensor([1]))
    LabelWriter(tmp_path, batch.paths, with_score=False).write(batch, [found])
    assert (tmp_path / "a.txt").read_text() == "1 0.25 0.25 0.5 0.5\n"


def test_labels_of_images_of_one_name_do_not_overwrite_each_other(tmp_path: Path):
    paths = ("in/val/k.jpg", "in/val/a/k.jpg", "in/val/a/k.png")
    box = Letterbox(height=80, width=100, scale_y=1, scale_x=1, top=0, left=0)
    images = torch.zeros(3, 3, 80, 100, dtype=torch.uint8)
    batch = Batch(images, Targets.empty(), (0, 1, 2), (box,) * 3, paths)
    LabelWriter(tmp_path, paths, with_score=False).write(batch, [FOUND, NOTHING, NOTHING])
    assert files(tmp_path) == ["a/k.txt", "a/k_2.txt", "k.txt"]
    assert len((tmp_path / "k.txt").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], ["a.png"]),
        (["--nosave"], []),
        (["--nosave", "--save-txt"], ["labels/a.txt"]),
        (["--nosave", "--save-csv"], ["predictions.csv"]),
        (["--nosave", "--save-json"], ["predictions.json"]),
        (["--nosave", "--save-voc"], ["voc/a.xml"]),
        (["--nosave", "--save-crop"], ["crops/cat/a_1.jpg", "crops/dog/a_0.jpg"]),
    ],
)
def test_each_flag_leaves_its_files(words: list[str], expected: list[str], tmp_path: Path):
    write(tmp_path, *words)
    assert files(tmp_path) == expected


def test_corners_in_pixels_are_the_other_form_of_labels(tmp_path: Path):
    write(tmp_path, "--nosave", "--save-txt", "--save-format", "1", "--save-conf")
    text = (tmp_path / "labels" / "a.txt").read_text()
    assert text == "1 10.00 20.00 30.00 60.00 0.90000\n0 0.00 0.00 100.00 50.00 0.25000\n"


def test_the_table_has_a_row_for_every_object(tmp_path: Path):
    write(tmp_path, "--nosave", "--save-csv")
    with (tmp_path / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2
    assert rows[0] == {
        "image": "photos/a.png",
        "frame": "0",
        "class": "dog",
        "label": "1",
        "confidence": "0.9",
        "x1": "10.0",
        "y1": "20.0",
        "x2": "30.0",
        "y2": "60.0",
    }


def test_the_json_says_the_same(tmp_path: Path):
    write(tmp_path, "--nosave", "--save-json")
    rows = json.loads((tmp_path / "predictions.json").read_text())
    assert rows[1] == {
        "image": "photos/a.png",
        "frame": 0,
        "class": "cat",
        "label": 0,
        "confidence": 0.25,
        "box": [0.0, 0.0, 100.0, 50.0],
    }


def test_a_file_name_that_is_no_utf8_stands_in_every_table(tmp_path: Path):
    path = os.fsdecode(b"photos/im\xff g.png")
    write(tmp_path, "--nosave", "--save-csv", "--save-json", "--save-voc", frames=[frame(path)])
    assert (tmp_path / "predictions.csv").read_bytes().count(b"photos/im\xff g.png,0,") == 2
    rows = json.loads((tmp_path / "predictions.json").read_text())
    assert [row["image"] for row in rows] == [path, path]
    (file,) = (tmp_path / "voc").iterdir()
    assert ElementTree.parse(file).getroot().findtext("filename") == "im\\xff g.png"


def test_an_annotation_in_the_form_of_voc_has_size_names_and_corners(tmp_path: Path):
    write(tmp_path, "--nosave", "--save-voc", "--save-conf")
    root = ElementTree.parse(tmp_path / "voc" / "a.xml").getroot()
    assert [root.findtext(f"size/{tag}") for tag in ("height", "width", "depth")] == [
        "80",
        "100",
        "3",
    ]
    objects = root.findall("object")
    assert [item.findtext("name") for item in objects] == ["dog", "cat"]
    corners = [
        float(objects[0].findtext(f"bndbox/{t}") or "nan") for t in ("xmin", "ymin", "xmax", "ymax")
    ]
    # corners of VOC are whole pixels counted from 1, or fractions: near the box either way
    assert np.abs(np.array(corners) - [10, 20, 30, 60]).max() <= 1


def test_a_crop_is_what_lies_under_the_box_and_a_little_around_it(tmp_path: Path):
    """20 x 40 pixels become 20.4 x 40.8 and 10 more, about their centre (20, 40)."""
    write(tmp_path, "--nosave", "--save-crop")
    crop = cv2.imread(str(tmp_path / "crops" / "dog" / "a_0.jpg"))
    assert crop.shape == (51, 31, 3)
    expected = picture()[14:65, 4:35]
    assert np.abs(crop[..., ::-1].astype(int) - expected).max() < 12


@pytest.mark.parametrize("name", ["../../outside", "/etc/cat", "a/b", "..", "", "con\0cat"])
def test_a_class_name_cannot_lead_out_of_the_folder(name: str, tmp_path: Path):
    folder = tmp_path / "in" / "run"
    write(folder, "--nosave", "--save-crop", names=(name, name))
    assert len(files(folder)) == 2
    assert all(path.startswith("crops/") and path.count("/") == 2 for path in files(folder))
    assert files(tmp_path) == [f"in/run/{path}" for path in files(folder)]


def test_images_of_one_name_do_not_overwrite_each_other(tmp_path: Path):
    frames = [frame("one/a.png"), frame("two/a.png"), frame("three/a.png")]
    write(tmp_path, "--save-txt", frames=frames)
    assert len(files(tmp_path)) == 6


def test_the_drawn_picture_keeps_the_size_and_shows_the_boxes(tmp_path: Path):
    write(tmp_path)
    drawn = cv2.imread(str(tmp_path / "a.png"))[..., ::-1]
    assert drawn.shape == (80, 100, 3)
    changed = np.abs(drawn.astype(int) - picture()).sum(-1) > 0
    assert changed[20:60, 9:12].any() and not changed[70:, 60:].any()


def test_frames_of_a_video_become_a_video(tmp_path: Path):
    info = VideoInfo(fps=10.0, height=80, width=100, frames=3)
    frames = [frame("clips/v.mp4", index, info) for index in range(3)]
    write(tmp_path, "--save-txt", frames=frames)
    assert files(tmp_path) == ["labels/v_1.txt", "labels/v_2.txt", "labels/v_3.txt", "v.mp4"]
    video = cv2.VideoCapture(str(tmp_path / "v.mp4"))
    assert video.get(cv2.CAP_PROP_FRAME_COUNT) == 3
    assert (video.get(cv2.CAP_PROP_FRAME_HEIGHT), video.get(cv2.CAP_PROP_FRAME_WIDTH)) == (80, 100)


@pytest.mark.parametrize(
    ("fps", "stride", "expected"), [(30.0, 3, 10.0), (0.5, 1, 0.5), (1.0, 4, 0.25)]
)
def test_a_video_keeps_its_pace_slow_ones_and_thinned_ones_too(
    fps: float, stride: int, expected: float, tmp_path: Path
):
    info = VideoInfo(fps=fps, height=80, width=100, frames=2)
    frames = [frame("clips/v.avi", index, info) for index in range(2)]
    write(tmp_path, "--vid-stride", str(stride), frames=frames)
    video = cv2.VideoCapture(str(tmp_path / "v.mp4"))
    assert video.get(cv2.CAP_PROP_FPS) == pytest.approx(expected, rel=0.01)


def test_videos_of_one_name_do_not_overwrite_each_other(tmp_path: Path):
    info = VideoInfo(fps=10.0, height=80, width=100, frames=1)
    frames = [frame(f"{folder}/v.mp4", 0, info) for folder in ("one", "two")]
    write(tmp_path, frames=frames)
    assert files(tmp_path) == ["v.mp4", "v_2.mp4"]


def test_the_summary_counts_by_class():
    assert detect.summary(FOUND, ("cat", "dog")) == "1 cat, 1 dog"
    assert detect.summary(NOTHING, ("cat", "dog")) == "nothing found"
    assert detect.summary(FOUND, ("N/A", "dog/")) == "1 N/A, 1 dog/"


def test_a_stream_leaves_nothing_behind_in_memory(tmp_path: Path):
    """A thousand frames of a hundred objects: 11 MiB where they are kept."""
    many = Detections(torch.rand(100, 4), torch.rand(100), torch.zeros(100, dtype=torch.int64))
    live = VideoInfo(30.0, 80, 100, 0)
    with DetectionWriter(tmp_path, ("cat", "dog"), flags("--nosave", "--save-csv")) as writer:
        writer.write(frame("rtsp://camera", 0, live), many)
        tracemalloc.start()
        for number in range(1, 1000):
            writer.write(Frame("rtsp://camera", np.zeros((2, 2, 3), np.uint8), number, live), many)
        grown, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert grown < 200_000
    assert len((tmp_path / "predictions.csv").read_text().splitlines()) == 100_001


def test_tables_that_a_signal_ends_are_whole(tmp_path: Path):
    with (
        pytest.raises(KeyboardInterrupt),
        DetectionWriter(tmp_path, ("cat", "dog"), flags("--nosave", "--save-json")) as writer,
    ):
        writer.write(frame(), FOUND)
        writer.write(frame("photos/b.png"), NOTHING)
        raise KeyboardInterrupt
    assert [row["class"] for row in json.loads((tmp_path / "predictions.json").read_text())] == [
        "dog",
        "cat",
    ]


def test_without_an_object_the_json_is_an_empty_list(tmp_path: Path):
    with DetectionWriter(tmp_path, ("cat",), flags("--nosave", "--save-json")) as writer:
        writer.write(frame(), NOTHING)
    assert json.loads((tmp_path / "predictions.json").read_text()) == []


@pytest.mark.parametrize(
    "name",
    ["..png", "a\x1b[31m\x07.png", "a\nb\r.png", "&<>\"'.png", "n" * 250 + ".png", "ü" * 125],
)
def test_any_file_name_of_the_system_makes_files_that_can_be_read(name: str, tmp_path: Path):
    words = ("--save-txt", "--save-voc", "--save-csv", "--save-json", "--save-crop")
    names = ("c\x00\x1bat", "dog\ufffe")
    write(tmp_path, *words, frames=[frame(f"photos/{name}")], names=names)
    found = files(tmp_path)
    assert len(found) == 7
    (voc,) = (tmp_path / "voc").iterdir()
    root = ElementTree.parse(voc).getroot()
    assert [item.findtext("name") for item in root.findall("object")] == [
        "dog\\ufffe",
        "c\\x00\\x1bat",
    ]
    escaped = name.encode("unicode_escape").decode() if "\x1b" in name or "\n" in name else name
    assert root.findtext("filename") == escaped
    assert json.loads((tmp_path / "predictions.json").read_text())[0]["image"] == f"photos/{name}"


def test_many_files_of_one_name_are_numbered_at_once():
    names = FreeNames()
    taken = [names.take("image", f"{folder}/image.jpg", ".txt") for folder in range(20_000)]
    assert taken[0] == "image.txt" and taken[1] == "image_2.txt" and len(set(taken)) == 20_000
    assert names.take("image", "7/image.jpg", ".txt") == taken[7]
