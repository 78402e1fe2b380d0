"""The ground truth of a split in COCO form, for the evaluator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data.formats import coco
from data.formats.description import DataConfig
from data.formats.table import Table

Json = dict[str, Any]


def category_ids(config: DataConfig, split: str) -> list[int]:
    """Category id of every class index: of the COCO file (the first of several of one name), else 1, 2, 3, ..."""
    if config.format != "coco":
        return list(range(1, len(config.names) + 1))
    document = coco.load(coco.annotation_file(config, split))
    return _ids_of_names(document, config.names)


def _ids_of_names(document: Json, names: Sequence[str]) -> list[int]:
    by_index: dict[int, int] = {}
    for key, index in coco.class_indices(document, names).items():
        by_index.setdefault(index, key)
    unused = max([int(row["id"]) for row in document["categories"]], default=0) + 1
    return [by_index.get(index, unused + index) for index in range(len(names))]


def coco_ground_truth(
    config: DataConfig,
    split: str,
    table: Table,
    single_class: str = "",
    *,
    as_read: bool = False,
) -> Json:
    """Images, annotations and categories of a split.

    Annotations of a COCO file stand as they are, areas and crowds too (but without outlines, and
    numbered anew where an id is missing, zero or repeated, since evaluators take id 0 for "no
    match"). Other forms get one annotation per object; its area is that of its box.

    Args:
        config: the data set.
        split: which split `table` is.
        table: its images; those that were skipped are left out.
        single_class: if given, the one name that all objects get.
        as_read: the objects of `table` also for a COCO file, cut and without those that were
            dropped, as they are scored in other forms.
    """
    images: list[Json] = [
        {"id": int(key), "file_name": path, "height": int(height), "width": int(width)}
        for key, path, (height, width) in zip(
            table.image_ids, table.paths, table.sizes, strict=True
        )
    ]
    if config.format == "coco":
        document = coco.load(coco.annotation_file(config, split))
        identities = _ids_of_names(document, config.names)
        ids = {key: identities[k] for key, k in coco.class_indices(document, config.names).items()}
        annotations = (
            _made_annotations(table, identities)
            if as_read
            else _stored_annotations(document, {image["id"] for image in images}, ids)
        )
    else:
        identities = list(range(1, len(config.names) + 1))
        annotations = _made_annotations(table, identities)
    categories = [{"id": k, "name": n} for k, n in zip(identities, config.names, strict=True)]
    if single_class:
        categories = [{"id": 1, "name": single_class}]
        annotations = [{**row, "category_id": 1} for row in annotations]
    _number_if_needed(annotations)
    return {
        "info": {"description": f"{config.file} {split}"},
        "images": [{**row, "file_name": Path(str(row["file_name"])).name} for row in images],
        "annotations": annotations,
        "categories": categories,
    }


def _stored_annotations(
    document: Json, images: set[int], categories: Mapping[int, int]
) -> list[Json]:
    """The file's annotations of these images, each under the one id that its class is scored by."""
    rows = []
    for row in document["annotations"]:
        box = coco.box_xywh(row)
        if row["image_id"] not in images or box is None:
            continue
        kept = {key: value for key, value in row.items() if key != "segmentation"}
        kept["bbox"], kept["category_id"] = list(box), categories[row["category_id"]]
        if kept.get("area") is None:
            kept["area"] = box[2] * box[3]
        kept["iscrowd"] = kept.get("iscrowd") or 0
        rows.append(kept)
    return rows


def _made_annotations(table: Table, identities: Sequence[int]) -> list[Json]:
    rows: list[Json] = []
    for k, image_id in enumerate(table.image_ids):
        for row in range(table.offsets[k], table.offsets[k + 1]):
            left, top, right, bottom = (float(value) for value in table.boxes[row])
            rows.append(
                {
                    "id": row + 1,
                    "image_id": int(image_id),
                    "category_id": identities[table.labels[row]],
                    "bbox": [left, top, right - left, bottom - top],
                    "area": (right - left) * (bottom - top),
                    "iscrowd": int(table.crowd[row]),
                }
            )
    return rows


def _number_if_needed(annotations: list[Json]) -> None:
    keys = [row.get("id") for row in annotations]
    if len(set(keys)) < len(keys) or any(not isinstance(k, int) or k < 1 for k in keys):
        for number, row in enumerate(annotations, 1):
            row["id"] = number
