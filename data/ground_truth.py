"""The ground truth of a split in COCO form, for the evaluator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from data.formats import coco
from data.formats.coco import Json
from data.formats.description import DataConfig
from data.formats.table import Table


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
    identities = list(range(1, len(config.names) + 1))
    if config.format == "coco":
        document = coco.load(coco.annotation_file(config, split))
        identities = _ids_of_names(document, config.names)
    if config.format == "coco" and not as_read:
        places = coco.class_indices(document, config.names)
        ids = {key: identities[k] for key, k in places.items()}
        annotations = _stored_annotations(document, set(table.image_ids.tolist()), ids)
    else:
        annotations = _made_annotations(table, identities)
    categories = [{"id": k, "name": n} for k, n in zip(identities, config.names, strict=True)]
    if single_class:
        categories = [{"id": 1, "name": single_class}]
        annotations = [{**row, "category_id": 1} for row in annotations]
    _number_if_needed(annotations)
    return {
        "info": {"description": f"{config.file} {split}"},
        "images": [
            {"id": key, "file_name": Path(path).name, "height": height, "width": width}
            for key, path, (height, width) in zip(
                table.image_ids.tolist(), table.paths, table.sizes.tolist(), strict=True
            )
        ],
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
        kept["area"] = box[2] * box[3] if kept.get("area") is None else kept["area"]
        kept["iscrowd"] = kept.get("iscrowd") or 0
        rows.append(kept)
    return rows


def _made_annotations(table: Table, identities: Sequence[int]) -> list[Json]:
    images = table.image_ids[table.image_of_objects()].tolist()
    rows: list[Json] = []
    for row, (left, top, right, bottom) in enumerate(table.boxes.tolist()):
        rows.append(
            {
                "id": row + 1,
                "image_id": images[row],
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
