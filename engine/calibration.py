"""Images and mAP for an integer export: what ranges are measured on, what the integers cost."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice

from torch import Tensor

from data.config import load_data_config
from data.dataset import DetectionDataset, build_dataset
from data.loader import build_loader
from engine.setup import with_white
from models.backends import Backend
from models.postprocess import postprocess
from utils.errors import ConfigError
from utils.metrics import CocoEvaluator, Metrics
from utils.structures import Decoded, as_float

CALIBRATION_IMAGES = 128


def load_split(
    source: str,
    split: str,
    imgsz: tuple[int, int],
    names: tuple[str, ...],
    white: float | None = None,
) -> DetectionDataset:
    """A split of the data set that `--data` names, letterboxed to `imgsz`; `white` is the model's.

    Raises:
        ConfigError: nothing was given, or it has another number of classes than the model.
    """
    if not source:
        raise ConfigError("--int8: got no --data, expected the data YAML the model was trained on.")
    dataset = build_dataset(with_white(load_data_config(source), white), split, imgsz=imgsz)
    if len(dataset.names) != len(names):
        raise ConfigError(
            f"--data {source}: got {len(dataset.names)} classes, expected the model's {len(names)}."
        )
    return dataset


def calibration_images(dataset: DetectionDataset, batch: int) -> Iterator[Tensor]:
    """About `CALIBRATION_IMAGES` random images, as whole float batches (batch, 3, H, W) in [0,
    1].
    """
    loader = build_loader(dataset, batch, workers=0, shuffle=True, drop_last=True)
    for sample in islice(loader, math.ceil(CALIBRATION_IMAGES / batch)):
        yield as_float(sample.images, "cpu")


def measure(backend: Backend, dataset: DetectionDataset, batch: int = 8) -> Metrics:
    """COCO metrics of an artifact, at the thresholds that val.py uses."""
    evaluator = CocoEvaluator(dataset.coco_ground_truth(), dataset.category_ids, dataset.names)
    evaluator.reset()
    for sample in build_loader(dataset, batch, workers=0):
        output = backend(as_float(sample.images, backend.device))
        if isinstance(output, Decoded):
            output = postprocess(
                output, backend.postprocess_kind, conf_thres=0.001, iou_thres=0.6, max_det=300,
                multi_label=len(dataset.names) > 1,
            )  # fmt: skip
        boxes = [box.restore(d.boxes) for d, box in zip(output, sample.letterboxes)]
        found = [d._replace(boxes=b) for d, b in zip(output, boxes)]
        evaluator.process(sample.image_ids, found)
    return evaluator.evaluate()
