"""The way to faster-coco-eval and back: its input from arrays, nothing copied that need not be."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from utils.matching import Pairs, matrices_of

if TYPE_CHECKING:
    from faster_coco_eval import COCOeval_faster

Array = NDArray[np.float64]
Json = dict[str, Any]


class Rows(NamedTuple):
    """Detections of all images, by image and best score first.

    Attributes:
        numbers: of the images, (K,).
        labels: class indices, (K,).
        boxes: xywh, (K, 4).
        scores: (K,).
    """

    numbers: NDArray[np.int64]
    labels: NDArray[np.int64]
    boxes: Array
    scores: Array


@contextmanager
def _collector_paused() -> Iterator[None]:
    """No search for garbage meanwhile: it would walk through all of PyTorch for every few thousand rows made."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def results_of(rows: Rows, ids: Sequence[int], category_ids: Sequence[int]) -> list[Json]:
    """COCO's results format; `ids` are those of the images."""
    categories = [category_ids[label] for label in rows.labels.tolist()]
    return [
        {"image_id": image, "category_id": category, "bbox": box, "score": score}
        for image, category, box, score in zip(
            ids, categories, rows.boxes.tolist(), rows.scores.tolist()
        )
    ]


@_collector_paused()
def run_coco(
    ground_truth: Json,
    rows: Rows,
    category_ids: Sequence[int],
    pairs: Pairs,
    max_detections: int,
) -> COCOeval_faster:
    """COCO's evaluation, done.

    Args:
        ground_truth: as `normalised` gives it.
        rows: the detections.
        category_ids: of each class index.
        pairs: their overlaps, in groups of image number x classes + class index.
        max_detections: how many count, of an image and class.
    """
    from faster_coco_eval import COCO, COCOeval_faster

    matrices = matrices_of(pairs)
    index = {category: label for label, category in enumerate(category_ids)}

    class Evaluation(COCOeval_faster):
        """Overlaps are there already."""

        def computeIoU(self, imgId: int, catId: int) -> Array | list[float]:  # noqa: N802
            return matrices.get(imgId * len(index) + index[catId], []) if catId in index else []

    def silent(*_: object) -> None:
        pass

    results = results_of(rows, rows.numbers.tolist(), category_ids)
    areas = rows.boxes[:, 2:].prod(1).tolist()
    for number, (row, area) in enumerate(zip(results, areas), start=1):
        row.update(id=number, area=area, iscrowd=0)
    truth, found = (COCO(print_function=silent) for _ in range(2))
    truth.dataset, found.dataset = ground_truth, {**ground_truth, "annotations": results}
    truth.createIndex()
    found.createIndex()
    coco = Evaluation(truth, found, "bbox", print_function=silent)
    coco.params.maxDets = sorted({1, 10, max_detections})
    coco.evaluate()
    coco.accumulate()
    coco.summarize()
    return coco


def normalised(
    ground_truth: Mapping[str, Any],
    category_ids: Sequence[int],
    names: Sequence[str],
    numbers: Mapping[int, int],
) -> Json:
    """A copy that holds what the evaluation reads and nothing else, `numbers` in place of ids."""
    categories = {
        int(c["id"]): str(c.get("name", c["id"])) for c in ground_truth.get("categories", [])
    }
    for category, name in zip(category_ids, names, strict=True):
        categories.setdefault(category, name)
    annotations: list[Json] = []
    for annotation in ground_truth.get("annotations", []):
        if int(annotation["image_id"]) not in numbers:
            continue
        box, area = [float(value) for value in annotation["bbox"]], annotation.get("area")
        annotations.append(
            {
                "id": len(annotations) + 1,
                "image_id": numbers[int(annotation["image_id"])],
                "category_id": int(annotation["category_id"]),
                "bbox": box,
                "area": box[2] * box[3] if area is None else float(area),
                "iscrowd": int(annotation.get("iscrowd") or 0),
            }
        )
    images = [{"id": number} for number in numbers.values()]
    return {
        "info": {},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": i, "name": n} for i, n in categories.items()],
    }
