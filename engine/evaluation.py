"""The one evaluation loop, and a model of whatever kind measured with it on a split of `--data`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from data.dataset import DetectionDataset, LoadOptions, build_dataset
from data.loader import build_loader
from engine.datasets import check_classes, open_data
from engine.options import DataFlags, Thresholds
from models.postprocess import keep_best, postprocess
from utils.device import synchronize
from utils.logger import get_logger
from utils.metrics import CocoEvaluator, Metrics
from utils.progress import Progress
from utils.structures import Batch, Decoded, Detections, Targets, as_float, as_one_class

Output = Decoded | list[Detections]
OnBatch = Callable[[Batch, list[Detections]], None]
VALIDATION = Thresholds()


class Speed(NamedTuple):
    """Milliseconds an image: preparing it on the device, the network with decoding, and NMS or top-k."""

    prepare: float
    inference: float
    postprocess: float


def detections_of(
    output: Output,
    kind: str,
    thresholds: Thresholds,
    *,
    classes: Sequence[int] | None = None,
    multi_label: bool = False,
) -> list[Detections]:
    """The detections of each image, best first; of finished ones those that pass the limits.

    Args:
        output: predictions, or detections where the artifact has its postprocessing inside.
        kind: what the head needs, one of `models.postprocess.KINDS`.
        thresholds: what counts as a detection.
        classes: only these, by index.
        multi_label: a box may be one of several classes, as an evaluation wants it.
    """
    if thresholds.by_class:
        plain = thresholds._replace(by_class=())
        found = detections_of(output, kind, plain, classes=classes, multi_label=multi_label)
        return [above(one, thresholds.by_class) for one in found]
    if not isinstance(output, Decoded):
        return [keep_best(found, thresholds.conf, thresholds.max_det, classes) for found in output]
    return postprocess(
        output,
        kind,
        conf_thres=thresholds.conf,
        iou_thres=thresholds.iou,
        max_det=thresholds.max_det,
        classes=classes,
        agnostic=thresholds.agnostic,
        multi_label=multi_label and output.scores.shape[-1] > 1,
    )


def above(found: Detections, by_class: Sequence[float]) -> Detections:
    """Detections whose score is above the threshold of their class."""
    limits = found.scores.new_tensor(by_class)
    kept = found.scores > limits[found.labels]
    return Detections(*(value[kept] for value in found))


@torch.inference_mode()
def collect(
    predict: Callable[[Tensor, Targets], Output],
    kind: str,
    loader: Iterable[Batch],
    evaluator: CocoEvaluator,
    device: torch.device,
    *,
    thresholds: Thresholds = VALIDATION,
    on_batch: OnBatch | None = None,
) -> Speed:
    """Fill the evaluator with what is predicted for the batches of a loader.

    Args:
        predict: images (B, 3, H, W) in [0, 1] and their targets -> predictions, or detections.
        kind: what the head needs, one of `models.postprocess.KINDS`.
        loader: batches of uint8 images.
        evaluator: reset first.
        device: where the images go.
        thresholds: what counts as a detection.
        on_batch: sees each batch and its detections in the batch's pixels.
    """
    evaluator.reset()
    clocks, images_seen = [0.0, 0.0, 0.0], 0
    for batch in loader:
        marks = [_now(device)]
        images, targets = as_float(batch.images, device), batch.targets.to(device)
        marks.append(_now(device))
        output = predict(images, targets)
        marks.append(_now(device))
        detections = detections_of(output, kind, thresholds, multi_label=True)
        marks.append(_now(device))
        clocks = [total + end - start for total, start, end in zip(clocks, marks, marks[1:])]
        images_seen += len(images)
        restored = [
            found._replace(boxes=box.restore(found.boxes))
            for found, box in zip(detections, batch.letterboxes)
        ]
        evaluator.process(batch.image_ids, restored)
        if on_batch:
            on_batch(batch, detections)
    return Speed(*(1000 * clock / max(images_seen, 1) for clock in clocks))


def _now(device: torch.device) -> float:
    synchronize(device)
    return time.perf_counter()


def evaluator_of(dataset: DetectionDataset) -> CocoEvaluator:
    """COCO's metrics for the objects of a split."""
    return CocoEvaluator(dataset.coco_ground_truth(), dataset.category_ids, dataset.names)


def tell_other_score(dataset: DetectionDataset, evaluator: CocoEvaluator) -> None:
    """Say what the mAP is without the faults of a COCO file, which is scored as pycocotools scores it.

    Args:
        dataset: what was measured.
        evaluator: with the detections in it.
    """
    if not dataset.scored_otherwise:
        return
    truth = dataset.coco_ground_truth(as_read=True)
    other = CocoEvaluator(truth, dataset.category_ids, dataset.names)
    other.merge([evaluator.state()])
    found = other.evaluate()
    get_logger().warning(
        f"{dataset.config.file}: {dataset.split} - {dataset.scored_otherwise} objects that were cut or dropped on reading "
        f"are scored as the COCO file has them; as in other forms, without that, mAP50 {found.map50:.4f}, "
        f"mAP50-95 {found.map50_95:.4f}"
    )


class Described(Protocol):
    """What a model says of itself, as far as a measurement asks."""

    @property
    def white(self) -> float | None:
        """The value that is white in images deeper than 8 bits."""


class Measurable(Protocol):
    """What can be measured: a checkpoint, an exported file, several as one."""

    names: tuple[str, ...]
    stride: int
    postprocess_kind: str
    device: torch.device

    @property
    def info(self) -> Described:
        """What it says of itself."""

    def __call__(self, images: Tensor) -> Output:
        """Predictions for images (B, 3, H, W) in [0, 1]."""


class Validation:
    """A model on a split.

    Args:
        model: what is measured.
        name: what messages call it.
        options: flags that name the data set.
        split: `train`, `val` or `test`.
        load: how its images are loaded.
        workers: processes that load them.

    Raises:
        ConfigError: the data set has other classes than the model.
    """

    def __init__(
        self,
        model: Measurable,
        name: str,
        options: DataFlags,
        split: str,
        load: LoadOptions,
        workers: int,
    ) -> None:
        self.model, self.single_cls = model, load.single_cls
        self.dataset = build_dataset(open_data(options, model.info.white), split, load)
        if not load.single_cls:
            check_classes(model.names, self.dataset.names, name, options.data)
        self.loader = build_loader(self.dataset, load.batch_size, workers=workers)
        self.evaluator = evaluator_of(self.dataset)

    def run(
        self,
        device: torch.device,
        thresholds: Thresholds = VALIDATION,
        on_batch: OnBatch | None = None,
    ) -> tuple[Metrics, Speed]:
        """Metrics, and how long an image took; the evaluator keeps the detections."""

        def predict(images: Tensor, _: Targets) -> Output:
            output = self.model(images)
            return as_one_class(output) if self.single_cls else output

        bar, kind = Progress(self.loader, len(self.loader), "val"), self.model.postprocess_kind
        speed = collect(
            predict, kind, bar, self.evaluator, device, thresholds=thresholds, on_batch=on_batch
        )
        return self.evaluator.evaluate(), speed
