"""COCO JSON: one file with images, annotations and categories for a whole split.

Category ids become contiguous class indices, by name where the data YAML gives names, else in the
file's order. Crowds stay for the evaluation, marked, and are not trained on.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data.formats.description import DataConfig, Listing
from data.formats.faults import Fault, raise_if_fatal
from data.formats.files import read_text
from data.formats.table import Row, Table, build_table, read_headers, size_faults
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

    def rows_of(k: int, size: tuple[int, int]) -> Iterator[Row | Fault]:
        # Nothing, or zero, is what some exporters write for "not known".
        height, width = images[k].get("height") or size[0], images[k].get("width") or size[1]
        yield from size_faults(files[k], size, (height, width))
        for number, row in enumerate(by_image.get(images[k]["id"], [])):
            yield _read_row(path, _place(row, number), row, classes)

    return build_table(files, headers, rows_of, faults, [row["id"] for row in images])


def _namesakes(path: str, categories: Sequence[Json]) -> list[Fault]:
    """A remark on each category whose name an earlier one has."""
    first: dict[str, object] = {}
    told = "name - got {0!r} again, as that of category {1}, expected each name once"
    return [
        Fault(path, f"category {row['id']}", told.format(name, first[name]), "namesake")
        for row in categories
        if first.setdefault(name := str(row["name"]), row["id"]) != row["id"]
    ]


def class_indices(document: Json, names: Sequence[str]) -> dict[int, int]:
    """Class index of each category id whose name is among `names`."""
    places = {name: index for index, name in enumerate(names)}
    rows = [row for row in document["categories"] if str(row["name"]) in places]
    return {row["id"]: places[str(row["name"])] for row in rows}


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


def _place(row: Json, number: int) -> str:
    return f"annotation {row['id']}" if "id" in row else f"annotations[{number}]"


def _read_row(path: str, place: str, row: Json, classes: Mapping[int, int]) -> Row | Fault:
    label, box = classes.get(row["category_id"]), box_xywh(row)
    if label is None:
        problem = f"category_id - got {row['category_id']!r}, expected one with a class name"
        return Fault(path, place, problem)
    if box is None:
        problem = f"bbox - got {row.get('bbox')!r}, expected [x, y, width, height]"
        return Fault(path, place, problem)
    corners = (box[0], box[1], box[0] + box[2], box[1] + box[3])
    return Row(path, place, label, corners, bool(row.get("iscrowd", 0)))


def box_xywh(annotation: Json) -> tuple[float, float, float, float] | None:
    """The box of an annotation, from its polygons if it states none; None if it has neither."""
    box = annotation.get("bbox")
    if box is None and isinstance(annotation.get("segmentation"), list):
        flat = [value for polygon in annotation["segmentation"] for value in polygon]
        if not flat or not all(isinstance(value, (int, float)) for value in flat):
            return None
        left, top = min(flat[0::2]), min(flat[1::2])
        return left, top, max(flat[0::2]) - left, max(flat[1::2]) - top
    if isinstance(box, list) and len(box) == 4 and all(map(_is_finite, box)):
        return box[0], box[1], box[2], box[3]
    return None


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
