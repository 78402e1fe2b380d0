"""Finding out what a folder or an entry of a data YAML holds."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from data.formats.files import image_files, read_text
from data.images import is_image_path

ROBOFLOW_COCO = "_annotations.coco.json"
FOLDER_NAMES = {
    "train": ("train", "train2017", "training"),
    "val": ("val", "valid", "validation", "val2017"),
    "test": ("test",),
}
"""Folder names under which a split is looked for."""
CLASS_LISTS = ("classes.txt", "obj.names", "labels.txt")


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


def describe_folder(folder: Path) -> dict[str, Any]:
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
    document: dict[str, Any] = {"path": ".", **splits}
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
