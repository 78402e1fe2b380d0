"""The label cache holds exactly as long as the files are the same."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from data import storage
from data.config import load_data_config
from data.formats import coco, voc, yolo
from data.label_cache import load_table
from data.storage import cache_file, is_writable, write_cache

READERS = {"yolo": yolo, "coco": coco, "voc": voc}


class Counter:
    """Counts how often a format really reads."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
        self.reads = 0
        original = READERS[form].read

        def read(*arguments):
            self.reads += 1
            return original(*arguments)

        monkeypatch.setattr(READERS[form], "read", read)


def caches(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.yoke.npz"))


@pytest.mark.parametrize("form", ["yolo", "coco", "voc"])
def test_the_second_reading_comes_from_the_cache_and_is_equal(tiny, config_of, monkeypatch, form):
    (tiny / "labels/train/c.txt").unlink()
    counter = Counter(monkeypatch, form)
    first, second = load_table(config_of(form), "train"), load_table(config_of(form), "train")
    assert counter.reads == 1 and len(caches(tiny)) == 1
    assert list(first.paths) == list(second.paths) and first.faults == second.faults
    for name in ("image_ids", "sizes", "offsets", "labels", "boxes", "crowd"):
        assert (getattr(first, name) == getattr(second, name)).all()


def touch(path: Path) -> None:
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1_000_000))


# What is done to the files after the first reading; all of it must be noticed.
CHANGES = {
    "label edited": lambda d: (d / "labels/train/a.txt").write_text("1 .5 .5 .1 .1\n"),
    "label touched": lambda d: touch(d / "labels/train/a.txt"),
    "label removed": lambda d: (d / "labels/train/a.txt").unlink(),
    "label renamed": lambda d: (d / "labels/train/a.txt").rename(d / "labels/train/c.txt"),
    "image touched": lambda d: touch(d / "images/train/a.png"),
    "image removed": lambda d: (d / "images/train/a.png").unlink(),
    "image added": lambda d: (d / "images/train/z.png").write_bytes(
        (d / "images/train/a.png").read_bytes()
    ),
    "names changed": lambda d: (d / "yolo.yaml").write_text(
        "train: images/train\nval: images/val\nnames: [cat, dog, cow]\n"
    ),
    "cache damaged": lambda d: caches(d)[0].write_bytes(b"PK\x03\x04 nonsense"),
    "cache cut off": lambda d: caches(d)[0].write_bytes(caches(d)[0].read_bytes()[:500]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_of_the_files_is_noticed(tiny, config_of, monkeypatch, change):
    counter = Counter(monkeypatch, "yolo")
    load_table(config_of("yolo"), "train")
    CHANGES[change](tiny)
    load_table(config_of("yolo"), "train")
    assert counter.reads == 2
    load_table(config_of("yolo"), "train")
    assert counter.reads == 2


@pytest.mark.parametrize("form", ["coco", "voc"])
def test_a_changed_image_or_annotation_is_noticed_in_the_other_forms(
    tiny, config_of, monkeypatch, form
):
    counter = Counter(monkeypatch, form)
    load_table(config_of(form), "train")
    touch(tiny / "images/train/a.png")
    load_table(config_of(form), "train")
    touch(tiny / ("annotations/train.json" if form == "coco" else "voc/train/a.xml"))
    load_table(config_of(form), "train")
    assert counter.reads == 3


def test_caches_of_other_programs_are_left_alone(tiny, config_of):
    foreign = tiny / "labels" / "train.cache"
    foreign.write_bytes(b"theirs")
    load_table(config_of("yolo"), "train")
    assert foreign.read_bytes() == b"theirs"


def test_a_cache_with_pickled_contents_is_not_opened(tiny, config_of, monkeypatch):
    counter = Counter(monkeypatch, "yolo")
    load_table(config_of("yolo"), "train")
    file = caches(tiny)[0]
    with np.load(file) as stored:
        arrays = dict(stored)
    arrays["labels"] = np.array([object()], dtype=object)
    np.savez(file, allow_pickle=True, **arrays)
    load_table(config_of("yolo"), "train")
    assert counter.reads == 2


def test_a_read_only_folder_is_not_written_to(tiny, config_of, monkeypatch):
    fallback = tiny / "fallback"
    monkeypatch.setattr(storage, "FALLBACK", fallback)
    (tiny / "labels").chmod(0o555)
    try:
        load_table(config_of("yolo"), "train")
        assert not is_writable(tiny / "labels")
        assert not caches(tiny / "labels") and len(caches(fallback)) == 1
    finally:
        (tiny / "labels").chmod(0o755)


def test_data_in_a_place_without_any_room_is_read_all_the_same(tiny, config_of, monkeypatch):
    (tiny / "file").write_text("")
    monkeypatch.setattr(storage, "FALLBACK", tiny / "file" / "below")
    monkeypatch.setattr(storage, "is_writable", lambda folder: False)
    assert len(load_table(config_of("yolo"), "train")) == 4


def test_a_broken_write_leaves_neither_file_nor_rest(tmp_path):
    target = tmp_path / "a.bin"
    target.write_bytes(b"before")

    def fail(stream):
        stream.write(b"half")
        raise OSError("disk full")

    assert not write_cache(target, fail)
    assert target.read_bytes() == b"before" and [p.name for p in tmp_path.iterdir()] == ["a.bin"]


def test_files_of_one_name_in_two_read_only_folders_do_not_collide(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "is_writable", lambda folder: False)
    first, second = (cache_file(tmp_path / name / "train", ".npz") for name in ("x", "y"))
    assert first != second


def test_splits_in_folders_with_dots_have_caches_of_their_own(tiny):
    for form in ("images", "labels"):
        for split, name in (("train", "2024.01"), ("val", "2024.02")):
            (tiny / form / split).rename(tiny / form / name)
    (tiny / "yolo.yaml").write_text(
        "train: images/2024.01\nval: images/2024.02\nnames: [cat, dog]\n"
    )
    config = load_data_config(tiny / "yolo.yaml")
    assert [len(load_table(config, split)) for split in ("train", "val")] == [4, 2]
    assert len(caches(tiny)) == 2


def test_a_split_with_faults_leaves_no_cache(tiny):
    (tiny / "labels/train/a.txt").write_text("9 .5 .5 .1 .1\n")
    with pytest.raises(Exception, match="class id"):
        load_table(load_data_config(tiny / "yolo.yaml"), "train")
    assert not caches(tiny)
