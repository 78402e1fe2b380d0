"""Detection metrics: COCO mAP as pycocotools computes it, curves, confusion matrix.

Letters: C classes, K detections, G objects.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from utils.bootstrap import ClassOutcomes, outcomes_of
from utils.coco import Json, Rows, normalised, results_of, run_coco
from utils.curves import Curves, ImageDetections, Outcomes, confidence_curves, overlaps
from utils.matching import Objects, Pairs, match, pair_up
from utils.structures import Detections
from utils.tide import Errors, judge

Array = NDArray[np.float64]
UNDEFINED = -1.0  # COCO's mark for an average over nothing


State = Mapping[int, ImageDetections]


class ClassMetrics(NamedTuple):
    """One row of the table. A class without objects has -1 in the last four.

    Attributes:
        name: class name.
        images: images with at least one object of the class, crowds not counted.
        instances: objects, crowds not counted.
        precision: at IoU 0.5 and the confidence of the best mean F1.
        recall: at the same point.
        map50: average precision at IoU 0.5.
        map50_95: average precision over IoU 0.5, 0.55, ..., 0.95.
    """

    name: str
    images: int
    instances: int
    precision: float
    recall: float
    map50: float
    map50_95: float


class Metrics(NamedTuple):
    """Result of an evaluation. Averages over nothing are -1, as in COCO.

    Attributes:
        map50_95: COCO's mAP.
        map50: mAP at IoU 0.5.
        precision: mean over classes with objects, at `confidence`.
        recall: likewise.
        f1: mean F1 at `confidence`, its maximum.
        confidence: the threshold of the best mean F1 at IoU 0.5.
        per_class: one row per class index.
        stats: the twelve numbers of pycocotools' summary: mAP, at IoU 0.5, at 0.75, of objects
            under 32 x 32 pixels, between, over 96 x 96; recall with 1, 10 and 100 detections an
            image, of small, medium and large objects.
        curves: for the plots.
        images: images in the ground truth.
        instances: objects, crowds not counted.
    """

    map50_95: float
    map50: float
    precision: float
    recall: float
    f1: float
    confidence: float
    per_class: tuple[ClassMetrics, ...]
    stats: tuple[float, ...]
    curves: Curves
    images: int
    instances: int

    @property
    def fitness(self) -> float:
        """What best.pt is chosen by: 0.1 mAP50 + 0.9 mAP50-95; undefined counts as 0."""
        return 0.1 * max(self.map50, 0.0) + 0.9 * max(self.map50_95, 0.0)


class CocoEvaluator:
    """Collects detections and computes COCO mAP: reset, process image by image, evaluate.

    The numbers are pycocotools' on the same predictions: per image and class only the best
    `max_detections` count, `iscrowd` objects are neither found nor missed, the `area` of the file
    decides small, medium and large. Annotations are numbered anew from 1, since an id of 0, which
    some exporters write, reads as "unmatched" in COCO's code; images too, in the order of their
    ids, since it passes ids through floating point, which tells large ones no more apart.
    """

    def __init__(
        self,
        ground_truth: Mapping[str, Any],
        category_ids: Sequence[int],
        names: Sequence[str],
        *,
        max_detections: int = 100,
    ) -> None:
        """Take the ground truth; it is copied, not changed.

        Args:
            ground_truth: COCO JSON content: `images`, `annotations`, `categories`. `area` defaults
                to width x height, `iscrowd` to 0, also where they are null.
            category_ids: COCO category id of each class index.
            names: name of each class index.
            max_detections: COCO's limit per image and class.

        Raises:
            ValueError: `category_ids` and `names` differ in number.
        """
        if len(category_ids) != len(names):
            raise ValueError(f"got {len(category_ids)} category ids and {len(names)} names")
        self.category_ids = tuple(int(i) for i in category_ids)
        self.names = tuple(names)
        self.max_detections = max_detections
        self._image_ids = sorted({int(image["id"]) for image in ground_truth["images"]})
        self._numbers = {image_id: n for n, image_id in enumerate(self._image_ids, start=1)}
        self._ground_truth = normalised(ground_truth, self.category_ids, self.names, self._numbers)
        self._objects = self._objects_by_group()
        self._detections: dict[int, ImageDetections] = {}

    def reset(self) -> None:
        """Forget all detections."""
        self._detections.clear()

    def process(self, image_ids: Sequence[int], detections: Sequence[Detections]) -> None:
        """Take detections of some images; an image given again replaces what was there.

        Args:
            image_ids: ids of the ground truth's images.
            detections: boxes in pixels of the original images, labels are class indices.

        Raises:
            ValueError: an id that the ground truth lacks, or lists of unequal length.
        """
        for image_id, found in zip(image_ids, detections, strict=True):
            number = self._numbers.get(int(image_id))
            if number is None:
                raise ValueError(f"image id {image_id} is not in the ground truth")
            scores = found.scores.detach().cpu().double().numpy()
            order = np.argsort(-scores, kind="stable")
            self._detections[number] = ImageDetections(
                found.boxes.detach().cpu().double().numpy()[order],
                scores[order],
                found.labels.detach().long().cpu().numpy()[order],
            )

    def state(self) -> State:
        """What this process has collected, to be sent to another one and given to its `merge`."""
        return self._detections

    def merge(self, states: Iterable[State]) -> None:
        """Add what other processes collected; an image that two of them had counts once."""
        for state in states:
            self._detections.update(state)

    def predictions(self) -> list[Json]:
        """All detections in COCO's results format (xywh), by image id, unrounded."""
        rows = self._rows()
        ids = [self._image_ids[number - 1] for number in rows.numbers]
        return results_of(rows, ids, self.category_ids)

    def _rows(self) -> Rows:
        numbers = sorted(self._detections)
        nothing = ImageDetections(np.zeros((0, 4)), np.zeros(0), np.zeros(0, np.int64))
        found = [nothing, *(self._detections[number] for number in numbers)]
        boxes, scores, labels = (np.concatenate(parts) for parts in zip(*found))
        boxes[:, 2:] -= boxes[:, :2]
        counts = [len(one.scores) for one in found[1:]]
        return Rows(np.repeat(np.array(numbers, np.int64), counts), labels, boxes, scores)

    def evaluate(self) -> Metrics:
        """Compute everything from what was processed; images not seen have no detections."""
        rows = self._rows()
        pairs = self._pairs(rows)
        coco = run_coco(self._ground_truth, rows, self.category_ids, pairs, self.max_detections)
        precision, stats = coco.eval["precision"][:, :, :, 0, -1], tuple(map(float, coco.stats))
        columns = {category: column for column, category in enumerate(coco.params.catIds)}
        precision = precision[:, :, [columns[category] for category in self.category_ids]]
        images, instances = self._count_objects()
        present = np.flatnonzero(instances)
        curves = self._curves(
            self._outcomes(rows, pairs), present, instances[present], precision[0].T[present]
        )
        best = int(curves.f1.mean(0).argmax()) if present.size else 0
        points = {
            int(c): (float(curves.precision[i, best]), float(curves.recall[i, best]))
            for i, c in enumerate(present)
        }
        per_class = tuple(
            ClassMetrics(
                name,
                int(images[c]),
                int(instances[c]),
                *points.get(c, (UNDEFINED, UNDEFINED)),
                _mean(precision[0, :, c]),
                _mean(precision[:, :, c]),
            )
            for c, name in enumerate(self.names)
        )
        return Metrics(
            map50_95=stats[0],
            map50=stats[1],
            precision=_mean(curves.precision[:, best]),
            recall=_mean(curves.recall[:, best]),
            f1=_mean(curves.f1[:, best]),
            confidence=float(curves.confidence_axis[best]),
            per_class=per_class,
            stats=stats,
            curves=curves,
            images=len(self._image_ids),
            instances=int(instances.sum()),
        )

    def outcomes(self) -> list[ClassOutcomes]:
        """What became of every detection, by class: what `utils.bootstrap` draws from."""
        rows = self._rows()
        sizes = (len(self._image_ids), len(self.names))
        return outcomes_of(self._pairs(rows), rows.scores, self._objects, *sizes)

    def errors(self) -> Errors:
        """Every detection and object judged, see `utils.tide`."""
        annotations = self._ground_truth["annotations"]
        return judge(self._detections, annotations, self.category_ids, self.max_detections)

    def size_counts(self) -> tuple[int, int, int]:
        """Objects that COCO calls small, medium and large, crowds not counted."""
        areas = [a["area"] for a in self._ground_truth["annotations"] if not a["iscrowd"]]
        small, medium, large = np.bincount(np.searchsorted((32**2, 96**2), areas), minlength=3)
        return int(small), int(medium), int(large)

    def image_id(self, number: int) -> int:
        """Id of the image that has a number in `errors`."""
        return self._image_ids[number - 1]

    def detections_of(self, number: int) -> ImageDetections:
        """What was found in it, best score first."""
        return self._detections[number]

    def _objects_by_group(self) -> Objects:
        index = {category: c for c, category in enumerate(self.category_ids)}
        known = [a for a in self._ground_truth["annotations"] if a["category_id"] in index]
        groups = [a["image_id"] * len(index) + index[a["category_id"]] for a in known]
        order = np.argsort(np.array(groups, np.int64), kind="stable")
        boxes = np.array([a["bbox"] for a in known], np.float64).reshape(-1, 4)
        is_crowd = np.array([a["iscrowd"] for a in known], bool)
        return Objects(np.array(groups, np.int64)[order], boxes[order], is_crowd[order])

    def _pairs(self, rows: Rows) -> Pairs:
        groups = rows.numbers * len(self.names) + rows.labels
        return pair_up(groups, rows.boxes, self._objects, max(10, self.max_detections))

    def _outcomes(self, rows: Rows, pairs: Pairs) -> Outcomes:
        """What became of the detections; those that hit a crowd are left out."""
        outcome = match(pairs, self._objects.is_crowd)
        counted = pairs.detections[outcome >= 0]
        return Outcomes(rows.scores[counted], rows.labels[counted], outcome[outcome >= 0] > 0)

    def _count_objects(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Images with the class and objects of the class, (C,) each, crowds left out."""
        index = {category: c for c, category in enumerate(self.category_ids)}
        pairs = [
            (index[a["category_id"]], a["image_id"])
            for a in self._ground_truth["annotations"]
            if not a["iscrowd"] and a["category_id"] in index
        ]
        images, instances = (
            np.bincount([c for c, _ in which], minlength=len(self.names)).astype(np.int64)
            for which in (set(pairs), pairs)
        )
        return images, instances

    def _curves(
        self,
        outcomes: Outcomes,
        present: NDArray[np.int64],
        instances: NDArray[np.int64],
        precision_at_recall: Array,
    ) -> Curves:
        """The curves of the classes that have objects."""
        names = tuple(self.names[c] for c in present)
        recall_axis = np.linspace(0, 1, precision_at_recall.shape[1])
        by_confidence = confidence_curves(outcomes, present.tolist(), instances.tolist())
        return Curves(names, recall_axis, precision_at_recall, *by_confidence)


class ConfusionMatrix:
    """Counts which class was predicted for which.

    `matrix[predicted, true]`, (C + 1, C + 1), the last index is the background: its row holds
    objects that were missed, its column detections that have no object. Detections are matched to
    objects of any class, best overlap first, one to one.
    """

    def __init__(self, num_classes: int, conf: float = 0.25, iou: float = 0.45) -> None:
        self.num_classes = num_classes
        self.conf = conf
        self.iou = iou
        self.matrix = np.zeros((num_classes + 1, num_classes + 1), dtype=np.int64)

    def update(self, detections: Detections, labels: Tensor, boxes: Tensor) -> None:
        """Count one image.

        Args:
            detections: of the image, K of them; those at or under `conf` are left out.
            labels: true class indices, (G,).
            boxes: xyxy in the same pixels as the detections, (G, 4).
        """
        keep = (detections.scores > self.conf).cpu().numpy()
        predicted = detections.labels.cpu().numpy()[keep]
        true = labels.cpu().numpy().astype(np.int64)
        overlap = overlaps(
            detections.boxes.cpu().double().numpy()[keep], boxes.cpu().double().numpy()
        )
        matched_k, matched_g = _best_pairs(overlap, self.iou)
        alone, missed = np.delete(predicted, matched_k), np.delete(true, matched_g)
        rows = (predicted[matched_k], alone, np.full_like(missed, self.num_classes))
        columns = (true[matched_g], np.full_like(alone, self.num_classes), missed)
        np.add.at(self.matrix, (np.concatenate(rows), np.concatenate(columns)), 1)


def _best_pairs(overlap: Array, threshold: float) -> tuple[list[int], list[int]]:
    """One-to-one pairs (detection, object) above `threshold`, largest overlap first."""
    pairs: dict[int, int] = {}
    k, g = np.nonzero(overlap > threshold)
    for i in np.argsort(-overlap[k, g], kind="stable"):
        if k[i] not in pairs and g[i] not in pairs.values():
            pairs[int(k[i])] = int(g[i])
    return list(pairs), list(pairs.values())


def _mean(values: Array) -> float:
    """The mean, -1 of no values; those of a class without objects are -1 all."""
    return float(values.mean()) if values.size else UNDEFINED
