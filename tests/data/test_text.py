"""Lists, class lists and JSON files as they come from Windows and from people."""

from __future__ import annotations

from pathlib import Path

import pytest

from data.formats import coco, voc, yolo
from data.formats.description import describe_folder, recognise_entry
from data.label_cache import load_table
from utils.errors import DatasetError


def test_a_voc_image_id_may_hold_spaces(tmp_path):
    (tmp_path / "Annotations").mkdir()
    (tmp_path / "train.txt").write_text(
        "my photo\nthe cat  1\n no\t-1\nlast one  0\nplain\n\n2 3\n"
    )
    names = ["my photo", "the cat", "last one", "plain", "2 3"]
    assert [Path(file).stem for file in voc.xml_files(tmp_path / "train.txt")] == names


def test_a_yolo_list_beside_annotations_is_told_by_its_first_line(tmp_path):
    (tmp_path / "Annotations").mkdir()
    (tmp_path / "train.txt").write_text("images/my photo.jpg\n")
    assert recognise_entry(tmp_path / "train.txt")[0] == "yolo"
    (tmp_path / "train.txt").write_text("my photo\n")
    assert recognise_entry(tmp_path / "train.txt")[0] == "voc"


def test_texts_of_windows_editors_are_read(tiny, config_of):
    mark = b"\xef\xbb\xbf"
    (tiny / "list.txt").write_bytes(mark + b"./images/train/a.png\r\n./images/train/b.png\r\n")
    assert [Path(p).stem for p in yolo.read_list(tiny / "list.txt", tiny)] == ["a", "b"]
    (tiny / "classes.txt").write_bytes(mark + b"cat\r\ndog\r\n")
    assert describe_folder(tiny)["names"] == ["cat", "dog"]
    file = tiny / "annotations/train.json"
    file.write_bytes(mark + file.read_bytes())
    assert len(load_table(config_of("coco"), "train")) == 4


def test_texts_that_are_no_utf8_are_named(tiny):
    for name in ("list.txt", "classes.txt"):
        (tiny / name).write_bytes("M\N{LATIN SMALL LETTER U WITH DIAERESIS}ll".encode("latin-1"))
    for read in (
        lambda: yolo.read_list(tiny / "list.txt", tiny),
        lambda: describe_folder(tiny),
        lambda: voc.xml_files(tiny / "list.txt"),
        lambda: coco.load(tiny / "list.txt"),
    ):
        with pytest.raises(
            DatasetError, match=r"\.txt: got a byte that is no UTF-8 at 1, expected"
        ):
            read()
