"""A data set as its YAML describes it or a folder shows it, and the files found for one split of it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from data.formats.faults import Fault
from data.formats.files import image_files, read_text
from data.images import is_image_path
from utils.errors import DatasetError

SPLITS = ("train", "val", "test")
ROBOFLOW_COCO = "_annotations.coco.json"
FOLDER_NAMES = {
    "train": ("train", "train2017", "training"),
    "val": ("val", "valid", "validation", "val2017"),
    "test": ("test",),
}
"""Folder names under which a split is looked for."""
CLASS_LISTS = ("classes.txt", "obj.names", "labels.txt")


@dataclass(frozen=True)
class DownloadSource:
    """One file that `--download` fetches and unpacks.

    Attributes:
        url: where it is.
        to: folder to unpack into, relative to the data set's folder.
        sha256: expected digest, lower-case hexadecimal; empty if not known.
        md5: the same, for publishers that state only this.
        size: expected length in bytes; 0 if not known.
    """

    url: str
    to: str = "."
    sha256: str = ""
    md5: str = ""
    size: int = 0


@dataclass(frozen=True)
class DataConfig:
    """A data set: where its files are, in which form, and what its classes are called.

    Attributes:
        path: folder that relative names are relative to.
        names: class names by index.
        splits: for `train`, `val`, `test`, as far as given: folders, list files or JSON files.
        format: `yolo`, `coco` or `voc`.
        file: the YAML (or the folder) that this was read from; named in messages.
        images: folder of the images of a split, where the annotations do not say.
        one_based: VOC corners count pixels from 1, not from 0.
        white: the value that is white in images deeper than 8 bits; None for their full range.
        keypoints: how many there are behind each box of a YOLO row, and of how many numbers each.
        sources: what `--download` fetches.
        script: start of a `download` key in the manner of other projects; never run.
    """

    path: Path
    names: tuple[str, ...]
    splits: Mapping[str, tuple[Path, ...]]
    format: str
    file: Path
    images: Mapping[str, Path]
    one_based: bool = False
    white: float | None = None
    keypoints: tuple[int, int] | None = None
    sources: tuple[DownloadSource, ...] = ()
    script: str = ""

    def entries(self, split: str) -> tuple[Path, ...]:
        """Folders or files of a split, all of which exist.

        Raises:
            DatasetError: there is no such split, or its files are not there.
        """
        if split not in self.splits:
            given = ", ".join(self.splits) or "none"
            raise DatasetError(f"{self.file}: no split {split!r} - got {given}. Add `{split}:`.")
        for entry in self.splits[split]:
            if not entry.exists():
                raise DatasetError(
                    f"{self.file}: {split} - got {entry}, which does not exist. {self.advice()}"
                )
        return self.splits[split]

    def advice(self) -> str:
        """What to do when the files of the data set are not there."""
        if self.sources:
            hosts = ", ".join(sorted({urlsplit(source.url).netloc for source in self.sources}))
            known = sum(source.size for source in self.sources)
            amount = f"{known / 1e9:.1f} GB " if known else ""
            return f"Pass --download to fetch {amount}from {hosts}, or correct `path`."
        if self.script:
            told = "Its `download` key is never run here"
            return f"{told}: fetch the data by hand, or correct `path`."
        return f"Correct the split or `path` (now {self.path})."


class Listing(NamedTuple):
    """The files of a split, found before anything is read: enough to tell whether a cache holds.

    Attributes:
        annotations: files that hold the annotations; one per image (which may be missing), or one
            for all images.
        images: image files; None if only the annotations tell which they are.
        remarks: files that do not come to use, or come to it twice.
    """

    annotations: list[str]
    images: list[str] | None
    remarks: tuple[Fault, ...] = ()


def recognise_entry(entry: Path) -> tuple[str, Path]:
    """Format of one entry of a split, and the entry to read in its place."""
    if entry.suffix.lower() == ".json":
        return "coco", entry
    if entry.is_dir():
        if (entry / ROBOFLOW_COCO).is_file():
            return "coco", entry / ROBOFLOW_COCO
        if _has_xml(entry):
            return "voc", entry
    elif entry.suffix.lower() == ".txt" and _is_image_set(entry):
        return "voc", entry
    return "yolo", entry


def _is_image_set(entry: Path) -> bool:
    if "ImageSets" in entry.parts:
        return True
    has_annotations = any((parent / "Annotations").is_dir() for parent in list(entry.parents)[:3])
    if not has_annotations or not entry.is_file():
        return False
    lines = entry.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return bool(lines) and not is_image_path(lines[0].strip())


def yaml_in(folder: Path) -> Path | None:
    """The data YAML of a folder: `data.yaml`, or the only YAML file there."""
    for name in ("data.yaml", "data.yml", "dataset.yaml"):
        if (folder / name).is_file():
            return folder / name
    found = sorted([*folder.glob("*.yaml"), *folder.glob("*.yml")])
    return found[0] if len(found) == 1 else None


def describe_folder(folder: Path) -> dict[str, object]:
    """What a data YAML of this folder would say; without `train` and `val` if nothing is found.

    Known are `annotations/*.json` (COCO), `train/_annotations.coco.json`, `ImageSets/Main`
    (VOC), `train/*.xml`, `images/train`, `train/images` and plain `images` (YOLO).
    """
    splits: dict[str, str] = {}
    for split, names in FOLDER_NAMES.items():
        found = _first_split(folder, names)
        if found is not None:
            splits[split] = str(found.relative_to(folder))
    if "train" not in splits and _has_images(folder / "images"):
        splits.update({"train": "images", "val": "images"})
    if "train" in splits and "val" not in splits and "test" in splits:
        splits["val"] = splits["test"]
    document: dict[str, object] = {"path": ".", **splits}
    classes = _class_list(folder)
    if classes:
        document["names"] = classes
    return document


def _first_split(folder: Path, names: Iterable[str]) -> Path | None:
    for name in names:
        for place in (
            folder / "annotations" / f"instances_{name}.json",
            folder / "annotations" / f"{name}.json",
            folder / name / ROBOFLOW_COCO,
            folder / "ImageSets" / "Main" / f"{name}.txt",
        ):
            if place.is_file():
                return place
        for place in (folder / "images" / name, folder / name / "images", folder / name):
            if place.is_dir() and (_has_images(place) or _has_xml(place)):
                return place
    return None


def _has_xml(folder: Path) -> bool:
    return any(name.lower().endswith(".xml") for name in os.listdir(folder))


def _has_images(folder: Path) -> bool:
    return folder.is_dir() and bool(image_files(folder))


def _class_list(folder: Path) -> list[str]:
    for name in CLASS_LISTS:
        file = folder / name
        if file.is_file():
            lines = read_text(file).splitlines()
            return [line.strip() for line in lines if line.strip()]
    return []
