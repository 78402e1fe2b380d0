"""COCO JSON: one file with images, annotations and categories for a whole split.

Category ids become contiguous class indices, by name where the data YAML gives names, else in the
file's order. Crowds stay for the evaluation, marked, and are not trained on.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.formats.description import DataConfig, Listing
from data.formats.faults import Fault, raise_if_fatal
from data.formats.table import Headers, Rows, Table, read_headers
from data.formats.text import read_text
from utils.errors import DatasetError

Json = dict[str, Any]
ID_BITS = {"images": 63, "categories": 53}
"""How long ids may be: images keep theirs in arrays, those of categories also pass as floats."""


def load(path: Path) -> Json:
    """Read a COCO file and check its outline.

    Raises:
        DatasetError: no JSON, or not the lists of objects that COCO has.
    """
    try:
        document = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{path}: got no JSON ({error}), expected COCO annotations.") from error
    wanted = {
        "images": ("id", "file_name"),
        "categories": ("id", "name"),
        "annotations": ("image_id", "category_id"),
    }
    for key, fields in wanted.items():
        rows = document.get(key) if isinstance(document, dict) else None
        if not isinstance(rows, list):
            raise DatasetError(
                f"{path}: no list {key!r}, expected images, annotations, categories."
            )
        for number, row in enumerate(rows):
            absent = [f for f in fields if not isinstance(row, dict) or f not in row]
            if absent:
                raise DatasetError(f"{path} {key}[{number}]: no {absent[0]!r}, expected it.")
            wrong = [f for f in fields if isinstance(row[f], (list, dict))]
            if wrong:
                raise DatasetError(
                    f"{path} {key}[{number}]: {wrong[0]} - got {row[wrong[0]]!r}, expected one value."
                )
    return document


def names_of(paths: Iterable[Path]) -> tuple[str, ...]:
    """Class names of several files of one data set, in the order of the categories' ids.

    A category that only groups others (it is their `supercategory` and has no object in any file)
    is left out; exports of labelling tools contain one.
    """
    categories: dict[str, Json] = {}
    used: set[str] = set()
    for path in paths:
        document = load(path)
        by_id = {row["id"]: str(row["name"]) for row in document["categories"]}
        used |= {by_id.get(row["category_id"], "") for row in document["annotations"]}
        for row in sorted(document["categories"], key=lambda row: str(row["id"]).zfill(20)):
            categories.setdefault(str(row["name"]), row)
    groups = {
        str(row.get("supercategory"))
        for name, row in categories.items()
        if row.get("supercategory") != name
    }
    return tuple(name for name in categories if name in used or name not in groups)


def find(config: DataConfig, split: str) -> Listing:
    """The annotation file of a split; the images are known once it is read."""
    return Listing([str(annotation_file(config, split))], None)


def annotation_file(config: DataConfig, split: str) -> Path:
    """The JSON file of a split."""
    entries = config.entries(split)
    if len(entries) != 1 or entries[0].suffix.lower() != ".json":
        got = ", ".join(map(str, entries))
        raise DatasetError(f"{config.file}: {split} - got {got}, expected one .json in COCO form.")
    return entries[0]


def read(config: DataConfig, split: str, listing: Listing) -> Table:
    """Read the annotations of a split, images in the file's order."""
    path = listing.annotations[0]
    document = load(Path(path))
    faults: list[Fault] = []
    images = document["images"]
    _check_ids(path, "images", images, faults)
    _check_ids(path, "categories", document["categories"], faults)
    folder = image_folder(config, split, Path(path), [str(row["file_name"]) for row in images])
    files = [os.path.join(folder, str(row["file_name"])) for row in images]
    # Ids first: what follows relies on them.
    raise_if_fatal(faults, "Correct the file.")
    headers = read_headers(files, faults)
    by_image = _annotations_by_image(path, document, faults)
    classes = class_indices(document, config.names)
    faults += _namesakes(path, document["categories"])
    rows = Rows(faults)
    for k in headers.readable:
        _compare_size(files[k], images[k], headers, int(k), faults)
        size = (int(headers.sizes[k, 0]), int(headers.sizes[k, 1]))
        _add_image(path, size, by_image.get(images[k]["id"], []), classes, rows)
    readable = headers.readable
    ids = [images[k]["id"] for k in readable]
    return rows.table([files[k] for k in readable], ids, headers)


def _namesakes(path: str, categories: Sequence[Json]) -> list[Fault]:
    """A remark on each category whose name an earlier one has."""
    first: dict[str, Any] = {}
    told = "name - got {0!r} again, as that of category {1}, expected each name once"
    return [
        Fault(path, f"category {row['id']}", told.format(name, first[name]), "namesake")
        for row in categories
        if first.setdefault(name := str(row["name"]), row["id"]) != row["id"]
    ]


def class_indices(document: Json, names: Sequence[str]) -> dict[Any, int]:
    """Class index of each category id whose name is among `names`."""
    places = {name: index for index, name in enumerate(names)}
    found = {row["id"]: places.get(str(row["name"])) for row in document["categories"]}
    return {key: index for key, index in found.items() if index is not None}


def image_folder(config: DataConfig, split: str, path: Path, names: Sequence[str]) -> str:
    """The folder in which the file names of a COCO file are found.

    Raises:
        DatasetError: the first image is in none of the usual places.
    """
    if not names:
        raise DatasetError(f"{path}: got no images, expected at least one.")
    stem = path.stem.removeprefix("instances_")
    root = config.path
    usual = [path.parent, root / "images" / stem, root / "images" / split, root / stem]
    usual += [root / split, root / "images", root, path.parent / "images"]
    folders = [config.images[split]] if split in config.images else usual
    for folder in folders:
        if (folder / names[0]).is_file():
            return str(folder)
    looked = ", ".join(map(str, dict.fromkeys(folders)))
    raise DatasetError(
        f"{path}: image {names[0]!r} not found in {looked}. Name the folder in the data YAML, "
        f"`images: {{{split}: ...}}`. {config.advice()}"
    )


def _check_ids(path: str, key: str, rows: Sequence[Json], faults: list[Fault]) -> None:
    seen: set[int] = set()
    for number, row in enumerate(rows):
        identity, place = row["id"], f"{key}[{number}]"
        if not isinstance(identity, int) or isinstance(identity, bool):
            faults.append(Fault(path, place, f"id - got {identity!r}, expected a whole number"))
        elif identity.bit_length() > ID_BITS[key]:
            problem = f"id - got {identity}, expected at most {ID_BITS[key]} bits"
            faults.append(Fault(path, place, problem))
        elif identity in seen:
            faults.append(Fault(path, place, f"id - got {identity} again, expected each id once"))
        else:
            seen.add(identity)


def _annotations_by_image(path: str, document: Json, faults: list[Fault]) -> dict[int, list[Json]]:
    known = {row["id"] for row in document["images"]}
    grouped: dict[int, list[Json]] = {}
    for number, row in enumerate(document["annotations"]):
        if row["image_id"] not in known:
            problem = f"image_id - got {row['image_id']!r}, expected the id of an image"
            faults.append(Fault(path, _place(row, number), problem))
        else:
            grouped.setdefault(row["image_id"], []).append(row)
    return grouped


def _place(row: Json, number: int | None = None) -> str:
    return f"annotation {row['id']}" if "id" in row else f"annotations[{number}]"


def _compare_size(file: str, image: Json, headers: Headers, k: int, faults: list[Fault]) -> None:
    height, width = (int(value) for value in headers.sizes[k])
    # Nothing, or zero, is what some exporters write for "not known".
    stated = (image.get("height") or height, image.get("width") or width)
    if stated != (height, width):
        problem = f"got {width} x {height}, expected {stated[1]} x {stated[0]} as annotated"
        faults.append(Fault(file, "", problem, "size"))


def _add_image(
    path: str,
    size: tuple[int, int],
    annotations: Sequence[Json],
    classes: dict[Any, int],
    rows: Rows,
) -> None:
    labels, boxes, crowd, places = [], [], [], []
    for number, row in enumerate(annotations):
        place = _place(row, number)
        box = box_xywh(row)
        if row["category_id"] not in classes:
            problem = f"category_id - got {row['category_id']!r}, expected one with a class name"
            rows.faults.append(Fault(path, place, problem))
        elif box is None:
            problem = f"bbox - got {row.get('bbox')!r}, expected [x, y, width, height]"
            rows.faults.append(Fault(path, place, problem))
        else:
            labels.append(classes[row["category_id"]])
            boxes.append((box[0], box[1], box[0] + box[2], box[1] + box[3]))
            crowd.append(bool(row.get("iscrowd", 0)))
            places.append(place)
    objects = (
        np.array(labels, dtype=np.int64),
        np.array(boxes, dtype=np.float64).reshape(-1, 4),
        np.array(crowd, dtype=np.bool_),
    )
    rows.add(path, size, objects, places)


def box_xywh(annotation: Json) -> tuple[float, float, float, float] | None:
    """The box of an annotation, from its polygons if it states none; None if it has neither."""
    box = annotation.get("bbox")
    if box is None and isinstance(annotation.get("segmentation"), list):
        flat = [value for polygon in annotation["segmentation"] for value in polygon]
        if not flat or not all(isinstance(value, (int, float)) for value in flat):
            return None
        left, top = min(flat[0::2]), min(flat[1::2])
        return left, top, max(flat[0::2]) - left, max(flat[1::2]) - top
    if not isinstance(box, list) or len(box) != 4:
        return None
    if not all(isinstance(value, (int, float)) and math.isfinite(value) for value in box):
        return None
    return box[0], box[1], box[2], box[3]
